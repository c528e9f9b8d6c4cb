"""Where each family of transformers keeps its parts: one generic rule (`find`), names as data (`names`). Knows modules, not nnsight."""

from guardlens.architectures.find import Architecture, find
from guardlens.architectures.fingerprint import fingerprint
from guardlens.architectures.parts import Part

__all__ = ["Architecture", "Part", "find", "fingerprint"]
