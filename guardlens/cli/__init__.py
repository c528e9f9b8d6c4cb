"""The commands: `guardlens demo`, `guardlens check`, and what they print and write."""

from guardlens.cli.commands import app

__all__ = ["app"]
