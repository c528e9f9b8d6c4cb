"""Train eyes for a language model, which stays frozen: first the vision encoder alone, then all of the eye through the language model.

Every few steps the training is kept in one file, from which it goes on after an interruption, with the same result.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from guardlens.data.presentations import Presentation, chat, own_images
from guardlens.data.queries import Query
from guardlens.errors import MismatchError, NumericsError
from guardlens.models.eyes import Eyes, joined, weights_of
from guardlens.models.loading import load
from guardlens.organism.eyes.drawings import COLOURS, QUESTIONS, SHAPES, Drawing, drawings
from guardlens.organism.eyes.recipe import Recipe, Stage
from guardlens.results.files import in_memory, load_tensors, save_tensors

KEPT = "training.safetensors"
"""The file that an unfinished training goes on from."""

EVERY = 25
"""Steps after which the training is kept."""

KINDS = (SHAPES, tuple(COLOURS), tuple(COLOURS))
"""What a drawing's traits are numbers in."""

Loss = Callable[[np.random.Generator], Float[Tensor, ""]]
"""The loss of a step, whose drawings are drawn by the generator."""

Tick = Callable[[str, int, float], None]
"""Told of every step that is done: the stage, the number of steps and the loss."""


@dataclass
class Training:
    """A training on its way.

    Attributes:
        path: The file that it is kept in.
        about: All that it depends on.
        losses: The losses of all steps done, by stage.
        tensors: Of the stage on its way: parameters and the optimizer's moments.
    """

    path: Path
    about: Mapping[str, Any]
    losses: dict[str, list[float]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, about: Mapping[str, Any]) -> "Training":
        """A training from its file, or a new one.

        Raises:
            MismatchError: The file is of another language model, recipe or seed.
        """
        if not path.exists():
            return cls(path, about)
        tensors, header = load_tensors(path, "eyes in training")
        other = next((name for name in about if header["about"].get(name) != about[name]), None)
        if other is not None:
            raise MismatchError(
                f"a training in {path.parent} with {other} {header['about'].get(other)!r}, now {about[other]!r}",
                "the same, to go on with it",
                "choose another directory, or remove this one",
            )
        return cls(path, about, header["losses"], in_memory(tensors))

    def keep(self) -> None:
        save_tensors(self.path, "eyes in training", self.tensors, {"about": dict(self.about), "losses": self.losses})


def train(llm: Any, tokenizer: Any, eyes: Eyes, recipe: Recipe, seed: int, training: Training, tick: Tick) -> dict[str, Tensor]:
    """Train eyes and return their weights.

    Args:
        llm: The language model, in the precision in which it is to compute; it becomes a part of a larger model.
        tokenizer: Its tokenizer.
        eyes: Untrained eyes.
        recipe: The settings.
        seed: The seed of the choice of drawings.
        training: The training so far.
        tick: Is told of every step.

    Raises:
        NumericsError: The loss is not finite.
    """
    hf, processor = joined(llm, tokenizer, eyes)
    hf.requires_grad_(False)
    for part in (hf.model.vision_tower, hf.model.multi_modal_projector):
        part.float().requires_grad_(True)
    shown = drawings("train")
    pixels = processor.image_processor([drawing.image() for drawing in shown], return_tensors="pt")["pixel_values"].to(hf.device)
    heads = _heads(recipe, seed).to(hf.device)
    tower = {name: weight for name, weight in weights_of(hf) if "vision_tower" in name} | dict(heads.named_parameters("heads"))
    lessons = _lessons(hf, processor, recipe.system)
    tower_loss = partial(_tower_loss, hf, heads, pixels, _traits(shown).to(hf.device), recipe.tower.rows)
    sight_loss = partial(_sight_loss, hf, lessons, pixels, shown, recipe.sight.rows)
    _taught(recipe.tower, tower, tower_loss, recipe, [seed, 0], training, tick)
    _taught(recipe.sight, dict(weights_of(hf)), sight_loss, recipe, [seed, 1], training, tick)
    return {name: weight.detach().cpu() for name, weight in weights_of(hf)}


