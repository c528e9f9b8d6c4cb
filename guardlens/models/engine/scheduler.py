"""Which strategy runs a request. The choice is made here alone, so a sweep that groups interventions and the run of a group agree.

The rule: branches, if the ends of the prompts that they copy are at most half of the prompts; else forks, if the layers that they skip
add up to more than the one run that they begin with; else tiles. Branches begin late if the layers that this skips add up to more than
one branch. `docs/explanation/sweeps.md` has the reasons.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice

from jaxtyping import Float
from torch import Tensor

from guardlens.errors import ArgumentError, InterventionError, ModelError, one_of, quoted
from guardlens.interventions import Intervention, nothing
from guardlens.models.engine import limits
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.held_states import Source, held_for
from guardlens.models.engine.kv_cache import KVCache, Prefill, Prefix, cache_prefix, cache_prompts
from guardlens.models.engine.out_of_memory import OutOfMemory, at_work, out_of_memory
from guardlens.models.engine.request import RunRequest
from guardlens.models.engine.run import Run, checked
from guardlens.models.engine.selftests import SelfTests
from guardlens.models.engine.strategies import ANSWERS, BRANCHES, FORKS, LATE_BRANCHES, TILES, Strategy
from guardlens.models.engine.strategies.answers import answers_case
from guardlens.models.engine.strategies.branches import check_prefix, check_unedited, continued, grown

LAYOUTS = ("auto", "branch", "fork", "tile")
"""What `HookedModel.run` takes as `layout`."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and why it is not branches; empty if it is."""

    strategy: Strategy
    why: str = ""


def run(tests: SelfTests, request: RunRequest, source: Source, prefill: Prefill | None, layout: str) -> Run:
    """Run a request with the strategy that suits it, or with the one that was asked for.

    Args:
        tests: The model, and what is known of it.
        request: The interventions, and what to return.
        source: Says where the held states of other presentations come from.
        prefill: The prompts, if they were computed before.
        layout: One of `LAYOUTS`.

    Raises:
        ArgumentError: The layout is unknown, generated answers have one, or answers are scored that no prefill has.
        InterventionError: The strategy that was asked for can't run the request.
    """
    _require_layout(request, layout)
    _require_answered(request, prefill)
    if prefill is not None:
        _require_scorable(tests, prefill)
    if request.new_tokens:
        return _generate(tests, request, source, prefill)
    if prefill is None and request.lanes == 1 and layout == "auto":
        return _run_alone(tests, request, source)
    known = prefill
    if known is None and layout in ("auto", "branch") and not _unsuited_for_branches(tests, request):
        known = fill(tests, request.batch)
    choice = choose(tests, request, known, layout)
    made = choice.strategy.run(tests.engine, request, held_for(request, source, prefill), known)
    return replace(made, layout=choice.strategy.name, why=choice.why)


def choose(tests: SelfTests, request: RunRequest, prefill: Prefill | None, layout: str = "auto") -> Choice:
    """The strategy for a request.

    Raises:
        InterventionError: The strategy that was asked for can't run the request.
    """
    if layout == "tile":
        return Choice(TILES, "tiles were asked for")
    why = "forks were asked for"
    if layout != "fork":
        why = _unsuited_for_branches(tests, request) or ("" if prefill is None else prefill.flaw)
    if not why:
        return Choice(_branches(tests, request, prefill))
    if layout == "branch":
        raise InterventionError(f"Interventions can't run as branches: {why}.", next_step='choose layout="auto"')
    if layout == "fork" or FORKS.cost(request) < TILES.cost(request):
        flaw = FORKS.unsuited(request) or tests.flaw_of(FORKS, "forks", request.batch)
        if not flaw:
            return Choice(FORKS, why)
        if layout == "fork":
            raise InterventionError(f"Interventions can't run as forks: {flaw}.", next_step='choose layout="auto"')
    return Choice(TILES, why)


