"""Where each family of transformers keeps its parts: one generic rule (`find`), names as data (`names`). Knows modules, not nnsight."""

from guardlens.models.architectures.architecture import Architecture
from guardlens.models.architectures.discovery import find, require_named, require_parts_alone
from guardlens.models.architectures.families import KNOWN, Names
from guardlens.models.architectures.fingerprint import constants, facts, fingerprint
from guardlens.models.architectures.parts import Part
from guardlens.models.architectures.search import unwrapped

__all__ = [
    "KNOWN",
    "Architecture",
    "Names",
    "Part",
    "constants",
    "facts",
    "find",
    "fingerprint",
    "require_named",
    "require_parts_alone",
    "unwrapped",
]
