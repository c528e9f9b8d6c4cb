"""Where each family of transformers keeps its parts: one generic rule (`discovery`), and names as data (`families`). No nnsight here."""

from guardlens.models.architectures.architecture import Architecture
from guardlens.models.architectures.discovery import find, require_named, require_parts_alone
from guardlens.models.architectures.families import KNOWN, Names
from guardlens.models.architectures.fingerprint import constants, facts, fingerprint
from guardlens.models.architectures.lookup import unwrapped
from guardlens.models.architectures.parts import Part

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
