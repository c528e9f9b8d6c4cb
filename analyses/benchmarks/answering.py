"""What guarded answers cost, in units of transformers' own `generate`."""

from collections.abc import Iterator

from analyses.benchmarks import subjects, timing, ways
from analyses.benchmarks.rows import Plan, Row, row


def guarded_layers(plan: Plan) -> list[int]:
    """Three of them."""
    depth = plan.size.layers
    return sorted({depth // 4, depth // 2, max(0, depth - 2)})


def generation(plan: Plan) -> Iterator[Row]:
    """VLM-Guard at three layers, its text twin included: one answer, and several beside one blank image."""
    subject = plan.model()
    ssd, layers = subjects.directions(subject), guarded_layers(plan)
    guard, vectors = ways.guard(subject, ssd, layers), subjects.pushes(subject, ssd, 2.0)
    one, several = (subject.batch(subjects.queries(number), subjects.blank(plan.size)) for number in (1, plan.queries))
    seconds = timing.alternate(
        {
            "plain": lambda: ways.plain_generate(subject, one, plan.new_tokens),
            "guarded": lambda: ways.guarded_generate(subject, one, guard, plan.new_tokens),
            "raw hooks": lambda: ways.hooked_generate(subject, one, vectors, layers, plan.new_tokens),
            "plain several": lambda: ways.plain_generate(subject, several, plan.new_tokens),
            "guarded several": lambda: ways.guarded_generate(subject, several, guard, plan.new_tokens),
            "shared several": lambda: ways.guarded_generate(subject, several, guard, plan.new_tokens, shared=True),
        },
        plan.few,
    )
    unit = f"plain generate, {plan.new_tokens} tokens"
    yield row("generate_guarded", "guardlens, 3 layers, twin included", timing.ratio(seconds, "guarded", "plain"), "<= 1.05", unit)
    yield row("generate_guarded", "raw hooks, 3 layers, a vector added, no twin", timing.ratio(seconds, "raw hooks", "plain"), unit=unit)
    for name, way in (("shared several", "behind a shared prefix"), ("guarded several", "whole prompts")):
        found = timing.ratio(seconds, name, "plain several")
        yield row("generate_shared", f"guardlens, {plan.queries} answers beside one blank image, {way}", found, unit=f"{unit} each")
