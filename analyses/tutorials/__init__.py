"""The tutorials, `N_slug.py` in jupytext's percent format, and what makes pages of the docs and notebooks of them."""
