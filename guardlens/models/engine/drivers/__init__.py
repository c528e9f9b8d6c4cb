"""The ways to run taps inside a forward pass: an nnsight trace, or plain torch hooks."""
