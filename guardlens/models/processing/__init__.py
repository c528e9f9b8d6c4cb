"""From queries to input tensors: chat template, image preprocessing, and the text twin of a prompt."""
