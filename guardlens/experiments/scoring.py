"""`Scorer`: what scores say of runs with interventions, beside the unedited run. `sweep` and `activation_patching` rest on it.

All interventions are scored on the same prefilled prompts. Scores of the next token share their forward passes. Each score of an answer
needs its own, since the answer is appended to the prompts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query
from guardlens.errors import ArgumentError, NumericsError, is_several, require_type, type_of
from guardlens.experiments.scores import AgainstBase, AnswerScore, Score
from guardlens.interventions.intervention import Intervention
from guardlens.models.batching import in_query_order
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.out_of_memory import at_work
from guardlens.models.engine.run import Run
from guardlens.models.hooked_model import HookedModel
from guardlens.models.prompt_cache import PromptCache, over_prefills
from guardlens.results.progress import track

AnyScore = Score | AnswerScore
"""A score of the next token, or of an answer."""

Scores = Float[Tensor, "score run query"]


def require_scores(scores: Any) -> None:
    """Refuse anything that is not a list of scores with names of their own.

    Raises:
        ArgumentError: There are no scores, something else is among them, or two have one name.
    """
    if isinstance(scores, Score) or not isinstance(scores, Sequence) or not scores:
        raise ArgumentError("no scores" if is_several(scores) else type_of(scores), "scores in a list", "say scores=[scores.kl]")
    for score in scores:
        if isinstance(score, type):
            raise ArgumentError(type_of(score), "a score", f"make one of it: {score.__name__}()")
        require_type(score, Score, ArgumentError, "pass scores such as [scores.kl, scores.AnswerKL()]")
        require_type(score.name, str, ArgumentError, "name each score by a text")
    names = [score.name for score in scores]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ArgumentError(f"two scores of one name, {repeated!r}", "a name for each", "say scores.AnswerLogProb(text, name=...)")


@dataclass(frozen=True, eq=False)
class Measured:
    """A score beside one unedited run: a function of logits.

    Attributes:
        score: The score.
        base: The logits of the unedited run.
        beside: What else the score takes: the tokenizer, or the answer.
    """

    score: AnyScore
    base: Float[Tensor, "query ..."]
    beside: Any

    def __call__(self, logits: Float[Tensor, "query ..."]) -> Float[Tensor, "query"]:
        """The values of the score as floating-point numbers.

        Raises:
            ArgumentError: The score gives something else than one number per query.
        """
        with at_work("the score", self.score):
            values = self._of_logits(logits)
        shape = (len(logits),)
        if not isinstance(values, Tensor) or values.shape != shape or values.is_complex():
            found = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type_of(values)
            expected = f"a tensor of one number per query, of shape {shape}"
            raise ArgumentError(f"{found} from the score {self.score.name!r}", expected, "score each row of the logits")
        return values.to(torch.promote_types(values.dtype, torch.float32)).clone()  # a view would keep all logits in memory

    @cached_property
    def _of_logits(self) -> Callable[[Tensor], Any]:
        """The score as a function of edited logits. One without `against` gets copies, which it may write to."""
        if _has_constants(self.score):
            return self.score.against(self.base, self.beside)
        return lambda logits: self.score(logits.clone(), self.base.clone(), self.beside)


@dataclass
class Scorer:
    """Scores runs of prompts: one with each intervention, the unedited one, and the donor's if there is a donor, in this order.

    Every run is scored against the unedited one.

    Attributes:
        model: The model.
        interventions: The interventions.
        scores: The scores.
        donor: A presentation in which the same queries are scored, too, unedited.
        layouts: The layouts that ran so far, and why not as branches.
    """

    model: HookedModel
    interventions: Sequence[Intervention]
    scores: Sequence[AnyScore]
    donor: Presentation | None = None
    layouts: set[str] = field(default_factory=set)

    @property
    def units(self) -> dict[str, str]:
        """Name -> unit of each score."""
        return {score.name: score.unit for score in self.scores}

    def over(self, prompts: Sequence[Query] | PromptCache, presentation: Presentation, title: str) -> Scores:
        """Score all prompts, batch by batch under a progress bar."""
        results = over_prefills(self.model, prompts, presentation, self.batch)
        return in_query_order(track(results, len(prompts), title), len(prompts), axis=2)

    def batch(self, prefill: Prefill) -> Scores:
        """Score one batch of prompts.

        Raises:
            ArgumentError: A score gives something else than one number per query.
            NumericsError: A score is nan or infinite.
        """
        donors = [] if self.donor is None else [self.model.source(prefill.batch, self.donor)]
        found = self._of_next_token(prefill, donors)
        for score in self.scores:
            if isinstance(score, AnswerScore):
                found[score.name] = self._of_answer(score, prefill, donors)
        values = torch.stack([found[score.name] for score in self.scores]).double().cpu()
        self._require_finite(values, prefill.batch)
        return values

    def _of_next_token(self, prefill: Prefill, donors: Sequence[tuple[HookedModel, Batch]]) -> dict[str, Float[Tensor, "run query"]]:
        """Name -> values of the scores of the prompt's last token, which share their runs."""
        scores = [score for score in self.scores if not isinstance(score, AnswerScore)]
        if not scores:
            return {}
        base = prefill.logits
        unedited = (_first(donor.run(batch)).to(base.device) for donor, batch in donors)
        measured = [Measured(score, base, self.model.tokenizer) for score in scores]
        return self._over_runs(prefill, measured, unedited)

    def _of_answer(self, score: AnswerScore, prefill: Prefill, donors: Sequence[tuple[HookedModel, Batch]]) -> Float[Tensor, "run query"]:
        """The values of a score along an answer."""
        answer = score.answer(self.model, prefill)
        answered = prefill.answering(answer.tokens)
        base = self._unedited(self.model, answered)
        unedited = (self._unedited(donor, donor.prefill(batch).answering(answer.tokens)).to(base.device) for donor, batch in donors)
        return self._over_runs(answered, [Measured(score, base, answer)], unedited)[score.name]

    @staticmethod
    def _unedited(model: HookedModel, answered: Prefill) -> Float[Tensor, "query token vocab"]:
        return _first(model.run(answered, logits="answer"))

    def _over_runs(
        self, prefill: Prefill, measured: Sequence[Measured], donors: Iterable[Float[Tensor, "query ..."]]
    ) -> dict[str, Float[Tensor, "run query"]]:
        """Name -> values: of the runs with each intervention, of the unedited one, and of the donors."""
        values: dict[str, list[Tensor]] = {each.score.name: [] for each in measured}

        def take(logits: Float[Tensor, "query ..."]) -> None:
            for each in measured:
                values[each.score.name].append(each(logits))

        for run in self.model.run_each(prefill, self.interventions, take):
            self.layouts.add(f"{run.layout}: {run.why}" if run.why else run.layout)
        for unedited in (measured[0].base, *donors):
            take(unedited)
        return {name: torch.stack(of_runs) for name, of_runs in values.items()}

    def _require_finite(self, values: Scores, batch: Batch) -> None:
        """Refuse scores that are nan or infinite.

        Raises:
            NumericsError: Score, query and intervention are named.
        """
        if values.isfinite().all():
            return
        score, run, query = (~values.isfinite()).nonzero()[0].tolist()
        under = repr(self.interventions[run]) if run < len(self.interventions) else "a run without an intervention"
        name = self.scores[score].name
        raise NumericsError(
            f"{values[score, run, query].item()} as the score {name!r} of query {batch.queries[query].id!r} under {under}",
            "a finite number for each query",
            "leave this query or score out, or mend the score",
        )


def _first(run: Run) -> Float[Tensor, "query ..."]:
    """The logits of a run's only lane."""
    assert run.logits is not None
    return run.logits[0]


def _has_constants(score: Any) -> TypeGuard[AgainstBase]:
    """Whether to ask `against` of a score: its class has that method, and no subclass has replaced `__call__` alone."""
    owners = {name: next((kind for kind in type(score).__mro__ if name in vars(kind)), object) for name in ("against", "__call__")}
    return callable(getattr(score, "against", None)) and issubclass(owners["against"], owners["__call__"])
