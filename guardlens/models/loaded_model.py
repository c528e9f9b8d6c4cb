"""A model that is loaded: its parts, its identity and how it shows itself. `HookedModel` adds what runs it."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from guardlens.errors import MismatchError, ModelError, require_type
from guardlens.models.architectures import KNOWN, Architecture, Names, constants, find, fingerprint
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.selftests import SelfTests
from guardlens.models.processing.chat_template import tokenizer_of
from guardlens.models.readiness import foreign_hooks, hook_name
from guardlens.results.files import digest
from guardlens.results.notebook_html import captioned, facts
from guardlens.results.provenance import Provenance


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A Hugging Face model with its processor; see `HookedModel` for the attributes."""

    hf: Any
    processor: Any
    name: str
    revision: str = ""
    separate_llm: "LoadedModel | None" = None
    names: Names = KNOWN
    shows_images: bool = True

    def __post_init__(self) -> None:
        llm = self.separate_llm
        if llm and (llm.cfg.d_model, llm.cfg.n_layers) != (self.cfg.d_model, self.cfg.n_layers):
            raise MismatchError(
                f"an LLM of width {llm.cfg.d_model} and {llm.cfg.n_layers} layers beside {self.name}",
                f"width {self.cfg.d_model} and {self.cfg.n_layers} layers, as the VLM's own language model",
                "give the LLM that the VLM was made from",
            )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the results of self-tests, which a copy repeats."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def cfg(self) -> Architecture:
        """Sizes and paths: `n_layers`, `d_model`, `n_heads`, `d_vocab`, `image_token_id`, `image_size`, ..."""
        return find(self.hf, self.names)

    @cached_property
    def _tests(self) -> SelfTests:
        return SelfTests(Engine(self.hf, self.cfg))

    @property
    def _engine(self) -> Engine:
        return self._tests.engine

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return tokenizer_of(self.processor)

    @property
    def sees_images(self) -> bool:
        """Whether the model is a VLM."""
        return self.cfg.image_token_id is not None

    @property
    def id(self) -> str:
        """The name and the fingerprint. Directions and interventions of another fingerprint are refused.

        It changes with the weights, the config and the adapters. The first call costs a pass over the weights.
        """
        return f"{self.name}@{self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """A digest of the weights, the config and the adapters, which does not depend on the name; see `architectures.fingerprint`."""
        return fingerprint(self.hf)

    @property
    def ids(self) -> tuple[str, str]:
        """The ids of this model and of the LLM beside it. Without one, both are the same."""
        own = self.id
        return own, own if self.separate_llm is None else self.separate_llm.id

    @property
    def hook_names(self) -> list[str]:
        """The full TransformerLens names of all hooks, in order of execution."""
        return [point.name for point in self.cfg.points]

    @property
    def provenance(self) -> Provenance:
        """The model, its chat template, versions, the date, and the LLM beside it."""
        template = getattr(self.processor, "chat_template", None) or ""
        return Provenance(self.id, digest(str(template).encode()), self.revision, llm=self.separate_llm.id if self.separate_llm else "")

    @property
    def state(self) -> tuple[str, ...]:
        """The ids, and what they don't cover: the attributes of modules, and the hooks on them."""
        models = [each.hf for each in (self, self.separate_llm) if each]
        hooks = [f"{path} {hook_name(hook)} {id(hook)}" for hf in models for path, hook in foreign_hooks(hf)]
        return (*self.ids, *map(constants, models), *hooks)

    def __repr__(self) -> str:
        kind = "VLM" if self.sees_images else "LLM"
        beside = f", beside {self.separate_llm.name!r}" if self.separate_llm else ""
        sizes = f"{self.cfg.n_layers} layers, d_model {self.cfg.d_model}"
        return f"HookedModel({self.name!r}: {type(self._engine.inner).__name__}, {kind}, {sizes}{beside})"

    def _repr_html_(self) -> str:
        rows = {
            "weights": self.id,
            "layers": f"{self.cfg.n_layers}, d_model {self.cfg.d_model}, {self.cfg.n_heads} heads, vocabulary {self.cfg.d_vocab:,}",
            "parameters": f"{self.hf.num_parameters():,}, {str(self.hf.dtype).removeprefix('torch.')} on {self.hf.device}",
            "images": f"{self.cfg.image_size or '?'} pixels a side" if self.sees_images else "",
            "LLM beside": "" if self.separate_llm is None else self.separate_llm.id,
            "revision": self.revision,
        }
        return captioned(repr(self), facts(rows))


def require_model(model: Any) -> None:
    """Refuse anything but a `HookedModel`, such as a model of transformers.

    Raises:
        ModelError: It is something else.
    """
    require_type(model, LoadedModel, ModelError, "load it: gl.load('organism'), or gl.load(model, processor=processor)")
