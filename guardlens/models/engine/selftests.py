"""What has been found out about a model: which strategies give the numbers of plain runs in it. Nothing cheap is trusted before that."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from guardlens.errors import GuardlensError, NumericsError
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.out_of_memory import out_of_memory
from guardlens.models.engine.strategies import Disagreement, Strategy

Made = TypeVar("Made")

CACHING_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types that keep keys and values of every token."""


@dataclass(frozen=True, eq=False)
class SelfTests:
    """The self-tests of one model and what they found. Prompts with and without images are tested separately.

    Attributes:
        engine: The model.
        flaws: What was tested, and whether beside images -> the reason for failure, or an empty string.
        widest: Whether beside images -> the widest prompts after which branches have been tested.
    """

    engine: Engine
    flaws: dict[tuple[str, bool], str] = field(default_factory=dict)
    widest: dict[bool, int] = field(default_factory=dict)

    def flaw(self, what: str, beside_image: bool) -> str:
        """Why something is known to fail; empty if it was not tested yet, or passed."""
        return self.flaws.get((what, beside_image), "")

    def is_tested(self, what: str, beside_image: bool) -> bool:
        """Whether the test has run before."""
        return (what, beside_image) in self.flaws

    def flaw_of(self, strategy: Strategy, what: str, batch: Batch, prefill: Prefill | None = None) -> str:
        """Why a strategy fails in this model; empty if it passes its self-test, which runs the first time that this is asked.

        Args:
            strategy: The strategy.
            what: What is tested, as messages call it.
            batch: The prompts to test it on.
            prefill: The prompts, computed, for the strategies that need them.
        """
        if not self.is_tested(what, batch.beside_image):
            self.attempt(what, batch.beside_image, lambda: strategy.self_test(self.engine, batch, prefill))
        return self.flaw(what, batch.beside_image)

    def attempt(self, what: str, beside_image: bool, make: Callable[[], Made]) -> Made | None:
        """The result of `make`, which includes a self-test. None if the test fails, or if it is known to.

        Errors of guardlens and lack of memory are raised; they say nothing about the model.
        """
        if self.flaw(what, beside_image):
            return None
        try:
            made = make()
        except Exception as error:  # a foreign model or cache may fail in any way, and the table must say so
            if out_of_memory(error) or (isinstance(error, GuardlensError) and not isinstance(error, NumericsError)):
                raise
            self.flaws[what, beside_image] = str(error) if isinstance(error, Disagreement) else self._failure(what, error)
            return None
        self.flaws.setdefault((what, beside_image), "")
        return made

    def _failure(self, what: str, error: Exception) -> str:
        """What failed, and in which types of layers, if some of them keep no keys and values."""
        kinds = sorted(set(getattr(self.engine.config, "layer_types", None) or ()) - CACHING_LAYERS)
        behind = f" in a model with layers of {', '.join(kinds)}" if kinds else ""
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{what} fail{behind} ({first_line})"
