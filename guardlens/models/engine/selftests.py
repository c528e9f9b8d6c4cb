"""What branches, prefixes, forks and answers rest on, measured on each model before it is trusted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import GuardlensError, InterventionError, ModelError, NumericsError
from guardlens.hooks import Positions, Site
from guardlens.interventions import Context, Custom, Intervention, Step, nothing
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.kv_cache import Prefix, Stem, answers_kind, prefix_of, stem_of
from guardlens.models.engine.lanes import run_answers, run_forks, run_tails, run_tiles
from guardlens.models.engine.out_of_memory import out_of_memory
from guardlens.models.engine.request import Asked
from guardlens.models.engine.run import Run, agree

Made = TypeVar("Made")


ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that keep keys and values of every token."""


class Disagreement(Exception):
    """A cheaper way to compute something gave something else."""


@dataclass(frozen=True, eq=False)
class Trials:
    """The cheaper ways of one model, compared with whole runs before they are trusted.

    Attributes:
        engine: The model.
        flaws: What was found, of prompts with and without images apart: why branches (prefixes, forks, answers) don't hold; empty where
            they do.
        widest: The most columns behind which branches have been compared, of either kind of prompt.
    """

    engine: Engine
    flaws: dict[tuple[str, bool], str] = field(default_factory=dict)
    widest: dict[bool, int] = field(default_factory=dict)

    def stem(self, batch: Batch, prefix: Prefix | None) -> tuple[Stem, Float[Tensor, "query vocab"]] | None:
        """The prompts, kept, and their logits; None where branches of them differ from whole runs, edited or unedited."""
        return self._tried(("branches", batch.beside_image), lambda: self._stem(batch, prefix))

    def prefix(self, first: Batch, length: int, two: Callable[[], Batch]) -> Prefix | None:
        """The first tokens of one prompt; None where prompts that continue from it (`two`) have other states than on their own."""
        return self._tried(("prefixes", first.beside_image), lambda: self._prefix(first, length, two))

    def forks(self, batch: Batch) -> bool:
        """Whether runs that begin at a later block are whole runs."""
        return self._holds(("forks", batch.beside_image), lambda: self._forks(batch))

    def against_forks(self, batch: Batch) -> str:
        """Why runs that begin at a later block are no whole runs; empty if they are."""
        return "" if self.forks(batch) else self.flaws["forks", batch.beside_image]

    def answers(self, stem: Stem) -> bool:
        """Whether answers behind what is kept of the prompts are those of whole prompts."""
        return self._holds((answers_kind(stem.batch, stem.shared), stem.batch.beside_image), lambda: self._answers(stem))

    def require_answers(self, batch: Batch, plain: Float[Tensor, "query vocab"]) -> None:
        """Refuse answers behind prompts where the prompts would see them: of models without branches, which alone rest on that.

        Raises:
            ModelError: As said.
        """
        what = ("prompts before answers", batch.beside_image)
        if not self._holds(what, lambda: self._sees_no_answer(batch, plain)):
            raise ModelError(
                f"a model whose prompts see the answers behind them ({self.flaws[what]})",
                "one that reads from left to right",
                "score the prompt's last token, or generated answers",
            )

    def _sees_no_answer(self, batch: Batch, plain: Float[Tensor, "query vocab"]) -> None:
        found = run_tiles(self.engine, self._asked(batch, logits="answer"), {}).logits
        assert found is not None
        _require_agreement(found[:, :, 0], plain, "logits at the prompt's last token depend on what follows")

    def _holds(self, what: tuple[str, bool], check: Callable[[], None]) -> bool:
        """Whether it was found to hold, now or before."""
        if what not in self.flaws:
            self._tried(what, check)
        return not self.flaws[what]

    def _asked(self, batch: Batch, interventions: Sequence[Intervention] = (nothing,), **more: Any) -> Asked:
        return Asked(self.engine.cfg, batch, interventions, **more)

    def _tried(self, what: tuple[str, bool], make: Callable[[], Made]) -> Made | None:
        if self.flaws.get(what):
            return None
        try:
            made = make()
        except Exception as error:  # a foreign model or cache may fail in any way, and the table must say so
            if out_of_memory(error) or (isinstance(error, GuardlensError) and not isinstance(error, NumericsError)):
                raise
            self.flaws[what] = str(error) if isinstance(error, Disagreement) else self._failed(what[0], error)
            return None
        self.flaws.setdefault(what, "")
        return made

    def _failed(self, what: str, error: Exception) -> str:
        """That something can't be done, and behind which kinds of layers, where they are not all of attention."""
        kinds = sorted(set(getattr(self.engine.config, "layer_types", None) or ()) - ATTENTION)
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        behind = f" in a model with layers of {', '.join(kinds)}" if kinds else ""
        return f"{what} fail{behind} ({said})"

    def _stem(self, batch: Batch, prefix: Prefix | None) -> tuple[Stem, Float[Tensor, "query vocab"]]:
        engine = self.engine
        if prefix is None:
            stem, logits = stem_of(engine.decoder, batch, engine.last_logits)
        else:
            run, stem = run_tails(engine, self._asked(batch), {}, prefix.stem(batch), prefix.rest(batch), keep=True)
            logits = run.logits[0]  # type: ignore[index]
        branches, width = partial(self._branches, stem), batch.mask.shape[1]
        if width > self.widest.get(batch.beside_image, 0):  # a window or a chunk shows only in prompts that are longer than it
            _require_agreement(branches([nothing, nothing]), logits, "branches without an edit differ from the plain run")
            self.widest[batch.beside_image] = width
        if ("branches", batch.beside_image) not in self.flaws:
            edited, whole = branches([_push("last"), nothing, _push("last")]), self._whole(batch, [_push("last")])
            _require_agreement(edited[::2], whole[0], "an edited branch differs from an edited run")
            _require_agreement(edited[1:2], logits, "an edited branch changes the one beside it")
        return stem, logits

    def _branches(self, stem: Stem, interventions: Sequence[Intervention]) -> Float[Tensor, "lane query vocab"]:
        found = run_tails(self.engine, self._asked(stem.batch, interventions), {}, stem, stem.batch.select("last"))[0].logits
        assert found is not None
        return found

    def _whole(self, batch: Batch, interventions: Sequence[Intervention]) -> Float[Tensor, "lane query vocab"]:
        found = run_tiles(self.engine, self._asked(batch, interventions), {}).logits
        assert found is not None
        return found

    def _prefix(self, first: Batch, length: int, two: Callable[[], Batch]) -> Prefix:
        made = prefix_of(self.engine.decoder, first, length, self.engine.last_logits)
        if ("prefixes", first.beside_image) not in self.flaws:
            pair, site = two(), Site()
            shared = made.begins(pair)
            assert shared is not None
            asked = self._asked(pair, read=[site], logits=None)
            run, _ = run_tails(self.engine, asked, {}, shared.stem(pair), shared.rest(pair))
            whole = run_tiles(self.engine, asked, {}).reads[site]
            same = "prompts that continue from a common beginning have other states than on their own"
            _require_agreement(run.reads[site], whole[0], same)
        return made

    def _forks(self, batch: Batch) -> None:
        layers = self.engine.cfg.n_layers
        interventions = [_push("all", layers // 2), _push("all", layers - 1)]
        forked = run_forks(self.engine, self._asked(batch, interventions), {}).logits
        _require_agreement(forked, self._whole(batch, interventions), "a run that begins at a later block differs from a whole run")

    def _answers(self, stem: Stem) -> None:
        def logits(run: Callable[[Asked], Run]) -> list[Float[Tensor, "query vocab"]]:
            """Those that the first answers were chosen by."""
            taken: list[Tensor] = []

            def noted(ids: Tensor, scores: Tensor) -> Tensor:
                taken.append(scores.to(self.engine.hf.dtype))  # which `generate` widens
                return scores

            try:
                run(self._asked(stem.batch, new_tokens=3, generation={"logits_processor": [noted]}))
            except InterventionError as error:
                raise Disagreement(f"its own generate takes no logits processor ({error.found})") from None
            if not taken:
                raise Disagreement("its own generate hands no logits to a processor, so that answers can't be compared")
            return taken

        behind, whole = (
            logits(lambda asked: run_answers(self.engine, asked, {}, stem)),
            logits(lambda asked: run_tiles(self.engine, asked, {})),
        )
        for mine, expected in zip(behind, whole, strict=False):
            _require_agreement(mine[None], expected, "answers behind what is kept of the prompts differ from those of whole prompts")
            if not torch.equal(mine.argmax(-1), expected.argmax(-1)):
                break  # two tokens are equally likely up to rounding, and from here on the answers are others


def _require_agreement(mine: Tensor | None, expected: Tensor, what: str) -> None:
    if mine is None or not agree(mine, expected):
        raise Disagreement(what)


def _pushed(states: Float[Tensor, "state d"], context: Context) -> Float[Tensor, "state d"]:
    direction = torch.ones_like(states)
    direction[:, ::2] = -1
    return states + states.norm(dim=-1, keepdim=True) * direction / states.shape[-1] ** 0.5


def _push(positions: Positions, layer: int = 0) -> Intervention:
    """What shows whether an edited lane gives what an edited run gives: a push as long as the state itself."""
    return Intervention((Step(Custom(_pushed), Site(layers=(layer,), positions=positions)),))
