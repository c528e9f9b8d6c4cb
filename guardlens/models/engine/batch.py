"""A batch of prompts as tensors. It knows neither the model nor lanes."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from guardlens.data.presentations import Presentation
from guardlens.data.presentations.protocol import require_presentation
from guardlens.data.queries import Query
from guardlens.errors import ArgumentError, InterventionError, MismatchError, PresentationError, QueryError, SiteError, require_type
from guardlens.hooks import Positions


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of one presentation, ready for the model.

    Attributes:
        queries: The queries, in the order of the rows.
        presentation: How they are shown.
        inputs: The inputs of the Hugging Face model (input ids, attention mask, pixel values, ...).
        mask: Real tokens, in contrast to padding.
        image: Tokens whose embedding comes from an image.
        instruction: Tokens of what the user says: the query's text, with the words that a presentation puts around it.
        image_digests: A digest of each prompt's images, by which prompts with the same images are recognized; empty if nobody needs them.
        answered: How many of the last columns are tokens of an answer after the prompts.
        tokenizer: The tokenizer that made the tokens; None if it is not known.
        prefix: The KV cache of what the prompts begin with, if it was computed before (`HookedModel.share`).
    """

    queries: tuple[Query, ...]
    presentation: Presentation
    inputs: Mapping[str, Tensor]
    mask: Bool[Tensor, "query seq"]
    image: Bool[Tensor, "query seq"]
    instruction: Bool[Tensor, "query seq"]
    image_digests: tuple[str, ...] = ()
    answered: int = 0
    tokenizer: Any = field(default=None, repr=False)
    prefix: Any = field(default=None, repr=False)

    @cached_property
    def prompt(self) -> Bool[Tensor, "query seq"]:
        """Tokens of the prompts: neither padding nor an answer."""
        prompt = self.mask.clone()
        prompt[:, prompt.shape[1] - self.answered :] = False
        return prompt

    @property
    def answer(self) -> Bool[Tensor, "query seq"]:
        """Tokens of the answers."""
        return self.mask & ~self.prompt

    @property
    def beside_image(self) -> bool:
        """Whether some prompt shows an image."""
        return bool(self.image.any())

    @property
    def padded_right(self) -> bool:
        """Whether some prompt ends in padding."""
        return not bool(self.mask[:, -1 - self.answered].all())

    @cached_property
    def common_start(self) -> int:
        """How many first tokens all prompts share, images included. At least one token of each prompt is not among them.

        The common start never ends inside an image, nor after images that differ.
        """
        shortest = int(self.mask.sum(1).min())
        columns = self._columns_without_padding()
        ids = self.inputs["input_ids"].gather(1, columns)
        image = self.image.gather(1, columns)
        shared = int((ids == ids[:1]).all(0)[: shortest - 1].long().cumprod(0).sum())
        same_images = len(set(self.image_digests)) == 1 and not image[:, shared:].any()
        if same_images or not image.any():
            return shared
        first_image_token = int(image.any(0).long().argmax())
        return min(shared, first_image_token)

    def _columns_without_padding(self) -> Int[Tensor, "query seq"]:
        """For each prompt, the columns of its tokens from the first on; the last column is repeated at the end."""
        width = self.mask.shape[1]
        columns = torch.arange(width, device=self.mask.device).expand_as(self.mask)
        if self.padded_right:
            return columns
        padding = width - self.mask.sum(1, keepdim=True)
        return (padding + columns).clamp_max(width - 1)

    def __repr__(self) -> str:
        answers = f", answers of {self.answered} tokens" if self.answered else ""
        return f"Batch({len(self.queries)} prompts, {self.presentation.name!r}, {self.mask.shape[1]} tokens wide{answers})"

    def after(self, prefix: Any) -> "Batch":
        """The same prompts, whose runs continue from a prefix if they can; None for runs of whole prompts."""
        return self if prefix is self.prefix else replace(self, prefix=prefix)

    def of(self, queries: Int[Tensor, "chosen"]) -> "Batch":
        """Some of the prompts, as tokens alone: for runs that continue from a KV cache, which need no images."""
        masks = {name: getattr(self, name)[queries] for name in ("mask", "image", "instruction")}
        numbers = queries.tolist()
        digests = tuple(self.image_digests[number] for number in numbers) if self.image_digests else ()
        chosen = tuple(self.queries[number] for number in numbers)
        inputs = {"input_ids": self.inputs["input_ids"][queries]}
        return replace(self, queries=chosen, inputs=inputs, image_digests=digests, prefix=None, **masks)

    def answering(self, tokens: Int[Tensor, "query new"]) -> "Batch":
        """The prompts with an answer after each, as if the model had given it. Rows of unlike length may end in any token.

        Raises:
            InterventionError: The batch is padded on the right.
            ArgumentError: The tokens are not one row of token ids per prompt.
        """
        if self.padded_right:
            raise InterventionError("a batch padded on the right", "padding on the left for answers", "make it with padding_side='left'")
        rows, width = self.mask.shape
        _require_ids(tokens, rows)
        new = tokens.shape[1]
        blank = self.mask.new_zeros(rows, new)
        added = {"input_ids": tokens.to(self.mask.device), "attention_mask": blank.long() + 1}
        inputs: Any = copy(self.inputs)
        for name, value in getattr(self.inputs, "data", self.inputs).items():  # which writes out no pixels
            if value.shape[-1:] == (width,) and value.shape[-2:-1] == (rows,):
                more = added[name] if name in added else blank.long()
                if name == "position_ids":
                    more = value[..., -1:] + 1 + torch.arange(new, device=value.device)
                inputs[name] = torch.cat([value, more.to(value)], dim=-1)
        masks = {name: torch.cat([getattr(self, name), blank], dim=1) for name in ("image", "instruction")}
        return replace(self, inputs=inputs, mask=torch.cat([self.mask, ~blank], dim=1), answered=self.answered + new, **masks)

    def select(self, positions: Positions) -> Bool[Tensor, "query seq"]:
        """The tokens at these positions; padding is never among them.

        Raises:
            SiteError: A query has no token there.
        """
        chosen = self._chosen(positions) & self.prompt
        empty = (~chosen.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise SiteError(
                f"no token at positions {positions!r} in query {self.queries[empty[0]].id!r} (presentation {self.presentation.name!r})",
                "at least one in every query",
                "use a presentation with an image for 'image', or other positions",
            )
        return chosen

    def _chosen(self, positions: Positions) -> Bool[Tensor, "query seq"]:
        match positions:
            case "last":
                return _suffix_count(self.prompt) == 1
            case "all":
                return self.prompt
            case "image":
                return self.image
            case "instruction":
                return self.instruction
            case "post_instruction":
                after_last = _suffix_count(self.instruction) == 0
                after_first = self.instruction.cumsum(1) > 0
                return after_last & after_first
            case (start, stop):
                index = self.prompt.cumsum(1) - 1
                length = self.prompt.sum(1, keepdim=True)
                return (index >= _from_start(start, length, 0)) & (index < _from_start(stop, length, length))
        raise SiteError(f"the positions {positions!r}", "names or a range", "see guardlens.hooks.POSITIONS")


def require_batch(batch: Any, tokenizer: Any, shows_images: bool, name: str) -> None:
    """Refuse anything but a batch for this model.

    Args:
        batch: What may be a batch.
        tokenizer: The model's tokenizer.
        shows_images: Whether the model may be shown images.
        name: The name of the model.

    Raises:
        QueryError: It is no batch.
        MismatchError: Another tokenizer made it, so its tokens mean something else to this model.
        PresentationError: Some prompt shows an image to the language model of a VLM.
    """
    require_type(batch, Batch, QueryError, "make one of queries with model.batch(queries, presentation)")
    if batch.tokenizer is not None and batch.tokenizer is not tokenizer and batch.tokenizer.get_vocab() != tokenizer.get_vocab():
        found = f"a batch of another tokenizer, a {type(batch.tokenizer).__name__}"
        raise MismatchError(found, f"one of {name!r}", "make it with this model's .batch")
    if batch.beside_image and not shows_images:
        raise PresentationError(f"an image for the language model of {name!r}", "text alone", "hand in the VLM itself to show it images")


def require_same_presentation(batch: Batch, presentation: Any) -> None:
    """Refuse a presentation beside a batch that shows another.

    Raises:
        MismatchError: They differ.
        PresentationError: It is no presentation.
    """
    if presentation is None:
        return
    require_presentation(presentation)
    if presentation != batch.presentation:
        raise MismatchError(
            f"a batch that shows {batch.presentation.name!r}, with the presentation {presentation.name!r}",
            "one of the two",
            "leave the presentation out, or hand in the queries",
        )


def _suffix_count(chosen: Bool[Tensor, "query seq"]) -> Int[Tensor, "query seq"]:
    """How many chosen tokens there are from each column to the end."""
    return chosen.flip(1).cumsum(1).flip(1)


def _from_start(end: int | None, length: Int[Tensor, "query 1"], default: Any) -> Any:
    """One end of a Python range, counted from the start of each prompt."""
    if end is None:
        return default
    return end if end >= 0 else length + end


def _require_ids(tokens: Any, rows: int) -> None:
    """Refuse anything that is not one row of token ids per prompt.

    Raises:
        ArgumentError: It is no tensor, has another shape, or holds numbers that are no ids.
    """
    next_step = "hand in one row of ids per prompt, as run.tokens[lane]"
    require_type(tokens, Tensor, ArgumentError, next_step)
    if tokens.ndim != 2 or len(tokens) != rows or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ArgumentError(f"answers of shape {tuple(tokens.shape)} in {tokens.dtype}", f"whole numbers in {rows} rows", next_step)
    if (tokens < 0).any():
        raise ArgumentError(f"the token {int(tokens.min())} in an answer", "ids from 0 up", next_step)
