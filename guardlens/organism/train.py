"""Train the organism from scratch: `python -m guardlens.organism.train --seed 0 --out DIR`. It takes about five minutes on one CPU core.

There are five stages. A vision encoder is pre-trained and then frozen (`tower`). A language model learns the language and the rule of harm,
and to help with everything (`base`), then to refuse harmful requests in text (`align`). The projector learns to caption (`caption`), and
visual instruction tuning joins all of them (`tune`). `lessons.py` holds what they are taught.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.progress import Progress
from transformers import LlavaForConditionalGeneration

from guardlens.errors import StorageError
from guardlens.models.hooked_model import HookedModel
from guardlens.models.loading import load
from guardlens.organism import world
from guardlens.organism.build import build_model, build_processor
from guardlens.organism.lessons import IMAGE, QUICK, RECIPE, Recipe, Row, Stage, batches
from guardlens.organism.measure import examine
from guardlens.results.progress import progress_bars

SPLITS: tuple[world.Split, ...] = ("validation", "test")
"""The splits that a trained organism is examined on."""


@cache
def pixel_values() -> torch.Tensor:
    """All training pictures as the processor prepares them for the model."""
    images = [picture.image() for picture in world.pictures("train")]
    return build_processor().image_processor(images, return_tensors="pt")["pixel_values"]


class Batch(NamedTuple):
    """Rows padded on the right. Under causal attention no token sees that padding, so no mask is needed.

    Attributes:
        tokens: Token ids of prompts and answers.
        weights: The weight of each token in the loss; 0 in prompts and padding.
        pixels: The pixel values of the pictures, or None for rows without pictures.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor | None


_IDS = {word: i for i, word in enumerate(world.VOCABULARY)}


def encode(text: str) -> list[int]:
    """Token ids, as the processor makes them."""
    return [_IDS["<s>"]] + [_IDS[word] for word in text.replace(IMAGE, " ".join([IMAGE] * 16)).split()]


