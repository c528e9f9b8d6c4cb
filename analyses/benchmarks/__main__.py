"""Measure everything and write it down: results.csv, summary.json, benchmarks.md, growth.png."""

import json
import os
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from analyses.benchmarks import breakdown, drawing, peers
from analyses.benchmarks.experiments import ALL
from analyses.benchmarks.page import page
from analyses.benchmarks.rows import PLANS, Plan, Row, reached
from guardlens.results.plots.style import Rows


def main(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("out/benchmarks"),
    quick: Annotated[bool, typer.Option("--quick", help="Small models and few repeats: does it run, not how fast.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ALL)}.")] = None,
    size: Annotated[str, typer.Option(help=f"Of the model: {', '.join(PLANS)}.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16.")] = "float32",
    checkpoint: Annotated[Path | None, typer.Option(help="A directory or GGUF file of SmolLM2-135M, for rows of real weights.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Time guardlens against the naive way and plain forwards, alternating, and write medians with spreads."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(threads)
    import pandas as pd
    from rich.console import Console

    console, plan = Console(), replace(PLANS[size], device=device, dtype=dtype, checkpoint=checkpoint)
    if not peers.installed():
        console.print(f"Without {peers.NAME}, which is not installed; with it: {peers.COMMAND}", highlight=False)
    if checkpoint is None:
        console.print("Without SmolLM2-135M, whose weights are not given; with them: --checkpoint PATH", highlight=False)
    plan, rows = plan.quick() if quick else plan, []
    if unknown := set(only or ()) - set(ALL):
        raise typer.BadParameter(f"no experiment {min(unknown)!r}; there are {', '.join(ALL)}", param_hint="--only")
    for name in (name for name in ALL if not only or name in only):
        for row in ALL[name](plan):
            rows.append(row | {"experiment": name})
            console.print(said(row), highlight=False)
    write(pd.DataFrame(rows), out, facts(plan, quick, size, threads))
    console.print(f"Written to {out}")


def said(row: Row) -> str:
    """A row as it is printed while the benchmarks run."""
    met = reached(row)
    target = f"  (target {row['target']}: {met})" if met else ""
    return f"{row['what']:22s} {row['way']}: {row['ratio']:.3g} [{row['low']:.3g}, {row['high']:.3g}] {row['unit']}{target}"


def facts(plan: Plan, quick: bool, size: str, threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    flags = [f"--size {size}"] * (size != "small") + [f"--device {plan.device}"] * (plan.device != "cpu")
    flags += [f"--dtype {plan.dtype}"] * (plan.dtype != "float32") + ["--quick"] * quick
    flags += [] if plan.checkpoint is None else [f"--checkpoint {plan.checkpoint.name}"]
    on_cpu = plan.device == "cpu"
    return {
        "command": " ".join(["python -m analyses.benchmarks", *flags]),
        "quick": quick,
        "device": f"CPU ({platform.machine()}), {threads} threads" if on_cpu else torch.cuda.get_device_name(plan.device),
        "dtype": plan.dtype,
        "subject": plan.size.name,
        "checkpoint": None if plan.checkpoint is None else plan.checkpoint.name,
        "versions": {name: metadata.version(name) for name in ("guardlens", "torch", "transformers", "nnsight")},
    }


def write(frame: Rows, out: Path, facts: dict[str, Any]) -> None:
    """All files; what a name's first row says is its ratio in the summary."""
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "results.csv", index=False)
    ratios: dict[str, Any] = {}
    for row in frame[~frame["what"].isin(["growth", breakdown.TIME, breakdown.MEMORY])].to_dict("records"):
        numbers = {name: row[name] for name in ("ratio", "low", "high", "target", "unit", "way")}
        about = {"subject": row["subject"]} if row["subject"] else {}
        ratios.setdefault(row["what"], numbers | {"reached": reached(row)} | about)
    (out / "summary.json").write_text(json.dumps({"ratios": ratios, **facts}, indent=1) + "\n")
    (out / "benchmarks.md").write_text(page(frame, facts))
    if "growth" in set(frame["what"]):
        drawing.growth(frame[frame["what"] == "growth"]).savefig(out / "growth.png", dpi=150)


if __name__ == "__main__":
    typer.run(main)
