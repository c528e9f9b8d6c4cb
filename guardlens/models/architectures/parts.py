"""A part: a module, its input or output, and the slice of that tensor that is a hook's value. Tensor algebra only, without any family."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor

from guardlens.errors import SiteError

Side = Literal["input", "output"]


@runtime_checkable
class View(Protocol):
    """A slice of a module's input or output."""

    def read(self, whole: Any) -> Any:
        """Return the slice; None if the module did not compute it."""
        ...

    def write(self, whole: Any, new: Tensor) -> Any:
        """Return the whole with the slice replaced."""
        ...


@dataclass(frozen=True)
class Item:
    """One item of a tuple; a module that returns a single tensor counts as returning a tuple of one."""

    index: int = 0

    def read(self, whole: Any) -> Any:
        if isinstance(whole, tuple):
            return whole[self.index] if self.index < len(whole) else None
        return whole if self.index == 0 else None

    def write(self, whole: Any, new: Tensor) -> Any:
        return (*whole[: self.index], new, *whole[self.index + 1 :]) if isinstance(whole, tuple) else new


@dataclass(frozen=True)
class Joined:
    """Like `Item`, but concatenates a list of per-image tensors and takes `last_hidden_state` from a ModelOutput."""

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
    """Columns `start` to `stop` of the last axis: queries, keys or values that one matrix computes side by side."""

    start: int
    stop: int

    def read(self, whole: Any) -> Any:
        return whole[..., self.start : self.stop]

    def write(self, whole: Any, new: Tensor) -> Any:
        return torch.cat([whole[..., : self.start], new, whole[..., self.stop :]], dim=-1)


@dataclass(frozen=True)
class Interleaved:
    """Heads `start` to `stop` of every group of `of` heads, where the last axis is `(group head d_head)`.

    A group holds the queries that share a key and a value, then this key, then this value.
    """

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
    """The output of a norm before its gain, computed from its input. No module holds it, so it cannot be written."""

    centred: bool
    epsilon: float

    def read(self, whole: Any) -> Any:
        given = Item().read(whole)
        x = given.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)).to(given)

    def write(self, whole: Any, new: Tensor) -> Any:
        raise SiteError(
            "A normalised state exists only inside the norm, so it cannot be edited.", next_step="edit resid_post or ln_final instead"
        )


@dataclass(frozen=True)
class Part:
    """Where to find a hook's value.

    Attributes:
        path: The module's path from the top of the model.
        side: The module's input or its output.
        view: Which slice of that.
        heads: The number of heads into which TransformerLens splits the last axis; None if it does not.
        listed: Whether the module holds the tokens of all prompts in one list, `(batch seq) d`.
    """

    path: str
    side: Side = "output"
    view: View = Item()
    heads: int | None = None
    listed: bool = False

    def under(self, path: str) -> "Part":
        """Return this part with `path` in front of its own path."""
        return replace(self, path=".".join(filter(None, (path, self.path))))

    def read(self, whole: Any, name: str, rows: int) -> Tensor:
        """Take the value from the module's input or output.

        Args:
            whole: The input or output.
            name: What an error calls the hook.
            rows: The number of rows of the batch.

        Raises:
            SiteError: The module did not compute it. Attention patterns, for example, need eager attention.
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
        """Return the module's input or output with the value replaced."""
        return self.view.write(whole, rearrange(new, "row seq d -> (row seq) d") if self.listed else new)

    def before(self) -> "Part":
        """Return the part for the same module's input."""
        return replace(self, side="input")

    def split(self, value: Tensor) -> Tensor:
        """Convert a value to TransformerLens's shape: `batch seq (head d_head)` becomes `batch seq head d_head`."""
        return value if self.heads is None else rearrange(value, "... (head d) -> ... head d", head=self.heads)

    def join(self, value: Tensor) -> Tensor:
        """Convert a value back from TransformerLens's shape."""
        return value if self.heads is None else rearrange(value, "... head d -> ... (head d)")
