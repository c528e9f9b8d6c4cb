"""Where each family of transformers keeps its parts: one generic rule (`find`), names as data (`names`). Knows modules, not nnsight."""

from guardlens.architectures.architecture import Architecture
from guardlens.architectures.find import find, require_named, require_parts_alone
from guardlens.architectures.fingerprint import constants, facts, fingerprint
from guardlens.architectures.names import KNOWN, Names
from guardlens.architectures.parts import Part
from guardlens.architectures.search import unwrapped

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