def _taught(
    stage: Stage, parameters: Mapping[str, nn.Parameter], loss: Loss, recipe: Recipe, seed: Sequence[int], training: Training, tick: Tick
) -> None:
    """Go through a stage, from where it was left."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=stage.rate, weight_decay=recipe.decay)
    losses = training.losses.setdefault(stage.name, [])
    if losses and list(training.losses)[-1] == stage.name:
        _restore(training.tensors, parameters, optimizer)
    tick(stage.name, len(losses), math.nan)
    for step in range(len(losses), stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(step)
        value = loss(np.random.default_rng([*seed, step]))
        if not value.isfinite():
            raise NumericsError(f"a loss of {value.item()} in step {step} of {stage.name}", "a finite one", "lower the learning rate")
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        tick(stage.name, step + 1, losses[-1])
        if len(losses) % EVERY == 0 or len(losses) == stage.steps:
            training.tensors = dict(_state(parameters, optimizer))
            training.keep()


def _state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        yield name, parameter.detach()
        for moment, value in optimizer.state[parameter].items():
            yield f"{moment} of {name}", value


def _restore(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
        moments = {key.removesuffix(f" of {name}"): value for key, value in tensors.items() if key.endswith(f" of {name}")}
        optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}


def _heads(recipe: Recipe, seed: int) -> nn.ModuleList:
    """What reads each trait of a drawing from an image token, and its shape from all of them; thrown away after this training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        each = [nn.Linear(recipe.size.width, len(kind)) for kind in KINDS]
        return nn.ModuleList([*each, nn.Linear(recipe.size.tokens * recipe.size.width, len(SHAPES))])


def _traits(shown: Sequence[Drawing]) -> Tensor:
    return torch.tensor([drawing.traits for drawing in shown])


def _tower_loss(hf: Any, heads: nn.ModuleList, pixels: Tensor, traits: Tensor, rows: int, rng: np.random.Generator) -> Float[Tensor, ""]:
    """Every image token predicts the shape and both colors of its drawing, and all together predict the shape once more."""
    chosen = torch.from_numpy(rng.integers(len(traits), size=rows)).to(pixels.device)
    tokens = hf.model.vision_tower(pixels[chosen], output_hidden_states=True).hidden_states[-2][:, 1:]
    guesses = [head(tokens).flatten(0, 1) for head in heads[:-1]]
    wanted = traits[chosen].repeat_interleave(tokens.shape[1], 0)
    of_each = torch.stack([cross_entropy(guess, wanted[:, trait]) for trait, guess in enumerate(guesses)]).sum()
    return of_each + cross_entropy(heads[-1](tokens.flatten(1)), traits[chosen, 0])


@dataclass(frozen=True)
class _Lessons:
    """The questions as the processor and the chat template write them, and the tokenizer for the answers.

    Attributes:
        prompts: Of each question.
        tokenizer: The tokenizer.
    """

    prompts: list[list[int]]
    tokenizer: Any

    def row(self, question: int, drawing: Drawing) -> tuple[list[int], list[int]]:
        """A prompt and its answer, which ends as the model's own answers do."""
        answer = QUESTIONS[question].answer.format(drawing)
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return self.prompts[question], [*ids, self.tokenizer.eos_token_id]


def _lessons(hf: Any, processor: Any, system: str) -> _Lessons:
    image = drawings("train")[0].image()
    model = load(hf, processor=processor, self_check=False)
    batches = [model.batch([Query(question.text, images=(image,))], presentation(system)) for question in QUESTIONS]
    return _Lessons([batch.inputs["input_ids"][0].tolist() for batch in batches], model.tokenizer)


def presentation(system: str) -> Presentation:
    """Each question beside its drawing, after the system prompt, if there is one."""
    return chat(own_images, system=system) if system else own_images


def _sight_loss(
    hf: Any, lessons: _Lessons, pixels: Tensor, shown: Sequence[Drawing], rows: int, rng: np.random.Generator
) -> Float[Tensor, ""]:
    """The loss of the answers' tokens. Padding on the right, which no token before it sees, needs no mask."""
    chosen = rng.integers(len(shown), size=rows).tolist()
    questions = rng.integers(len(QUESTIONS), size=rows).tolist()
    texts = [lessons.row(question, shown[drawing]) for question, drawing in zip(questions, chosen, strict=True)]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt + answer) for prompt, answer in texts], batch_first=True).to(hf.device)
    is_answer = nn.utils.rnn.pad_sequence(
        [torch.tensor([False] * len(prompt) + [True] * len(answer)) for prompt, answer in texts], batch_first=True
    ).to(hf.device)
    states = hf.model(input_ids=ids, pixel_values=pixels[chosen], use_cache=False).last_hidden_state[:, :-1]
    logits = hf.lm_head(states[is_answer[:, 1:]])  # the vocabulary is multiplied at the answers' tokens alone
    return cross_entropy(logits.float(), ids[:, 1:][is_answer[:, 1:]])


def about(eyes: Eyes, recipe: Recipe, seed: int) -> dict[str, Any]:
    """All that a training depends on, as it is kept."""
    return {"llm": eyes.llm, "recipe": asdict(recipe), "seed": seed, "torch": torch.__version__}
