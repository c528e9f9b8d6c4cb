"""Hidden states as data: the whole tensors of one run (`ActivationCache`) and one vector per query and layer (`Activations`)."""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardlens.data.activation_store import KIND, TENSOR, states_in
from guardlens.data.queries import Query, counted
from guardlens.errors import MismatchError, NumericsError, QueryError, SiteError, as_count, quoted, require_type, warn
from guardlens.hooks import HOOKS, Point, layer_index, numbered, parse
from guardlens.results import notebook_html as notebooks
from guardlens.results.files import load_tensors, reading, require_path, save_tensors
from guardlens.results.provenance import Provenance

Components = Float[Tensor, "component batch seq d"]


class ActivationCache(Mapping[str, Tensor]):
    """Hook name -> tensor, as in TransformerLens.

    Shapes, padding included: the residual stream and what is added to it `batch seq d_model`; queries, keys, values and z
    `batch seq head d_head`; the neurons of MLPs `batch seq d_mlp`; patterns `batch head query key`; the eye and the projector as the
    family has them.

    Args:
        tensors: The values.
        n_layers: Blocks of the model.
        to_logits: Final norm and unembedding, for the logit lens.
        residual_scale: What the model multiplies attention and MLP by before it adds them.

    Examples:
        >>> logits, cache = model.run_with_cache("how to mend the hat ?", grey)
        >>> cache["blocks.5.hook_resid_post"].shape  # batch, token, d_model; the same as cache["resid_post", 5]
        torch.Size([1, 27, 128])
        >>> cache["z", -1].shape  # of the last layer: batch, token, head, d_head
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
        self._tensors, self._n_layers = dict(tensors), n_layers
        self._to_logits, self._residual_scale = to_logits, residual_scale

    def __getitem__(self, key: Any) -> Tensor:
        name, layer = _asked(key)
        point = parse(name, self._n_layers)
        if layer is not None:
            point = replace(point, layer=layer + self._n_layers if layer < 0 else layer)
        if point.layer is None and HOOKS[point.hook].layered:
            short = point.hook
            raise SiteError(f"{key!r} without a layer", f"one, as in ({short!r}, 3)", f"name it, or take cache.stack({short!r})")
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
        """One hook of every layer that the cache holds.

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
        """The residual stream as it grows: before each block, and at the end of the last one.

        Args:
            layer: Up to the input of this block; all blocks if None.
            incl_mid: Also between attention and MLP.

        Returns:
            The states, and their names: `0_pre`, `0_mid`, ..., `final_post`.

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
        """What the residual stream is the sum of, before a block (after the last if None).

        Returns:
            The terms, and their names: `embed` (all that enters the first block: tokens, images, learned positions), `0_attn_out`,
            `0_mlp_out`, ...; `0_between` is what a family adds between two blocks (DeepStack), and `0_rest` what a block does besides.

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
            added = [(f"{i}_{hook}", self[hook, i] * self._residual_scale) for hook in ("attn_out", "mlp_out") if (hook, i) in self]
            rest = self["resid_post", i] - self["resid_pre", i] - sum(term for _, term in added)
            between = self["resid_pre", i + 1] - self["resid_post", i] if i + 1 < self._n_layers else rest[:0]
            terms |= dict(added) | {name: term for name, term in ((f"{i}_rest", rest), (f"{i}_between", between)) if self._matters(term, i)}
        return torch.stack(list(terms.values())), list(terms)

    def logit_lens(self, pos_slice: int | slice = -1) -> Float[Tensor, "layer ..."]:
        """The logits that each block's residual stream would give if the model ended there.

        Args:
            pos_slice: Columns to look at; the last one by default. (All of them are `layer batch seq vocab` numbers: often gigabytes.)

        Raises:
            SiteError: A column that there is not.
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
        """How many blocks come before one; all of them if None."""
        return self._n_layers if layer is None else as_count(layer, "layer", SiteError, "name a block, or leave it out for all", least=0)

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
        """Whether a term is more than rounding."""
        scale = self["resid_post", layer].abs().amax()
        return term.numel() > 0 and bool(term.abs().amax() > 50 * torch.finfo(term.dtype).eps * scale)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, without what `logit_lens` needs of the model."""
        tensors = {point.name: tensor for point, tensor in self._tensors.items()}
        save_tensors(path, "cache", tensors, {"n_layers": self._n_layers, "residual_scale": self._residual_scale})

    @classmethod
    def load(cls, path: str | Path) -> "ActivationCache":
        """Read what `save` wrote.

        Raises:
            StorageError: Not such a file.
        """
        tensors, header = load_tensors(path, "cache", verify=False)
        with reading(Path(path), "a cache that this version saved"):
            points = sorted((parse(name) for name in tensors), key=lambda point: point.order)
            return cls({point: tensors[point.name] for point in points}, header["n_layers"], None, header["residual_scale"])

    def __repr__(self) -> str:
        names = list(self)
        return f"ActivationCache({len(self)} hooks{f', {names[0]} to {names[-1]}' if names else ''})"


