"""`python -m guardlens` is the command `guardlens`."""

from guardlens.cli import app

app()
