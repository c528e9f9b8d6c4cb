"""What a guard does at every layer and strength: `python -m analyses.layer_sweep --model organism`.

VLM-Guard's edit, the projection alone and placebos of equal norm, each at one layer at a time, for harmful and harmless requests of the
validation split, in text and beside images.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import pandas as pd

import guardlens as gl
from analyses.publication import Analysis, Settings, application, blanks_and_noise, clusters, figure, interval, markdown
from guardlens import defences, directions, plots
from guardlens.cli.demo import Subject
from guardlens.data.presentations import text_only
from guardlens.experiments.scores import refusal_logodds
from guardlens.experiments.sweeps import Sweep
from guardlens.results.intervals import mean_difference
from guardlens.results.tables import Frame, Table

STRENGTHS = (0.5, 1.0, 2.0)
PLACEBOS = 4
GUARD = "vlm_guard[replace]"
PROJECT = "project-out"
CURVES = {(GUARD, "edit"): GUARD, (PROJECT, "edit"): PROJECT, (GUARD, "placebo"): f"placebo of {GUARD}"}
"""Intervention and variant -> name of the curve."""


def measure(subject: Subject, settings: Settings) -> Table:
    """One row per presentation, intervention, variant, layer, strength and label: the mean change with its interval over queries."""
    model = subject.model
    ssd = directions.ssd(gl.collect(model, subject.pairs))
    interventions = {GUARD: defences.vlm_guard(ssd).intervention, PROJECT: defences.vlm_guard(ssd, reading="project").intervention}
    strengths, placebos = ((1.0, 2.0), 1) if settings.quick else (STRENGTHS, PLACEBOS)
    scored: dict[str, Any] = {"scores": (refusal_logodds,), "strengths": strengths, "placebos": placebos}
    shown = [text_only, *blanks_and_noise(subject, "grey", "white")]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "the intervention .* changes no score"
        )  # in text alone, where the guard's twin is the prompt itself
        effects = {each.name: gl.sweep(model, interventions, subject.validation, each, **scored) for each in shown}
    for name, effect in effects.items():
        effect.save(settings.out / "queries" / f"{name.replace(' ', '_')}.csv")
    frame: Frame = pd.concat([effect.summary().assign(presentation=name) for name, effect in effects.items()])
    frame = frame[["presentation", *frame.columns.drop("presentation")]]
    facts = {
        "best": {name: best(effect, subject) for name, effect in effects.items() if name != text_only.name},
        "layouts": {name: effect.facts["layout"] for name, effect in effects.items()},
        "interventions": effects[text_only.name].facts["interventions"],
        "unit": f"Δ {refusal_logodds.unit}",
        "placebos": placebos,
    }
    return Table({str(name): frame[name].to_numpy() for name in frame}, facts, model.provenance)


def best(effect: Sweep, subject: Subject) -> dict[str, Any]:
    """The layer that `Sweep.best` chooses, and how much more it does for harmful requests than the next one (paired)."""
    (first,) = effect.best(1, GUARD)
    (second,) = set(effect.best(2, GUARD)) - {first}
    harmful = [query for query in subject.validation if query.label == "harmful"]
    frame = effect.frame.query("intervention == @GUARD and variant == 'edit' and label == 'harmful'")
    change = (frame["value"] - frame["base"]).groupby([frame["layer"], frame["query"]]).mean()
    ids = [query.id for query in harmful]
    ahead = mean_difference(change[second][ids].to_numpy(), change[first][ids].to_numpy(), clusters(harmful))
    return {"layer": first, "next": second, "ahead": ahead.value, "low": ahead.low, "high": ahead.high}


def draw(table: Table) -> Mapping[str, Any]:
    """A heat map of the guard for every presentation; and curves of guard, projection and placebo at strength 1, with intervals."""
    frame = table.frame
    guard = frame[(frame["intervention"] == GUARD) & (frame["variant"] == "edit")]
    maps = plots.effect_maps(guard.assign(intervention=guard["presentation"], value=guard["change"]), unit=table.facts["unit"])
    return {"layer_sweep": maps[0, 0].figure, "layer_sweep_curves": _curves(frame, table.facts["unit"])}


def _curves(frame: Frame, unit: str) -> Any:
    names = [CURVES.get(key) for key in zip(frame["intervention"], frame["variant"], strict=True)]
    rows = frame.assign(run=names, metric=frame["presentation"] + " · " + frame["label"], value=frame["change"])
    rows = rows[(rows["strength"] == 1.0) & rows["run"].notna()]
    return plots.layer_curves(rows, unit=unit.replace("refusal ", "refusal\n"), columns=2)[0].figure


def tell(table: Table) -> list[str]:
    """The page."""
    frame, facts = table.frame, table.facts
    n = frame.groupby("label", sort=False)["n"].first()
    return [
        "What a guard does at every layer and strength",
        f"Mean change of the refusal log-odds of {n['harmful']} harmful and {n['harmless']} harmless validation requests when the last "
        "token of the prompt is edited at one layer at a time. `vlm_guard[replace]`: VLM-Guard, rank 1, its gate at the midpoint between "
        "the classes. `project-out`: its projection alone, for every request. Placebo: the same displacements in random directions (draws: "
        f"{facts['placebos']}). Intervals of 95 %, a bootstrap over requests; those of a cluster go together. In text the guard puts back "
        "the state that is there, and changes nothing.",
        figure("layer_sweep", "The guard at every layer and strength, by presentation (mean change)."),
        figure("layer_sweep_curves", "Strength 1: the guard, the projection alone and the placebo, with 95 % intervals."),
        "## The best layer",
        "By the rule of `Sweep.best`: the change for harmful requests, less any rise for harmless ones, averaged over the strengths. "
        "The layer is chosen on the requests that are shown. Changes are those at strength 1. *Ahead*: how much more the best layer does "
        "for harmful requests than the next one (paired).",
        markdown(pd.DataFrame([_best_row(frame, name, found) for name, found in facts["best"].items()])),
        "## Beside the grey image, at strength 1",
        markdown(_by_layer(frame)),
        "## What ran",
        "; ".join(f"{name}: {', '.join(layout)}" for name, layout in facts["layouts"].items()) + ". `branch`: all cells of the map ride in "
        "one forward as copies of the last token; `tile`: as copies of the batch.",
    ]


def _best_row(frame: Frame, presentation: str, found: Mapping[str, Any]) -> dict[str, Any]:
    cells = frame.query("presentation == @presentation and intervention == @GUARD and strength == 1.0 and layer == @found['layer']")
    shown = {(row.variant, row.label): interval(row.change, row.low, row.high, "+.2f") for row in cells.itertuples()}
    return {
        "presentation": presentation,
        "best layer": found["layer"],
        "harmful": shown["edit", "harmful"],
        "harmless": shown["edit", "harmless"],
        "placebo, harmful": shown["placebo", "harmful"],
        "next layer": found["next"],
        "ahead": interval(found["ahead"], found["low"], found["high"], "+.2f"),
    }


def _by_layer(frame: Frame) -> Frame:
    rows = frame[(frame["presentation"] == "blank grey") & (frame["strength"] == 1.0)]
    rows = rows.assign(shown=[interval(row.change, row.low, row.high, "+.2f") for row in rows.itertuples()])
    named = [CURVES.get(key) for key in zip(rows["intervention"], rows["variant"], strict=True)]
    rows = rows.assign(column=[f"{name}, {label}" for name, label in zip(named, rows["label"], strict=True)])[pd.notna(named)]
    return rows.pivot(index="layer", columns="column", values="shown")[list(dict.fromkeys(rows["column"]))].reset_index()


LAYER_SWEEP = Analysis("layer_sweep", measure, draw, tell, {})
app = application(LAYER_SWEEP)

if __name__ == "__main__":
    app()
