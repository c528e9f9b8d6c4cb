"""How much is measured, and what a measurement is: a ratio with its spread, its unit, and the target where there is one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import guardlens as gl
from analyses.benchmarks import subjects
from analyses.benchmarks.subjects import QWEN, SIZES, Size, TextSize

Row = dict[str, Any]
FORWARDS = "plain forwards"
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        size: Of the model and its prompts.
        queries: In a batch.
        pool: Queries of a whole collection.
        strengths: Per layer, in a grid.
        repeats: Of what is quick; of what is slow, half as many.
        sampled: How many of the layers the naive loops are timed at; the rest of their forwards cost the same.
        new_tokens: Of an answer.
        forced: Tokens of an answer that is put into the model's mouth.
        tail: How many last tokens `sweep_tokens` edits.
        wide: Width of the model at which the overhead of a run is measured.
        depths, sides, vocabularies, grids, numbers: Along which layers, image patches in a row, words, strengths and queries grow.
        text: The sizes of the text-only model of real proportions.
        text_tokens: The lengths of its prompts. Those of a batch have the first one.
        text_strengths: The strengths per layer in its grid.
        checkpoint: A directory or a GGUF file of SmolLM2-135M; None leaves its rows out.
        device: Where.
        dtype: Of the weights.
    """

    size: Size = SIZES["small"]
    queries: int = 8
    pool: int = 100
    strengths: int = 8
    repeats: int = 7
    sampled: int = 4
    new_tokens: int = 64
    forced: int = 16
    tail: int = 20
    wide: int = 512
    depths: tuple[int, ...] = (16, 24, 32)
    sides: tuple[int, ...] = (9, 24, 44)
    vocabularies: tuple[int, ...] = (4096, 32_768, 151_936)
    grids: tuple[int, ...] = (1, 8, 32)
    numbers: tuple[int, ...] = (1, 4, 8)
    text: TextSize = QWEN
    text_tokens: tuple[int, ...] = (40, 600)
    text_strengths: int = 6
    checkpoint: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def few(self) -> int:
        """Repeats of what is slow."""
        return max(1, self.repeats // 2)

    def quick(self) -> "Plan":
        """As small as shows that everything runs."""
        size = self.size.at(layers=min(self.size.layers, 6), width=min(self.size.width, 128), side=min(self.size.side, 12))
        short = {"queries": 4, "pool": 12, "strengths": 4, "repeats": 3, "new_tokens": 16, "wide": 256, "sampled": 2}
        axes = {"depths": (4, 6), "sides": (6, 12), "vocabularies": (4096, 8192), "grids": (1, 4), "numbers": (1, 4)}
        text = TextSize(layers=6, width=128, heads=4, kv_heads=2, mlp=512, vocabulary=8192)
        return replace(self, size=size, text=text, text_tokens=(40, 120), text_strengths=2, **axes, **short)

    def model(self, **traits: int) -> gl.HookedModel:
        """The model, or one with other traits."""
        return subjects.model(self.size.at(**traits), self.dtype, self.device)

    def layers(self, subject: gl.HookedModel) -> list[int]:
        """The layers that the naive loops are timed at."""
        number = min(self.sampled, subject.cfg.n_layers)
        return torch.linspace(0, subject.cfg.n_layers - 1, number).long().tolist()


PLANS = {
    "small": Plan(),
    "tiny": Plan(
        SIZES["tiny"], queries=2, pool=4, strengths=2, repeats=2, sampled=3, new_tokens=3, forced=3, tail=4, wide=64,
        depths=(2, 3), sides=(2, 4), vocabularies=(2048, 4096), grids=(1, 2), numbers=(1, 2),
        text=TextSize(layers=3, width=64, heads=4, kv_heads=2, mlp=128, vocabulary=512), text_tokens=(16, 32), text_strengths=2,
    ),
    "7b": Plan(SIZES["7b"], wide=4096, repeats=5),
}  # fmt: skip


def row(what: str, way: str, found: Mapping[str, float], target: str = "", unit: str = FORWARDS, subject: str = "", **about: Any) -> Row:
    """One line of the results. It names its subject if that is another than the random LLaVA."""
    numbers = {"ratio": found["median"], "low": found["low"], "high": found["high"], "seconds": found.get("seconds", float("nan"))}
    return {"what": what, "way": way, **numbers, "unit": unit, "target": target, "subject": subject, **about}


def reached(row: Row) -> str:
    """Whether a target (`"<= 1.2"`, `">= 70"`) is met, and by how much it is missed; nothing without a target."""
    if not row["target"]:
        return ""
    sign, bound = row["target"].split()[0], float(row["target"].split()[1])
    short, nearest = (row["ratio"] / bound, row["low"] / bound) if sign == "<=" else (bound / row["ratio"], bound / row["high"])
    if short <= 1:
        return "met"
    size = f"{100 * (short - 1):.0f} %" if short < 2 else f"a factor of {short:.1f}"
    return f"missed by {size}" + (", within the spread" if nearest <= 1 else "")
