"""The command: train eyes for a language model, examine them, and write them."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from guardlens.errors import GuardlensError, StorageError
from guardlens.models import checkpoints
from guardlens.models.eyes import FILE, Eyes, require_llm, untrained, with_eyes
from guardlens.models.loading import load
from guardlens.organism.eyes.exam import ENOUGH, examine
from guardlens.organism.eyes.recipe import QUICK, RECIPE, Recipe
from guardlens.organism.eyes.train import KEPT, Tick, Training, about, train
from guardlens.organism.train import tenths


def main(
    llm: Annotated[str, typer.Option(help="The language model: a hub id, a directory or a GGUF file.")],
    out: Annotated[Path, typer.Option(help="The directory to make. An unfinished training in it goes on.")],
    seed: Annotated[int, typer.Option(help="The seed of weights and drawings.")] = 0,
    system: Annotated[str, typer.Option(help="A system prompt for all questions, in place of the chat template's own.")] = "",
    dtype: Annotated[str, typer.Option(help="As in transformers, of the language model that is written and examined.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    alone: Annotated[bool, typer.Option("--alone", help="Write the eyes without the language model, for gl.load(llm, eyes=DIR).")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Take a few steps of small eyes, to see whether it runs.")] = False,
) -> None:
    """Give a language model eyes: train a small vision encoder and projector before it, while it stays frozen."""
    try:
        make(llm, out, seed, replace(QUICK if quick else RECIPE, system=system), dtype, device, alone)
    except GuardlensError as error:
        sys.exit(f"guardlens: {error}")


def make(llm: str, out: Path, seed: int, recipe: Recipe, dtype: str, device: str, alone: bool) -> Eyes:
    """Train eyes, examine them, and write them."""
    if (out / FILE).exists():
        raise StorageError(f"{out}, which has eyes already", "a new directory", "choose another --out, or remove it")
    console = Console()
    hf, tokenizer = _read(llm, dtype, device)
    require_llm(hf)
    eyes = untrained(hf, recipe.size, seed)
    kind = str(hf.dtype).removeprefix("torch.")
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    training = Training.opened(out / KEPT, about(eyes, recipe, seed))
    with _bars(recipe) as tick:
        weights = train(hf.to(getattr(torch, recipe.precision)), tokenizer, eyes, recipe, seed, training, tick)
    record: dict[str, Any] = {
        "model": Path(llm).name if Path(llm).exists() else llm,
        "dtype": kind,
        "seed": seed,
        "recipe": asdict(recipe),
        "losses": {name: tenths(losses) for name, losses in training.losses.items()},
        "seconds": round(time.monotonic() - began),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }
    made = Eyes(eyes.size, eyes.llm, weights, record)
    whole, processor = with_eyes(*_read(llm, dtype, device), made)
    exam = examine(load(whole, processor=processor), recipe.system)
    made = replace(made, record={**record, "exam": exam})
    if not alone:
        whole.save_pretrained(out)
        processor.save_pretrained(out)
    made.save(out)
    training.path.unlink()
    seen = exam["all"]
    console.print(f"{seen['rate']:.0%} of {seen['n']} answers about held-out drawings are right [{seen['low']:.0%}, {seen['high']:.0%}].")
    if seen["rate"] < ENOUGH:
        console.print(f"That is less than {ENOUGH:.0%}: these eyes see poorly. Train longer, or with another seed.")
    console.print(f"Eyes for {record['model']}: {out}", highlight=False)
    return made


def _read(llm: str, dtype: str, device: str) -> tuple[Any, Any]:
    hf, tokenizer = checkpoints.read(checkpoints.locate(llm), {}, {"dtype": dtype})
    return hf.to(device), tokenizer


@contextmanager
def _bars(recipe: Recipe) -> Iterator[Tick]:
    """A bar for each stage, with the loss and the time left."""
    loss = TextColumn("{task.fields[loss]}")
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), loss) as progress:
        tasks = {stage.name: progress.add_task(stage.name, total=stage.steps, loss="") for stage in (recipe.tower, recipe.sight)}
        yield partial(_tick, progress, tasks)


def _tick(progress: Progress, tasks: Mapping[str, TaskID], stage: str, steps: int, loss: float) -> None:
    progress.update(tasks[stage], completed=steps, loss="" if math.isnan(loss) else f"loss {loss:.3f}")
