"""A part: a module, one of its sides, and which piece of that tensor is a hook's value. Tensor algebra only: no family is named here."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor

from guardlens.errors import SiteError

Side = Literal["input", "output"]


@runtime_checkable
class View(Protocol):
    """A piece of what a module takes or gives."""

    def read(self, whole: Any) -> Any:
        """The piece; None where the module did not compute it."""
        ...

    def write(self, whole: Any, new: Tensor) -> Any:
        """The whole with another piece."""
        ...


@dataclass(frozen=True)
class Item:
    """One item where the module gives a tuple; the tensor itself where it gives one."""

    index: int = 0

    def read(self, whole: Any) -> Any:
        if isinstance(whole, tuple):
            return whole[self.index] if self.index < len(whole) else None
        return whole if self.index == 0 else None

    def write(self, whole: Any, new: Tensor) -> Any:
        return (*whole[: self.index], new, *whole[self.index + 1 :]) if isinstance(whole, tuple) else new


@dataclass(frozen=True)
class Joined:
    """As `Item`, but of a list (the tokens of each image) all joined, and of an output object of transformers the last hidden state."""

    def read(self, whole: Any) -> Any:
        if isinstance(whole, list):
            return torch.cat(whole)
        return whole["last_hidden_state"] if isinstance(whole, dict) else Item().read(whole)

    def write(self, whole: Any, new: Tensor) -> Any:
        if isinstance(whole, list):
            return list(new.split([len(piece) for piece in whole]))
        return type(whole)(**whole | {"last_hidden_state": new}) if isinstance(whole, dict) else Item().write(whole, new)


@dataclass(frozen=True)
class Columns:
    """A stretch of the last axis: queries, keys and values that one matrix computes side by side."""

    start: int
    stop: int

    def read(self, whole: Any) -> Any:
        return whole[..., self.start : self.stop]

    def write(self, whole: Any, new: Tensor) -> Any:
        return torch.cat([whole[..., : self.start], new, whole[..., self.stop :]], dim=-1)


@dataclass(frozen=True)
class Interleaved:
    """A stretch of every group's `of` heads, where the last axis is `(group head d_head)`: queries, then their key, then their value."""

    start: int
    stop: int
    of: int
    groups: int

    def read(self, whole: Any) -> Any:
        return rearrange(self._split(whole)[..., self.start : self.stop, :], "... group head d -> ... (group head d)")

    def write(self, whole: Any, new: Tensor) -> Any:
        heads = self._split(whole)
        stretch = rearrange(new, "... (group head d) -> ... group head d", group=self.groups, head=self.stop - self.start)
        joined = torch.cat([heads[..., : self.start, :], stretch, heads[..., self.stop :, :]], dim=-2)
        return rearrange(joined, "... group head d -> ... (group head d)")

    def _split(self, whole: Tensor) -> Tensor:
        return rearrange(whole, "... (group head d) -> ... group head d", group=self.groups, head=self.of)


@dataclass(frozen=True)
class Normalised:
    """What a norm has before its gain, worked out from its input. It can't be written: no module has it."""

    centred: bool
    epsilon: float

    def read(self, whole: Any) -> Any:
        x = Item().read(whole).float()
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)).to(Item().read(whole))

    def write(self, whole: Any, new: Tensor) -> Any:
        raise SiteError(
            "an edit of a normalised state, which only exists inside the norm", "a hook that can be written", "edit resid_post or ln_final"
        )


@dataclass(frozen=True)
class Part:
    """Where a hook's value is.

    Attributes:
        path: The module's path from the top of the model.
        side: What it takes, or what it gives.
        view: Which piece of that.
        heads: In how many heads TransformerLens splits the last axis; None where it does not.
        listed: Whether the module has the tokens of all prompts in one list, `(batch seq) d`.
    """

    path: str
    side: Side = "output"
    view: View = Item()
    heads: int | None = None
    listed: bool = False

    def under(self, path: str) -> "Part":
        """The same part of a module at `path`."""
        return replace(self, path=".".join(filter(None, (path, self.path))))

    def read(self, whole: Any, name: str, rows: int) -> Tensor:
        """The value, from what the module takes or gives, of a batch of so many rows.

        Raises:
            SiteError: The module did not compute it, as with attention patterns unless attention is eager.
        """
        value = self.view.read(whole)
        if value is None:
            raise SiteError(
                f"no value at {name}: this attention computes no patterns",
                "eager attention",
                'load the model with attn_implementation="eager", or call model.hf.set_attn_implementation("eager")',
            )
        return rearrange(value, "(row seq) d -> row seq d", row=rows) if self.listed else value

    def write(self, whole: Any, new: Tensor) -> Any:
        """What the module takes or gives, with another value."""
        return self.view.write(whole, rearrange(new, "row seq d -> (row seq) d") if self.listed else new)

    def before(self) -> "Part":
        """What the module takes."""
        return replace(self, side="input")

    def split(self, value: Tensor) -> Tensor:
        """In TransformerLens's shape: `batch seq (head d_head)` becomes `batch seq head d_head`."""
        return value if self.heads is None else rearrange(value, "... (head d) -> ... head d", head=self.heads)

    def join(self, value: Tensor) -> Tensor:
        """Back from TransformerLens's shape."""
        return value if self.heads is None else rearrange(value, "... head d -> ... (head d)")
