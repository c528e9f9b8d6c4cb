"""The embedded model: a toy LLaVA in which text safety fades beside pictures, though nobody taught it to.

`world.py` defines the world it lives in, `lessons.py` what it is taught; `train.py` teaches it, and `measure.py` examines it. A *picture*
is a thing of that world: it has a caption, and the model sees it as an image.
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
