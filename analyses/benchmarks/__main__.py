"""Measure everything and write it down: results.csv, summary.json, benchmarks.md, growth.png."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from analyses.benchmarks.experiments import ALL, FULL, QUICK
from guardlens.figure_style import styled

AXES = {"layers": "layers", "tokens": "tokens in the prompt", "strengths": "strengths per layer", "queries": "queries beside one image"}


def main(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("out/benchmarks"),
    quick: Annotated[bool, typer.Option("--quick", help="Small models and few repeats: does it run, not how fast.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ALL)}.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Time guardlens against the naive way and plain forwards, alternating, and write medians with spreads."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(threads)
    from rich.console import Console

    console, plan, rows = Console(), QUICK if quick else FULL, []
    for name in only or ALL:
        for row in ALL[name](plan):
            rows.append(row | {"experiment": name})
            target = f"  (target {row['target']})" if row["target"] else ""
            console.print(
                f"{row['what']:22s} {row['way']}: {row['ratio']:.3g} [{row['low']:.3g}, {row['high']:.3g}]{target}", highlight=False
            )
    write(pd.DataFrame(rows), out, quick, threads, plan.size.name)
    console.print(f"Written to {out}")


def write(frame: pd.DataFrame, out: Path, quick: bool, threads: int, subject: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "results.csv", index=False)
    ratios: dict[str, Any] = {}
    for row in frame.to_dict("records"):
        if row["what"] != "growth":
            ratios.setdefault(row["what"], {name: row[name] for name in ("ratio", "low", "high", "target", "way")})
    versions = {name: metadata.version(name) for name in ("guardlens", "torch", "transformers", "nnsight")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()}), {threads} threads"
    facts = {"quick": quick, "device": device, "subject": subject, "versions": versions}
    (out / "summary.json").write_text(json.dumps({"ratios": ratios, **facts}, indent=1))
    (out / "benchmarks.md").write_text(page(frame, facts))
    if "growth" in set(frame["what"]):
        growth(frame.query("what == 'growth'")).savefig(out / "growth.png", dpi=150)


def page(frame: pd.DataFrame, facts: dict[str, Any]) -> str:
    """The docs' page."""
    table = [
        f"| `{row['what']}` | {row['way']} | {row['ratio']:.3g} | {row['low']:.3g} to {row['high']:.3g} | {row['target']} |"
        for row in frame.query("what != 'growth'").to_dict("records")
    ]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            f"Written by `python -m analyses.benchmarks{' --quick' if facts['quick'] else ''}`.",
            f"Random LLaVA, {facts['subject']}, float32, on {facts['device']}.",
            "Each number is the median of alternating repeats of a ratio within one repeat, with the least and the greatest.",
            "`sweep_*` count in plain forwards of the same prompt; `collect_*` in plain forwards of the same batch; `generate_guarded` in",
            "transformers' own `generate`. A model's first sweep checks itself with one more forward, which is not counted.",
            "",
            "| what | way | ratio | spread | target |",
            "| --- | --- | --- | --- | --- |",
            *table,
            "",
            "![Seconds of a layer map over layers, tokens, strengths and queries](../figures/growth.png)",
            "",
            "*The layer map with guardlens, with a forward per cell, and one plain forward, as the question grows.*",
            "",
            "What the time beyond a plain forward goes into, by profile: transformers' cache copies keys and values as it grows, which",
            "costs some percent of a forward, once when prompts are kept and once behind them; behind a shared prefix every prompt of a",
            "batch gets a copy of it; the same picture is preprocessed anew for every query; and nnsight looks at every decode step.",
            "",
        ]
    )


@styled
def growth(frame: pd.DataFrame) -> Any:
    """Seconds over each axis, one line per way, with the spread."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(3.1 * len(AXES), 3.0), sharey=True, layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        for way, marker in (("naive loop", "s"), ("guardlens", "o"), ("plain forward", "")):
            part = frame.query("axis == @axis and way == @way").sort_values("value")
            style = {"color": "0.4", "linestyle": "--"} if way == "plain forward" else {}
            line = panel.plot(part["value"], part["ratio"], marker=marker, label=way, **style)[0]
            panel.fill_between(part["value"], part["low"], part["high"], color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel=label)
        ticks = sorted(frame.loc[frame["axis"] == axis, "value"].unique())
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
    panels[0].set_ylabel("seconds for the layer map")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    typer.run(main)