def _asked(key: object) -> tuple[str, int | None]:
    """The hook and the layer of a key."""
    match key:
        case str():
            return key, None
        case (str() as name, layer) if isinstance(layer, SupportsIndex):
            return name, operator.index(layer)
    raise SiteError(f"the key {quoted(key)}", "a hook name, or one with a layer", "say cache['resid_post', 3]")


@dataclass(frozen=True, eq=False)
class Activations:
    """One state per query and layer.

    Attributes:
        states: The states, in float32 (or bfloat16, if they were collected so); of a file, mapped into memory.
        layers: The layer that each index of the second axis is.
        queries: The query that each index of the first axis is (images left out when saved).
        hook: The hook that was read.
        positions: The tokens that were read (averaged where several).
        presentation: The name of the presentation.
        provenance: Model, template, versions, date.
        intervention: What was changed in the run, as its intervention says; empty for a run as it is.
        shows_images: Whether a query was shown an image.
        checked: Whether all states are known to be finite, as those of a file are.

    Raises:
        NumericsError: A state is NaN or infinite (layer and query are named), or states are no floating-point numbers.
        MismatchError: As many queries or layers as axes are expected.
        SiteError: There is no such hook, or a layer is none or there twice.

    Examples:
        >>> text.states.shape  # query, layer, d_model
        torch.Size([200, 8, 128])
        >>> harmful, harmless = text.pairs()
        >>> (text.at(5)[harmful] - text.at(5)[harmless]).shape  # the paired differences at layer 5
        torch.Size([100, 128])
        >>> text.save("text.safetensors")
        >>> gl.Activations.load("text.safetensors")
        Activations(resid_post at 'last', 'text', 200 queries, 8 layers, d_model 128)
    """

    states: Float[Tensor, "query layer d_model"]
    layers: tuple[int, ...]
    queries: tuple[Query, ...]
    hook: str = "resid_post"
    positions: Any = "last"
    presentation: str = "text"
    provenance: Provenance = field(default_factory=Provenance)
    intervention: str = ""
    shows_images: bool = False
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        object.__setattr__(self, "layers", numbered(self.layers, self.hook))
        require_type(self.states, Tensor, MismatchError, "hand in a tensor: query, layer, d_model")
        for query in self.queries if isinstance(self.queries, Sequence) else (None,):
            require_type(query, Query, QueryError, "hand in the queries, in the order of the states")
        if not self.states.is_floating_point():
            raise NumericsError(f"states of the dtype {self.states.dtype}", "floating-point numbers", "say states.float()")
        if self.states.shape[:2] != (len(self.queries), len(self.layers)):
            raise MismatchError(
                f"states of shape {tuple(self.states.shape)} for {len(self.queries)} queries and {len(self.layers)} layers",
                "one state per query and layer",
                "index states, queries and layers together",
            )
        if not checked:
            require_finite(self.states, self.queries, self.layers)

    @property
    def harmful(self) -> Bool[np.ndarray, "query"]:
        """Which queries are harmful."""
        return np.array([query.label == "harmful" for query in self.queries])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.states.shape[-1]

    def pairs(self) -> tuple[Int[Tensor, "pair"], Int[Tensor, "pair"]]:
        """Indices of the harmful queries and of their harmless twins.

        Warns:
            UserWarning: Queries whose twin is missing, which are left out.

        Raises:
            QueryError: There is no pair, or one has a side twice.
        """
        sides: dict[str, dict[str | None, int]] = {}
        for index, query in enumerate(self.queries):
            if query.pair and sides.setdefault(query.pair, {}).setdefault(query.label, index) != index:
                raise QueryError(
                    f"two {query.label} queries in pair {query.pair!r}", "one harmful and one harmless", "name the pairs apart"
                )
        whole = [side for side in sides.values() if set(side) == {"harmful", "harmless"}]
        if not whole:
            raise QueryError(
                f"{len(self.queries)} queries without a single pair", "harmful queries with harmless twins", "collect QueryPairs"
            )
        if lame := len(sides) - len(whole):
            warn(f"{lame} of {len(sides)} pairs lack a twin and are left out")
        return torch.tensor([side["harmful"] for side in whole]), torch.tensor([side["harmless"] for side in whole])

    def at(self, layer: int) -> Float[Tensor, "query d_model"]:
        """The states of one layer.

        Raises:
            SiteError: The layer was not collected.
        """
        return self.states[:, layer_index(self.layers, layer, f"states of {self.hook}")]

    def select(self, which: Iterable[int] | Int[np.ndarray, "chosen"] | Bool[np.ndarray, "query"]) -> "Activations":
        """The same of some queries alone, or of queries drawn anew.

        Args:
            which: Indices in the order wanted, or a mask. A query that is taken several times counts as often, and so does its pair:
                `directions.ssd(fit.select(np.concatenate([chosen, chosen + n])))` is of a resample of its n pairs.

        Raises:
            QueryError: None is left, or it is neither a mask of all queries nor indices of some.

        Examples:
            >>> text.select(text.harmful)
            Activations(resid_post at 'last', 'text', 100 queries, 8 layers, d_model 128)
        """
        indices = _chosen(which, len(self.queries))
        seen: Counter[int] = Counter()
        queries = []
        for index in indices.tolist():
            query, again = self.queries[index], seen[index]
            queries.append(replace(query, pair=f"{query.pair} ({again + 1})") if again and query.pair else query)
            seen[index] += 1
        return replace(self, states=self.states[torch.from_numpy(indices)], queries=tuple(queries))

    def __repr__(self) -> str:
        size = f"{len(self.queries)} queries, {len(self.layers)} layers, d_model {self.d_model}"
        return f"Activations({self.hook} at {self.positions!r}, {self.presentation!r}, {size})"

    def _repr_html_(self) -> str:
        named = {
            "states": " x ".join(map(str, self.states.shape)) + " (query, layer, d_model)",
            "queries": counted(self.queries),
            "layers": notebooks.span(self.layers),
            "presentation": self.presentation,
            "hook": self.hook,
            "positions": self.positions,
            "model": self.provenance.model,
        }
        return notebooks.captioned(repr(self), notebooks.facts(named))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_tensors(path, KIND, {TENSOR: self.states}, self.header)

    @property
    def header(self) -> dict[str, Any]:
        """Everything but the states and the queries' images, as JSON has it."""
        facts = {f: getattr(self, f) for f in ("layers", "hook", "positions", "presentation", "intervention", "shows_images")}
        queries = [{**asdict(replace(query, images=())), "images": ()} for query in self.queries]
        return {**facts, "queries": queries, "provenance": asdict(self.provenance)}

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> "Activations":
        """Read what `save` wrote, or `gl.collect(..., out=path)`. States are mapped into memory: only what is used is read from the disk.

        Args:
            path: The file or the directory.
            verify: Read all states once, and compare them with the checksums that were written with them.

        Raises:
            StorageError: Not such a file or directory, one that is not finished, or (with `verify`) other states than were written.
        """
        path = require_path(path)
        streamed = path.is_dir()
        file = states_in(path, verify=verify) if streamed else path
        tensors, header = load_tensors(file, KIND, verify=verify and not streamed)
        with reading(file, "activations that this version saved"):
            return cls._of(tensors, header)

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "Activations":
        positions = header["positions"]
        return cls(
            tensors[TENSOR],
            tuple(header["layers"]),
            tuple(Query(**{**query, "images": ()}) for query in header["queries"]),
            header["hook"],
            tuple(positions) if isinstance(positions, list) else positions,
            header["presentation"],
            Provenance(**header["provenance"]),
            header.get("intervention", ""),
            header.get("shows_images", False),
            checked=True,
        )