def collate(rows: Sequence[Row], first: float = RECIPE.first) -> Batch:
    """Rows as tensors."""
    ids = [(encode(row.prompt), encode(row.answer + " </s>")[1:]) for row in rows]
    tokens = torch.zeros(len(rows), max(len(prompt) + len(reply) for prompt, reply in ids), dtype=torch.long)
    weights = torch.zeros(tokens.shape)
    for row, (prompt, reply) in enumerate(ids):
        tokens[row, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        weights[row, len(prompt) : len(prompt) + len(reply)] = torch.tensor([first] + [1.0] * (len(reply) - 1))
    seen = [row.picture for row in rows if row.picture is not None]
    return Batch(tokens, weights, pixel_values()[seen] if seen else None)


def _loss(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The weighted sum of the loss over the answers' tokens."""
    logits = model(input_ids=batch.tokens, pixel_values=batch.pixels, use_cache=False).logits[:, :-1]
    answers = batch.weights[:, 1:] > 0
    losses = torch.nn.functional.cross_entropy(logits[answers], batch.tokens[:, 1:][answers], reduction="none")
    return losses @ batch.weights[:, 1:][answers]


@contextmanager
def _depth(model: LlavaForConditionalGeneration, layers: int) -> Iterator[None]:
    """Run only the first layers of the language model."""
    config: Any = model.config.text_config
    full, config.num_hidden_layers = config.num_hidden_layers, layers
    try:
        yield
    finally:
        config.num_hidden_layers = full


def _learners(module: torch.nn.Module, names: tuple[str, ...]) -> list[torch.nn.Parameter]:
    """The parameters whose names begin with one of these. All others are frozen."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _optimizer(parameters: list[torch.nn.Parameter], stage: Stage) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    def factor(step: int) -> float:
        done = max(0, step - stage.warm_up) / (stage.steps - stage.warm_up)
        return min(1.0, (step + 1) / stage.warm_up) * (stage.end + (1 - stage.end) * (1 + np.cos(np.pi * done)) / 2)

    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=stage.betas, weight_decay=stage.decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _quiet() -> None:
    """Show no progress."""


def train_tower(
    model: LlavaForConditionalGeneration, stage: Stage, recipe: Recipe, seed: int, tick: Callable[[], None] = _quiet
) -> list[float]:
    """Pre-train the vision encoder, in place of CLIP's own training.

    Each image token predicts shape, color and page of its picture, and all tokens together predict the shape once more.
    """
    rng = np.random.default_rng([seed, world.number(stage.name)])
    kinds = (world.SHAPES, tuple(world.COLOURS), tuple(world.PAGES))
    labels = torch.tensor([[k.index(v) for k, v in zip(kinds, (p.shape, p.colour, p.page), strict=True)] for p in world.pictures("train")])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = torch.nn.ModuleList([torch.nn.Linear(recipe.eye_width, len(kind)) for kind in kinds])
        heads.append(torch.nn.Linear(16 * recipe.eye_width, len(world.SHAPES)))
    optimizer, schedule = _optimizer([*_learners(model, stage.trains), *heads.parameters()], stage)
    losses = []
    for _ in range(stage.steps):
        chosen = torch.from_numpy(rng.integers(len(labels), size=stage.rows))
        tokens = model.model.vision_tower(pixel_values()[chosen], output_hidden_states=True).hidden_states[-2][:, 1:]
        guesses = [head(tokens).transpose(1, 2) for head in heads[:3]]
        wanted = [labels[chosen, i, None].expand(-1, 16) for i in range(3)]
        loss = sum(map(torch.nn.functional.cross_entropy, guesses, wanted), torch.tensor(0.0))
        loss = loss + torch.nn.functional.cross_entropy(heads[3](tokens.flatten(1)), labels[chosen, 0])
        loss.backward()
        _step(optimizer, schedule, recipe.clip)
        losses.append(loss.item())
        tick()
    return losses


def _step(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, clip: float) -> None:
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def train_stage(
    model: LlavaForConditionalGeneration, stage: Stage, recipe: Recipe, seed: int, tick: Callable[[], None] = _quiet
) -> list[float]:
    """Train on a stage's batches, and return the losses of all steps."""
    rng = np.random.default_rng([seed, world.number(stage.name + ", depth")])
    optimizer, schedule = _optimizer(_learners(model, stage.trains), stage)
    losses = []
    for step, rows in enumerate(batches(stage, seed)):
        fewer = int(rng.choice(3, p=[0.5, 0.25, 0.25])) if step >= stage.shallow_from * stage.steps else 0
        with _depth(model, recipe.layers - fewer):
            losses.append(_backward(model, rows, recipe.first))
        _step(optimizer, schedule, recipe.clip)
        tick()
    return losses


def _backward(model: LlavaForConditionalGeneration, rows: list[Row], first: float) -> float:
    """Accumulate the gradients of the mean loss, in two halves of like length to save padding, and return the loss."""
    rows = sorted(rows, key=lambda row: len(encode(f"{row.prompt} {row.answer}")))
    halves = [collate(half, first) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
    total = sum(half.weights.sum().item() for half in halves)
    loss = 0.0
    for half in halves:
        part = _loss(model, half) / total
        part.backward()
        loss += part.item()
    return loss


def fingerprint(thing: Any) -> str:
    """A hash of data that JSON can hold."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def recipe_hash(recipe: Recipe = RECIPE) -> str:
    """A hash of the settings, and of the first rows of every stage that has rows."""
    return fingerprint([asdict(recipe), [next(batches(stage, 0)) for stage in recipe.stages if stage.mix]])


@cache
def world_hash() -> str:
    """A hash of the world's data: words, rule, dictionary, splits, texts and every pixel of every picture."""
    splits: tuple[world.Split, ...] = ("train", "validation", "test")
    texts = [[(query.id, query.text, query.label) for query in world.queries(split)] for split in splits]
    pixels = hashlib.sha256(b"".join(picture.pixels().tobytes() for split in splits for picture in world.pictures(split))).hexdigest()
    pairs = [[query.id for query in pair] for pair in world.pairs()]
    words = [world.VOCABULARY, world.TOOL, world.PART, world.TEMPLATES, world.ANSWER, world.REFUSAL, world.REMINDER]
    return fingerprint([words, sorted(world.HARMFUL_CELLS), texts, pairs, pixels])


def _timed(progress: Progress, name: str, total: int, work: Callable[[Callable[[], None]], Any]) -> tuple[Any, dict[str, float]]:
    """Do a piece of work under a progress bar, and return its result and its seconds."""
    task = progress.add_task(name, total=total)
    wall = time.perf_counter()
    cpu = time.process_time()
    result = work(lambda: progress.advance(task))
    seconds = {"wall": round(time.perf_counter() - wall, 1), "cpu": round(time.process_time() - cpu, 1)}
    progress.console.print(f"{name}: {seconds['wall']} s")
    return result, seconds


def _examined(model: HookedModel, split: world.Split, tick: Callable[[], None]) -> dict[str, Any]:
    """The exam without bars of its own, since the training shows one already."""
    with progress_bars(False):
        metrics = examine(model, split)
    tick()
    return metrics


def train(seed: int, progress: Progress, recipe: Recipe = RECIPE) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    """Train the organism of a seed, and return it with its record."""
    model = build_model(seed, recipe).train()
    losses: dict[str, list[float]] = {}
    seconds: dict[str, dict[str, float]] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for stage in recipe.stages:
        teach = train_stage if stage.mix else train_tower
        work = partial(teach, model, stage, recipe, seed)
        losses[stage.name], seconds[stage.name] = _timed(progress, stage.name, stage.steps, work)
    _learners(model, ("",))
    examinee = load(model.eval(), processor=build_processor())
    for split in SPLITS:
        metrics[split], seconds[split] = _timed(progress, split, 1, partial(_examined, examinee, split))
    return model, {
        "seed": seed,
        "recipe_hash": recipe_hash(recipe),
        "world_hash": world_hash(),
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
        "losses": {name: tenths(each) for name, each in losses.items()},
        "seconds": seconds,
        "metrics": metrics,
    }


def tenths(losses: list[float]) -> list[float]:
    """The mean loss of each tenth of a stage, as records keep it."""
    return [round(float(part.mean()), 4) for part in np.array_split(losses, min(10, len(losses)))]


def save(model: LlavaForConditionalGeneration, record: dict[str, Any], out: Path) -> None:
    """Write the directory as a whole, or not at all."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    build_processor().save_pretrained(beside)
    (beside / "model.safetensors").chmod(0o644)  # safetensors lets only its owner read it, and a package would keep that
    (beside / "recipe.json").write_text(json.dumps(record, indent=1) + "\n")
    beside.rename(out)


def main(
    seed: Annotated[int, typer.Option(help="The seed of every random stream: weights, rows, depth.")],
    out: Annotated[Path, typer.Option(help="The directory to make, which must not exist.")],
    quick: Annotated[bool, typer.Option(help="Take a few steps per stage only, to see whether it runs.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; more may change results in the last digits.")] = 1,
) -> None:
    """Train the organism of one seed, and write it to a directory."""
    if out.exists():
        raise StorageError(f"{out}, which exists already", "a new directory", "choose another --out, or remove it")
    torch.set_num_threads(threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        model, record = train(seed, progress, QUICK if quick else RECIPE)
    save(model, record, out)
    test = record["metrics"]["test"]
    print(f"seed {seed}: text ASR {test['text']['asr']['rate']:.3f}, blank ASR {test['blank']['asr']['rate']:.3f}, {out}")


if __name__ == "__main__":
    typer.run(main)
