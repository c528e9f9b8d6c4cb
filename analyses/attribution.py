"""Which parts write the safety direction, and which of them bring refusals back: `python -m analyses.attribution --model organism`.

Two views of the same loss, on the validation split. Attribution splits the coordinate of a request along the direction into the
contributions of heads and MLPs, in text and beside an image. Patching replaces the state of one part at a time in the run beside the image
by its state in the run on text, and measures the refusal log-odds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import guardlens as gl
from analyses.publication import Analysis, Settings, application, blanks_and_noise, clusters, figure, guard_layer, interval, markdown
from guardlens import directions, plots
from guardlens.cli.demo import Subject
from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query
from guardlens.errors import ModelError, SiteError
from guardlens.experiments.attribution import Attribution
from guardlens.experiments.patching import Patching
from guardlens.experiments.scores import refusal_logodds
from guardlens.results.intervals import bootstrap, mean_difference
from guardlens.results.plots import components as component_plots
from guardlens.results.plots import style as figure_style
from guardlens.results.tables import Frame, Table

HOOKS = {"z": "head", "mlp_out": "mlp", "attn_out": "attn_out", "resid_post": "resid_post"}
"""Hook that is patched -> its name in the table."""

PART = ["component", "block", "head"]
WRITTEN = ["value", "low", "high", "change", "change_low", "change_high"]
UNIT = refusal_logodds.unit


def measure(subject: Subject, settings: Settings) -> Table:
    """One row per presentation, label and part: its contribution, the change of it from text, and the effect of patching it."""
    model = subject.model
    ssd = directions.ssd(gl.collect(model, subject.pairs))
    layer = guard_layer(subject, ssd)
    images = blanks_and_noise(subject, "grey")
    written = gl.attribute(model, ssd, subject.validation, images, layer=layer)
    patched = {
        image.name: gl.activation_patching(model, subject.validation, image, hooks=list(HOOKS), scores=(refusal_logodds,))
        for image in images
    }
    frame = pd.concat([_merged(written, name, found) for name, found in patched.items()], ignore_index=True)
    harmful = [query for query in subject.validation if query.label == "harmful"]
    facts = {
        "layer": layer,
        "directions": ssd.method,
        "n_harmful": len(harmful),
        "agreement": {name: _agreement(written, found, name, harmful, layer, settings) for name, found in patched.items()},
        "sources": _sources(subject, ssd, images, layer, settings),
        "layouts": {name: found.facts["layout"] for name, found in patched.items()},
    }
    return Table({str(name): frame[name].to_numpy() for name in frame}, facts, model.provenance)


def _merged(written: Attribution, presentation: str, patched: Patching) -> Frame:
    """Join both summaries. Parts that only one of them has are nan in the columns of the other."""
    rows = written.summary().query("direction == 1")
    llm = rows[rows["presentation"] != presentation].query("presentation == @written.columns['presentation'][0]")
    text = llm.set_index(["label", *PART])[["value", "low", "high"]].add_prefix("text_")
    shown = rows[rows["presentation"] == presentation].set_index(["label", *PART])[[*WRITTEN, "n"]]
    other = patched.summary()
    other = other.assign(component=other["hook"].map(HOOKS)).rename(columns={"layer": "block"}).set_index(["label", *PART])
    names = {"change": "patched", "low": "patched_low", "high": "patched_high", "n": "n_patched"}
    kept = [*names, "recovered", "recovered_low", "recovered_high"]
    both = text.join(shown, how="outer").join(other[kept].rename(columns=names), how="outer")
    both["n"] = both["n"].fillna(both.pop("n_patched")).astype(int)
    return both.reset_index().assign(presentation=presentation)[["presentation", "label", *PART, *both.columns]]


def _agreement(
    written: Attribution, patched: Patching, presentation: str, harmful: Sequence[Query], layer: int, settings: Settings
) -> dict[str, float]:
    """The rank correlation, over heads and MLPs up to the layer, of the coordinate that a part loses beside the image and the refusal
    log-odds that patching it restores."""
    ids = [query.id for query in harmful]
    of_parts = written.frame.query("direction == 1 and component in ('head', 'mlp')")
    wide = of_parts.pivot(index="query", columns=["presentation", *PART], values="value").loc[ids]
    lost = wide[written.columns["presentation"][0]] - wide[presentation]
    cells = patched.frame.query("hook in ('z', 'mlp_out') and layer <= @layer")
    cells = cells.assign(component=cells["hook"].map(HOOKS), block=cells["layer"], gained=cells["value"] - cells["base"])
    gained = cells.pivot(index="query", columns=PART, values="gained").loc[ids]
    parts = lost.columns.intersection(gained.columns)
    columns = [values[parts].to_numpy() for values in (lost, gained)]

    def correlation(chosen: np.ndarray) -> float:
        ranks = [pd.Series(values[chosen].mean(axis=0)).rank().to_numpy() for values in columns]
        return float(np.corrcoef(ranks)[0, 1])

    found = bootstrap(correlation, len(ids), clusters(harmful), draws=200 if settings.quick else 1000)
    return {"correlation": found.value, "low": found.low, "high": found.high, "parts": len(parts)}


def _sources(subject: Subject, ssd: Any, images: Sequence[Presentation], layer: int, settings: Settings) -> Any:
    """The change from text among harmful requests, by kind of part and, for heads, by the tokens that they attend to."""
    try:
        split = gl.attribute(subject.model, ssd, subject.validation, images, layer=layer, by_token_source=True, batch_size=16)
    except (ModelError, SiteError) as error:
        return f"Not told apart by source: found {error.found}."
    rows = split.frame.query("direction == 1 and label == 'harmful'")
    kind = rows["component"].where(rows["component"] != "head", "heads, from " + rows["token_source"] + " tokens")
    sums = rows.assign(kind=kind).pivot_table(index=["query", "cluster"], columns=["presentation", "kind"], values="value", aggfunc="sum")
    llm, groups = sums[split.columns["presentation"][0]], sums.index.get_level_values("cluster").to_numpy()
    found = []
    for image in images:
        for name in sums[image.name]:
            change = mean_difference(llm.get(name, 0.0 * llm.iloc[:, 0]).to_numpy(), sums[image.name][name].to_numpy(), groups)
            found.append({"presentation": image.name, "part": str(name)} | change.columns("change"))
    return found


def draw(table: Table) -> Mapping[str, Any]:
    """For harmful requests: the contributions of parts, the effect of patching layers, and both views against each other."""
    frame = table.frame
    rows = frame[(frame["presentation"] == frame["presentation"].iloc[0]) & (frame["label"] == "harmful")]
    return {
        "attribution": _written_map(rows, table.facts["layer"]),
        "attribution_patching": _recovered(frame),
        "attribution_agreement": _scatter(rows, table.facts["layer"]),
    }


def _written_map(rows: Frame, layer: int) -> Any:
    kinds = ["head", *component_plots.KINDS]
    rows, name = rows[rows["component"].isin(kinds) & rows["value"].notna()], rows["presentation"].iloc[0]
    unit = f"harmful (n = {rows['n'].iloc[0]}),\non $v_1$ of layer {layer}"
    text = rows.assign(**{end: rows[f"text_{end}"] for end in ("value", "low", "high")}, panel="text", unit=unit)
    change = rows.assign(value=rows["change"], low=rows["change_low"], high=rows["change_high"])
    changed = change.assign(panel=f"{name} − text", unit="change from text")
    return component_plots.component_maps(pd.concat([text, rows.assign(panel=name, unit=unit), changed]))[0, 0].figure


def _recovered(frame: Frame) -> Any:
    rows = frame[(frame["label"] == "harmful") & frame["component"].isin(["resid_post", "attn_out", "mlp"])]
    rows = rows.assign(metric=rows["presentation"], run=rows["component"].replace("mlp", "mlp_out"), layer=rows["block"])
    rows = rows.assign(value=rows["recovered"], low=rows["recovered_low"], high=rows["recovered_high"]).sort_values(
        ["metric", "run", "layer"]
    )
    titles = {name: f"{name} · harmful" for name in rows["metric"].unique()}
    return plots.layer_curves(rows, unit="lost refusal log-odds\nrecovered (share)", titles=titles)[0].figure


@figure_style.styled
def _scatter(rows: Frame, layer: int) -> Any:
    """The loss of each part by attribution against the effect of patching it, both with 95 % intervals."""
    both = rows[rows["change"].notna() & rows["patched"].notna()]
    (ax,) = figure_style.axes_for(None, 1, 1, height=3.6, width=6.4)
    for place, (kind, name) in enumerate((("head", "head"), ("mlp", "MLP"))):
        part = both[both["component"] == kind]
        x, marks = -part["change"], figure_style.color_and_marker(place)
        ax.hlines(part["patched"], -part["change_high"], -part["change_low"], color=marks["color"], linewidth=1.2, alpha=0.45)
        ax.vlines(x, part["patched_low"], part["patched_high"], color=marks["color"], linewidth=1.2, alpha=0.45)
        ax.plot(x, part["patched"], linestyle="none", markersize=5.5, markeredgecolor="white", label=f"{name} ({len(part)})", **marks)
    for place, row in enumerate(both.loc[both["patched"].abs().nlargest(5).index].itertuples()):
        beside = {"xytext": (5, -11 if place % 2 else 4), "textcoords": "offset points"}
        ax.annotate(_name(row), (-row.change, row.patched), **beside, fontsize=8.5, color=figure_style.MUTED)
    ax.set_xlabel(f"lost on $v_1$ of layer {layer} beside the image (text − image), n = {both['n'].iloc[0]}")
    ax.set_ylabel(f"patched from text:\nΔ {UNIT}")
    ax.legend(handles=[*ax.get_legend_handles_labels()[0], figure_style.whisker_handle()])
    return figure_style.dressed(ax, grid="y").figure


def _name(row: Any) -> str:
    return f"head {row.block}.{row.head}" if row.component == "head" else f"MLP {row.block}"


def tell(table: Table) -> list[str]:
    """The page."""
    frame, facts = table.frame, table.facts
    first = frame["presentation"].iloc[0]
    rows = frame[(frame["presentation"] == first) & (frame["label"] == "harmful")]
    return [
        "Which parts write the safety direction, and which bring refusals back",
        f"{facts['n_harmful']} harmful requests of the validation split, at the last token of the prompt; the direction is that of layer "
        f"{facts['layer']}, where the guard edits ({facts['directions']}, of training pairs in text). Intervals of 95 %, a bootstrap over "
        "requests; those of a cluster go together.",
        figure("attribution", f"What heads (above) and MLPs (below) write along the direction: in text, beside {first}, and the change."),
        "## The parts that change most",
        "*Change*: of what the part writes along the direction, from text to the image. *Patched*: the change of the refusal log-odds "
        "(nats) when this part alone gets its state of the text run. *Recovered*: that, as a share of all that the text run has more.",
        markdown(_top(rows)),
        "## Where it comes from",
        _told_sources(facts["sources"]),
        "## Patching whole layers",
        figure("attribution_patching", "How much of the lost refusal log-odds one layer's state of the text run brings back."),
        "## Do both looks agree?",
        figure("attribution_agreement", "Each part: what attribution says that it loses, and what patching it brings back."),
        "Rank correlation over all heads and MLPs up to the layer, between the coordinate that a part loses beside the image and the "
        "refusal log-odds that patching it brings back: "
        + "; ".join(
            f"{name} {interval(v['correlation'], v['low'], v['high'])} ({v['parts']} parts)" for name, v in facts["agreement"].items()
        )
        + ". They need not agree: attribution counts what a part writes itself, patching also what later parts make of it.",
    ]


def _top(rows: Frame) -> Frame:
    parts = rows[rows["component"].isin(["head", "mlp"]) & rows["change"].notna()]
    chosen = parts.loc[parts["change"].abs().nlargest(8).index]
    return pd.DataFrame(
        [
            {
                "part": _name(row),
                "in text": interval(row.text_value, row.text_low, row.text_high),
                "change": interval(row.change, row.change_low, row.change_high, "+.2f"),
                "patched": interval(row.patched, row.patched_low, row.patched_high, "+.2f"),
                "recovered": interval(row.recovered, row.recovered_low, row.recovered_high),
            }
            for row in chosen.itertuples()
        ]
    )


def _told_sources(sources: Any) -> str:
    if isinstance(sources, str):
        return sources
    rows = [row | {"shown": interval(row["change"], row["low"], row["high"], "+.2f")} for row in sources]
    wide = pd.DataFrame(rows).pivot(index="part", columns="presentation", values="shown").fillna("").reset_index()
    return "Change along the direction from text to the image, summed over all layers up to it.\n\n" + markdown(wide)


ATTRIBUTION = Analysis("attribution", measure, draw, tell, {"attn_implementation": "eager"})
app = application(ATTRIBUTION)

if __name__ == "__main__":
    app()
