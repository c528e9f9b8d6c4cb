"""Where harmful and harmless requests are separable, LLM against VLM: `python -m analyses.separability --model organism`.

Measured for each layer and presentation: separability along the safety direction (AUROC, d', the accuracy of the LLM's own threshold) and
by a linear probe (held out, and transferred from the LLM), and how far an image moves a request along the direction.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pandas as pd

import guardlens as gl
from analyses.publication import Analysis, Settings, application, figure, interval, markdown
from guardlens import directions, plots
from guardlens.cli.demo import Subject
from guardlens.cli.demo_report import SURFACE
from guardlens.experiments.comparison import Comparison

METRICS = ("auroc", "d_prime", "midpoint_accuracy", "probe", "transfer", "drift_along")
LEFT_OUT = ("blank black",)


def measure(subject: Subject, settings: Settings) -> Comparison:
    """One row per metric, run and layer (see `Comparison`). It uses the test split, since nothing is chosen by it."""
    model = subject.model
    ssd = directions.ssd(gl.collect(model, subject.pairs))
    llm = gl.collect(model.llm, subject.test)
    seen = [gl.collect(model, subject.test, image) for image in subject.images if image.name not in LEFT_OUT]
    gap = gl.compare(llm, seen, ssd, draws=200 if settings.quick else 2000)
    counted = {f"n_{label}": sum(query.label == label for query in subject.test) for label in ("harmful", "harmless")}
    return dataclasses.replace(gap, facts={**gap.facts, **counted})


def draw(gap: Comparison) -> Mapping[str, Any]:
    """A panel per metric, with a line and its interval per run."""
    return {"separability": gap.plot(METRICS)[0].figure}


def tell(gap: Comparison) -> list[str]:
    """The page."""
    facts, words = gap.facts, interval(*gap.facts["bag_of_words"])
    return [
        "Where harmful and harmless requests are separable",
        f"{facts['n_harmful']} harmful and {facts['n_harmless']} harmless requests of the test split, which have no part in the direction: "
        "that is made of training pairs in text. State: the residual stream after each layer at the last token of the prompt. Intervals of "
        f"95 %, a bootstrap over {facts['n_groups']} groups of requests that stand or fall together, the same for all layers and runs.",
        figure("separability", "Separability by layer, the LLM and the VLM beside each image, with 95 % intervals."),
        "AUROC and d′ rank requests along the direction, whatever the threshold; the accuracy at the midpoint is what the LLM's own "
        "threshold makes of them. The probe is trained and tested in its own run, on held-out groups; *transferred* is the LLM's probe on "
        "the run. Drift is how far an image moves a request along the direction, in mean norms of the LLM's state. Where AUROC and the "
        "probe stay and the accuracy at the midpoint falls, the image shifts requests past the threshold without mixing the classes.",
        SURFACE.format(words=words),
        "## The last layer",
        markdown(_last_layer(gap)),
        "## Change from the LLM, by layer",
        "Paired: the same requests, the same resamples.",
        *(f"### {plots.TITLES[metric]}\n\n{markdown(_changes(gap, metric))}" for metric in METRICS[:-1]),
    ]


def _last_layer(gap: Comparison) -> pd.DataFrame:
    rows = gap.where(layer=gap.frame["layer"].max()).frame
    rows = rows[rows["metric"].isin(METRICS)]
    rows = rows.assign(shown=[interval(row.value, row.low, row.high) for row in rows.itertuples()])
    wide = rows.pivot(index="run", columns="metric", values="shown").loc[gap.facts["runs"], list(METRICS)].fillna("")
    return wide.rename(columns=plots.TITLES).reset_index()


def _changes(gap: Comparison, metric: str) -> pd.DataFrame:
    rows = gap.where(metric=metric).frame
    rows = rows[rows["change"].notna()]
    rows = rows.assign(shown=[interval(row.change, row.change_low, row.change_high, "+.2f") for row in rows.itertuples()])
    return rows.pivot(index="layer", columns="run", values="shown")[gap.facts["runs"][1:]].reset_index()


SEPARABILITY = Analysis("separability", measure, draw, tell, {})
app = application(SEPARABILITY)

if __name__ == "__main__":
    app()
