"""Hidden states as data: one vector per query and layer."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardlens.data.activation_store import KIND, TENSOR, states_in
from guardlens.data.queries import Query, counted
from guardlens.errors import MismatchError, NumericsError, QueryError, require_type, warn
from guardlens.hooks import axis_layers, layer_index
from guardlens.results import notebook_html as notebooks
from guardlens.results.files import load_tensors, reading, require_path, save_tensors
from guardlens.results.provenance import Provenance


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
        object.__setattr__(self, "layers", axis_layers(self.layers, self.hook))
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
