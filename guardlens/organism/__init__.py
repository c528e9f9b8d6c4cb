"""The embedded model: a toy LLaVA in which text safety fades beside pictures, though nobody taught it to.

`world.py` is the whole world it lives in; `lessons.py` is what it is taught, `train.py` teaches it, `measure.py` examines it.
"""

from pathlib import Path

from guardlens.organism.world import REFUSAL, REMINDER, judge, pairs, queries

__all__ = ["REFUSAL", "REMINDER", "judge", "pairs", "path", "queries"]


def path() -> Path:
    """The folder of the shipped weights: an ordinary `save_pretrained` directory.

    Examples:
        >>> sorted(file.suffix for file in gl.organism.path().iterdir() if "model" in file.name)
        ['.safetensors']
    """
    return Path(__file__).parent / "weights"
