"""What is asked and what was read: queries, how they are shown, and the hidden states that were collected. Nothing here knows a model."""
