"""How eyes are trained: all settings, as plain data."""

import math
from dataclasses import dataclass, field, replace

from guardlens.models.eyes import EyeSize


@dataclass(frozen=True)
class Stage:
    """How one stage trains.

    Attributes:
        name: Its name.
        steps: The number of steps.
        rows: The number of drawings in a step.
        rate: The highest learning rate.
        end: The last learning rate, as a share of `rate`.
        warm_up: Steps in which the rate rises.
    """

    name: str
    steps: int
    rows: int
    rate: float
    end: float
    warm_up: int = 20

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then half a cosine."""
        risen = min(1.0, (step + 1) / self.warm_up)
        done = max(0, step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * risen * (self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Recipe:
    """All settings.

    Attributes:
        size: The sizes of the eye.
        tower: The vision encoder alone learns shapes and colors. It stands for CLIP's own training.
        sight: Encoder and projector learn to answer questions through the frozen language model.
        precision: The precision of the frozen language model while the eye trains. The eye itself trains in float32.
        decay: Weight decay.
        clip: The largest norm of a step's gradient.
        system: The system prompt of all questions; empty for that of the chat template.
    """

    size: EyeSize = field(default_factory=EyeSize)
    tower: Stage = Stage("tower", steps=400, rows=64, rate=2e-3, end=0.05)
    sight: Stage = Stage("sight", steps=400, rows=8, rate=1e-3, end=0.1)
    precision: str = "bfloat16"
    decay: float = 0.01
    clip: float = 1.0
    system: str = ""


RECIPE = Recipe()
SMALL = EyeSize(pixels=96, patch=32, width=32, layers=2, heads=2, inner=64)
QUICK = replace(
    RECIPE,
    size=SMALL,
    tower=replace(RECIPE.tower, steps=3, rows=8, warm_up=1),
    sight=replace(RECIPE.sight, steps=3, rows=4, warm_up=1),
)
"""A few steps of a small eye, which show that training runs, and teach nothing."""