def _chosen(which: Any, n: int) -> Int[np.ndarray, "chosen"]:
    """Indices of n things, from 0, that indices or a mask choose.

    Raises:
        QueryError: It is neither, or chooses nothing.
    """
    whole = hasattr(which, "__array__") or isinstance(which, str) or not isinstance(which, Iterable)
    given = np.asarray(which if whole else list(which))
    mask = given.dtype == bool and given.shape == (n,)
    indices = given.dtype.kind in "iu" and given.ndim == 1 and bool(((given >= -n) & (given < n)).all())
    if given.size and not (mask or indices):
        raise QueryError(
            f"a selection by {given.dtype} of shape {given.shape} among {n} queries",
            f"a mask of {n}, or whole numbers from 0 to {n - 1}",
            "check what it was made for",
        )
    chosen = given.nonzero()[0] if mask else given.astype(int) % n
    if not len(chosen):
        raise QueryError("a selection without a single query", "at least one", "check the mask or the indices")
    return chosen


def require_finite(
    states: Float[Tensor, "query layer d"], queries: tuple[Query, ...], layers: tuple[int, ...], where: str = "layer"
) -> None:
    """Refuse NaN and infinity.

    Raises:
        NumericsError: The first query and layer are named.
    """
    bad = ~torch.isfinite(states).all(dim=-1)
    if bad.any():
        query, layer = (int(i) for i in bad.nonzero()[0])
        raise NumericsError(
            f"NaN or infinity in {where} {layers[layer]}, query {queries[query].id!r} ({int(bad.sum())} states in all)",
            "finite numbers",
            "load the model in bfloat16 or float32 instead of float16, or weaken the edit",
        )
