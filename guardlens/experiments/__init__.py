"""The measurements: collect, compare, attribute, patch and sweep, each as a function that returns a table or activations."""