def run_each(tests: SelfTests, request: RunRequest, source: Source, prefill: Prefill) -> list[Run]:
    """Run a request in parts, whose lanes come in their order and fit in one run on these prompts.

    Where memory does not hold a part, its lanes are halved, and later parts are no larger. No logits are handed over twice.
    """
    runs: list[Run] = []
    most = request.lanes
    first = 0
    for part in parts(tests, request, prefill):
        rest = part.interventions
        while rest:
            lanes = rest[:most]
            counted = _Counted(part.take)
            try:
                runs.append(run(tests, replace(part, interventions=lanes, take=counted, first_lane=first), source, prefill, "auto"))
            except RuntimeError as error:
                if len(lanes) == 1 or isinstance(error, OutOfMemory) or not out_of_memory(error):
                    raise
                most = len(lanes) // 2
            first += counted.number
            rest = rest[counted.number :]
    return runs


@dataclass
class _Counted:
    """A function that takes logits, with the number of its calls."""

    take: Callable[[Tensor], None] | None
    number: int = 0

    def __call__(self, logits: Tensor) -> None:
        assert self.take is not None
        with at_work("the function", self.take):
            self.take(logits)
        self.number += 1


def parts(tests: SelfTests, request: RunRequest, prefill: Prefill) -> Iterator[RunRequest]:
    """The request in parts, each of as many lanes as fit in one run."""

    def against_branches(lane: Intervention) -> str:
        return _unsuited_for_branches(tests, replace(request, interventions=[lane])) or prefill.flaw

    for _, alike in groupby(request.interventions, against_branches):
        whole = replace(request, interventions=list(alike))
        size = choose(tests, whole, prefill).strategy.lanes_per_forward(whole, prefill)
        rest = iter(whole.interventions)
        while lanes := list(islice(rest, size)):
            yield replace(request, interventions=lanes)


def fill(tests: SelfTests, batch: Batch) -> Prefill:
    """Compute prompts. If branches from them fail their self-test, `Prefill.flaw` says why, and its KV cache is None."""
    beside_image = batch.beside_image
    flaw = "the batch is padded on the right"
    if not batch.padded_right:
        made = tests.attempt("branches", beside_image, lambda: _tested_cache(tests, batch))
        if made is not None:
            cache, logits = made
            return Prefill(cache.batch, cache, checked(logits[None], batch)[0])
        flaw = tests.flaw("branches", beside_image)
    plain = TILES.run(tests.engine, RunRequest(tests.engine.cfg, batch, [nothing]), {}).logits
    assert plain is not None
    return Prefill(batch.after(None), None, plain[0], flaw=flaw)


def share(tests: SelfTests, batch: Batch, prompts: Callable[[int], Batch]) -> Prefix | None:
    """Compute what the prompts of a batch begin with; None if it saves too little, or if prompts can't continue from it in this model.

    Args:
        tests: The model, and what is known of it.
        batch: The prompts.
        prompts: Makes a batch of the first few of them.
    """
    engine = tests.engine
    length = 0 if batch.padded_right or engine.stretches else batch.common_start
    has_image_after = bool((batch.image & (batch.mask.cumsum(1) > length)).any())  # images can't run after a KV cache
    if has_image_after or (len(batch.queries) - 1) * length < limits.PREFIX_WORTH_TOKENS:
        return None
    first = prompts(1)

    def make() -> Prefix:
        prefix = cache_prefix(engine.decoder, first, length, engine.last_logits)
        if not tests.is_tested("prefixes", first.beside_image):
            check_prefix(engine, prefix, prompts(2))
        return prefix

    return tests.attempt("prefixes", first.beside_image, make)


def _require_layout(request: RunRequest, layout: str) -> None:
    if not one_of(layout, LAYOUTS):
        raise ArgumentError(f"the layout {quoted(layout)}", f"one of {', '.join(LAYOUTS)}", "leave it out: the cheapest is chosen")
    if request.new_tokens and layout != "auto":
        raise ArgumentError(f"the layout {quoted(layout)} of generated answers", "auto for answers", "leave it out: the cheapest is chosen")


