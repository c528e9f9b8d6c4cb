"""How interventions run: requests are compiled to taps, laid out in a batch, and driven through a forward pass."""
