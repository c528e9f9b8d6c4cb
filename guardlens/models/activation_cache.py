"""`ActivationCache`: the tensors of one forward pass by hook name, which `model.run_with_cache` returns."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import SiteError, as_count, quoted
from guardlens.hooks import HOOKS, Point, parse
from guardlens.results.files import load_tensors, reading, save_tensors

Components = Float[Tensor, "component batch seq d"]


class ActivationCache(Mapping[str, Tensor]):
    """A mapping from hook names to tensors, as in TransformerLens.

    Shapes, padding included: `batch seq d_model` for the residual stream and everything added to it, `batch seq head d_head` for queries,
    keys, values and z, `batch seq d_mlp` for the neurons of MLPs, and `batch head query key` for attention patterns. The shapes in the
    vision encoder and the projector depend on the family.

    Args:
        tensors: The values.
        n_layers: The number of layers of the model.
        to_logits: The final norm and the unembedding, for the logit lens.
        residual_scale: The factor of the outputs of attention and MLP when the model adds them to the residual stream.

    Examples:
        >>> logits, cache = model.run_with_cache("how to mend the hat ?", grey)
        >>> cache["blocks.5.hook_resid_post"].shape  # batch, token, d_model; the same as cache["resid_post", 5]
        torch.Size([1, 27, 128])
        >>> cache["z", -1].shape  # the last layer: batch, token, head, d_head
        torch.Size([1, 27, 4, 32])
        >>> cache.logit_lens().shape  # layer, batch, vocabulary
        torch.Size([8, 1, 251])
    """

    def __init__(
        self,
        tensors: Mapping[Point, Tensor],
        n_layers: int,
        to_logits: Callable[[Tensor], Tensor] | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        self._tensors = dict(tensors)
        self._n_layers = n_layers
        self._to_logits = to_logits
        self._residual_scale = residual_scale

    def __getitem__(self, key: Any) -> Tensor:
        name, layer = _hook_and_layer(key)
        point = parse(name, self._n_layers)
        if layer is not None:
            point = replace(point, layer=layer + self._n_layers if layer < 0 else layer)
        if point.layer is None and HOOKS[point.hook].layered:
            hook = point.hook
            raise SiteError(f"{key!r} without a layer", f"one, as in ({hook!r}, 3)", f"name it, or take cache.stack({hook!r})")
        if point not in self._tensors:
            raise self._lacks(point.hook, repr(key))
        return self._tensors[point]

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except SiteError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return (point.name for point in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def stack(self, hook: str) -> Float[Tensor, "layer batch ..."]:
        """Stack the values of one hook over all layers in the cache.

        Examples:
            >>> _, cache = model.run_with_cache("how to mend the hat ?")
            >>> cache.stack("mlp_out").shape
            torch.Size([8, 1, 11, 128])
        """
        name = parse(hook).hook
        layers = [tensor for point, tensor in self._tensors.items() if point.hook == name]
        if not layers:
            raise self._lacks(name, repr(hook))
        return torch.stack(layers)

    def accumulated_resid(
        self, layer: int | None = None, incl_mid: bool = False
    ) -> tuple[Float[Tensor, "component batch seq d"], list[str]]:
        """Return the residual stream before each layer, and after the last one.

        Args:
            layer: Stop at the input of this layer; None for all layers.
            incl_mid: Include the states between attention and MLP.

        Returns:
            The states and their names: `0_pre`, `0_mid`, ..., `final_post`.

        Examples:
            >>> _, cache = model.run_with_cache("how to mend the hat ?")
            >>> states, names = cache.accumulated_resid()
            >>> len(states), names[0], names[-1]
            (9, '0_pre', 'final_post')
        """
        stop = self._stop(layer)
        wanted = [(f"{i}_{where}", f"resid_{where}", i) for i in range(stop) for where in ("pre", "mid") if incl_mid or where == "pre"]
        wanted.append(("final_post", "resid_post", stop - 1) if stop == self._n_layers else (f"{stop}_pre", "resid_pre", stop))
        return torch.stack([self[hook, i] for _, hook, i in wanted]), [name for name, _, _ in wanted]

    def decompose_resid(self, layer: int | None = None) -> tuple[Components, list[str]]:
        """Decompose the residual stream before a layer (after the last one if None) into the terms that sum up to it.

        Returns:
            The terms and their names: `embed` (everything that enters the first layer: tokens, images, learned positions), `0_attn_out`,
            `0_mlp_out`, ..., `0_rest` (everything else that a layer adds) and `0_between` (what a family adds between two layers, as
            DeepStack does). Terms of `rest` and `between` that are rounding errors are left out.

        Examples:
            >>> _, cache = model.run_with_cache("how to mend the hat ?")
            >>> terms, names = cache.decompose_resid()
            >>> names[:3]
            ['embed', '0_attn_out', '0_mlp_out']
            >>> torch.allclose(terms.sum(dim=0), cache["resid_post", -1], atol=1e-3)
            True
        """
        stop = self._stop(layer)
        terms = {"embed": self["resid_pre", 0]}
        for i in range(stop):
            terms |= self._terms_of_layer(i)
        return torch.stack(list(terms.values())), list(terms)

    def _terms_of_layer(self, i: int) -> dict[str, Tensor]:
        terms = {f"{i}_{hook}": self[hook, i] * self._residual_scale for hook in ("attn_out", "mlp_out") if (hook, i) in self}
        rest = self["resid_post", i] - self["resid_pre", i] - sum(terms.values())
        if self._matters(rest, i):
            terms[f"{i}_rest"] = rest
        if i + 1 < self._n_layers:
            between = self["resid_pre", i + 1] - self["resid_post", i]
            if self._matters(between, i):
                terms[f"{i}_between"] = between
        return terms

    def logit_lens(self, pos_slice: int | slice = -1) -> Float[Tensor, "layer ..."]:
        """Return the logits that the residual stream after each layer would give if the model ended there.

        Args:
            pos_slice: The columns to use; the last one by default. (All columns make `layer batch seq vocab` numbers, often gigabytes.)

        Raises:
            SiteError: The cache was loaded from a file, which has no model, or the column does not exist.
        """
        if self._to_logits is None:
            raise SiteError("a cache without its model", "one from model.run_with_cache", "call model.to_logits(states) yourself")
        if not isinstance(pos_slice, slice):
            width = self["resid_post", 0].shape[1]
            pos_slice = as_count(pos_slice, "pos_slice", SiteError, f"name a column from {-width} to {width - 1}, or a slice", least=-width)
            if pos_slice >= width:
                raise SiteError(f"column {pos_slice}", f"one of {width}", "count from 0, or from the end: -1 is the last")
        return torch.stack([self._to_logits(self["resid_post", layer][:, pos_slice]) for layer in range(self._n_layers)])

    def _stop(self, layer: int | None) -> int:
        """The number of layers before a layer; all of them if None."""
        return self._n_layers if layer is None else as_count(layer, "layer", SiteError, "name a layer, or leave it out for all", least=0)

    def _lacks(self, hook: str, what: str) -> SiteError:
        if hook == "pattern":
            next_step = 'load the model with attn_implementation="eager", which alone computes patterns'
        else:
            next_step = "ask for it with names_filter"
        layers = [point.layer for point in self._tensors if point.hook == hook]
        kinds = ", ".join(dict.fromkeys(point.hook for point in self._tensors))
        held = f"a layer of {hook} that it holds: {layers}" if any(layer is not None for layer in layers) else f"what it holds: {kinds}"
        return SiteError(f"no {what} in this cache", held, next_step)

    def _matters(self, term: Tensor, layer: int) -> bool:
        """Whether a term is larger than rounding errors."""
        scale = self["resid_post", layer].abs().amax()
        return bool(term.abs().amax() > 50 * torch.finfo(term.dtype).eps * scale)

    def save(self, path: str | Path) -> None:
        """Write the tensors to a safetensors file. A loaded cache has no model, so it has no `logit_lens`."""
        tensors = {point.name: tensor for point, tensor in self._tensors.items()}
        save_tensors(path, "cache", tensors, {"n_layers": self._n_layers, "residual_scale": self._residual_scale})

    @classmethod
    def load(cls, path: str | Path) -> "ActivationCache":
        """Load a cache from a file of `save`.

        Raises:
            StorageError: The file holds no cache.
        """
        tensors, header = load_tensors(path, "cache", verify=False)
        with reading(Path(path), "a cache that this version saved"):
            points = sorted((parse(name) for name in tensors), key=lambda point: point.order)
            return cls({point: tensors[point.name] for point in points}, header["n_layers"], None, header["residual_scale"])

    def __repr__(self) -> str:
        names = list(self)
        return f"ActivationCache({len(self)} hooks{f', {names[0]} to {names[-1]}' if names else ''})"


def _hook_and_layer(key: object) -> tuple[str, int | None]:
    match key:
        case str():
            return key, None
        case (str() as name, layer) if isinstance(layer, SupportsIndex):
            return name, operator.index(layer)
    raise SiteError(f"the key {quoted(key)}", "a hook name, or one with a layer", "say cache['resid_post', 3]")