def _require_answered(request: RunRequest, prefill: Prefill | None) -> None:
    """Refuse to score answers other than those of a prefill."""
    batch = request.batch
    is_scored = request.logits == "answer" or batch.answered
    can_be_scored = prefill is not None and batch.answered and not request.new_tokens
    if is_scored and not can_be_scored:
        raise ArgumentError("an answer behind no prefilled prompts", "prefilled prompts", "say model.prefill(batch).answering(tokens)")
    ids = batch.inputs["input_ids"][:, batch.mask.shape[1] - batch.answered :]
    if batch.answered and int(ids.max()) >= request.cfg.d_vocab:
        found = f"the token {int(ids.max())} in an answer"
        raise ArgumentError(found, f"ids below {request.cfg.d_vocab}", "hand in ids of this model's tokenizer")


def _require_scorable(tests: SelfTests, prefill: Prefill) -> None:
    """Refuse to score answers in a model whose prompts see the answers after them. Branches rule that out; tiles do not.

    Raises:
        ModelError: The logits at the prompt's last token depend on the answer.
    """
    if not prefill.batch.answered or prefill.cache is not None:
        return
    flaw = tests.flaw_of(TILES, "prompts before answers", prefill.batch, prefill)
    if flaw:
        raise ModelError(
            f"a model whose prompts see the answers behind them ({flaw})",
            "one that reads from left to right",
            "score the prompt's last token, or generated answers",
        )


def _prefix_of(batch: Batch) -> Prefix | None:
    """What is cached of the beginning of these prompts."""
    return None if batch.prefix is None else batch.prefix.begins(batch)


def _unsuited_for_branches(tests: SelfTests, request: RunRequest) -> str:
    if unsuited := BRANCHES.unsuited(request):
        return unsuited
    if request.batch.answered and tests.engine.stretches:
        return "an answer may stretch what positions mean"
    return tests.flaw("branches", request.batch.beside_image)


def _branches(tests: SelfTests, request: RunRequest, prefill: Prefill | None) -> Strategy:
    """Branches that begin late, if that saves work and gives the same numbers in this model."""
    is_late = not LATE_BRANCHES.unsuited(request) and not tests.flaw_of(LATE_BRANCHES, "late branches", request.batch, prefill)
    return LATE_BRANCHES if is_late else BRANCHES


def _run_alone(tests: SelfTests, request: RunRequest, source: Source) -> Run:
    """A plain run, which continues from a prefix if it can."""
    held = held_for(request, source, None)
    prefix = _prefix_of(request.batch)
    if prefix is not None and request.continues_from(prefix.rest(request.batch)):
        return continued(tests.engine, request, held, prefix.cache(request.batch), prefix.rest(request.batch))
    return TILES.run(tests.engine, request, held)


def _generate(tests: SelfTests, request: RunRequest, source: Source, prefill: Prefill | None) -> Run:
    """Answers, which continue from the prompts' KV cache if they can."""
    batch = request.batch
    is_hopeless = prefill is None and tests.flaw(answers_case(batch, shares_prefix=True), batch.beside_image)
    if (prefill or _prefix_of(batch)) and not ANSWERS.unsuited(request) and not is_hopeless:
        known = prefill or fill(tests, batch)
        if known.cache is not None:
            case = answers_case(batch, known.cache.shares_prefix)
            if not tests.flaw_of(ANSWERS, case, batch, known):
                made = ANSWERS.run(tests.engine, request, held_for(request, source, prefill), known)
                return replace(made, layout=ANSWERS.name)
    made = TILES.run(tests.engine, request, held_for(request, source, prefill))
    return replace(made, why="answers are generated" if request.lanes > 1 else "")


def _tested_cache(tests: SelfTests, batch: Batch) -> tuple[KVCache, Float[Tensor, "query vocab"]]:
    """The KV cache of prompts and their logits, after the self-tests that these prompts call for."""
    engine = tests.engine
    prefix = _prefix_of(batch)
    batch = batch.after(None)  # whole prompts must not keep the prefix in memory
    cache, logits = cache_prompts(engine.decoder, batch, engine.last_logits) if prefix is None else grown(engine, batch, prefix)
    prefill = Prefill(batch, cache, logits)
    width = batch.mask.shape[1]
    if width > tests.widest.get(batch.beside_image, 0):
        check_unedited(engine, prefill)
        tests.widest[batch.beside_image] = width
    if not tests.is_tested("branches", batch.beside_image):
        BRANCHES.self_test(engine, batch, prefill)
    return cache, logits
