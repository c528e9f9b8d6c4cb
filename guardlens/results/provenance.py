"""Provenance: where a result comes from, and whether two results belong to one model."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata

from guardlens.errors import MismatchError, StorageError, require_type


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("guardlens", "torch", "transformers", "nnsight")}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from.

    Attributes:
        model: Name and fingerprint, as in `"organism@1f0c9a…"`. Results with different fingerprints are not combined.
        template: Hash of the chat template of the prompts.
        revision: The revision on the hub, if the model comes from there.
        versions: Versions of the packages.
        date: Date and time in UTC.
        llm: Name and fingerprint of a separate LLM that was loaded beside the model; empty if there is none.
    """

    model: str = ""
    template: str = ""
    revision: str = ""
    versions: Mapping[str, str] = field(default_factory=_versions)
    date: str = field(default_factory=_now)
    llm: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """The model and its separate LLM, if there is one. Directions of either fit the result."""
        return (self.model, self.llm) if self.llm else (self.model,)

    def __post_init__(self) -> None:
        for each in fields(self):
            require_type(getattr(self, each.name), Mapping if each.name == "versions" else str, StorageError, f"correct the {each.name}")


def require_same_model(what: str, of: str, *against: str) -> None:
    """Refuse a result of a model that is not among `against`. An empty name fits every model.

    Args:
        what: What the result is, for the error.
        of: Name and fingerprint of its model.
        against: Names and fingerprints of the expected models.

    Raises:
        MismatchError: The fingerprints differ; the models are named.
    """
    if of and all(against) and _fingerprint(of) not in map(_fingerprint, against):
        same_name = of.rpartition("@")[0] in {name.rpartition("@")[0] for name in against}
        hint = "; one name and other numbers: are these the same weights in another dtype?" if same_name else ""
        raise MismatchError(
            f"{what} of the model {of}",
            f"those of {' or '.join(dict.fromkeys(against))}",
            f"collect activations with this model and make them anew{hint}",
        )


def require_related(what: str, of: Provenance, against: Provenance) -> None:
    """Refuse to combine results of different models. A VLM and the LLM that was loaded beside it belong together.

    Raises:
        MismatchError: The fingerprints differ; the models are named.
    """
    if set(map(_fingerprint, of.models)).isdisjoint(map(_fingerprint, against.models)):
        require_same_model(what, of.model, *against.models)


def _fingerprint(model: str) -> str:
    return model.rpartition("@")[2]
