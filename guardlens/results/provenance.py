"""Where a result comes from, and whether two results belong to one model."""

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
        model: Name and fingerprint, `"organism@1f0c9a…"`; results of different fingerprints don't mix.
        template: Hash of the chat template that made the prompts.
        revision: The hub's revision, where there is one.
        versions: Package versions.
        date: When, in UTC.
        llm: Name and fingerprint of the LLM beside the model, where another one than its own was given.
    """

    model: str = ""
    template: str = ""
    revision: str = ""
    versions: Mapping[str, str] = field(default_factory=_versions)
    date: str = field(default_factory=_now)
    llm: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """The model, and the LLM beside it if that is another one: directions of either belong to the result."""
        return (self.model, self.llm) if self.llm else (self.model,)

    def __post_init__(self) -> None:
        for each in fields(self):
            require_type(getattr(self, each.name), Mapping if each.name == "versions" else str, StorageError, f"mend the {each.name}")


def require_same_model(what: str, of: str, *against: str) -> None:
    """Refuse results of another model than those in `against`. An empty name belongs to every model.

    Raises:
        MismatchError: The fingerprints differ; the models are named.
    """
    if of and all(against) and of.rpartition("@")[2] not in {name.rpartition("@")[2] for name in against}:
        expected = " or ".join(dict.fromkeys(against))
        namesake = of.rpartition("@")[0] in {name.rpartition("@")[0] for name in against}
        again = "; one name and other numbers: are these the same weights in another dtype?" if namesake else ""
        raise MismatchError(
            f"{what} of the model {of}", f"those of {expected}", f"collect activations with this model and make them anew{again}"
        )


def require_related(what: str, of: Provenance, against: Provenance) -> None:
    """Refuse a result of one model beside that of another. A VLM and the LLM that was loaded beside it belong together.

    Raises:
        MismatchError: The fingerprints differ; the models are named.
    """
    one, other = ({model.rpartition("@")[2] for model in provenance.models} for provenance in (of, against))
    if not one & other:
        require_same_model(what, of.model, *against.models)
