"""Starts the command: `python -m guardlens.organism.eyes --llm ID_OR_PATH --out DIR`."""

import typer

from guardlens.organism.eyes.make import main

if __name__ == "__main__":
    typer.run(main)
