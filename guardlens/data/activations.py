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
from guardlens.data.queries import Query, label_counts, sides_of_pairs
from guardlens.errors import MismatchError, NumericsError, QueryError, require_type, warn
from guardlens.hooks import axis_layers, layer_index
from guardlens.results import notebook_html as notebooks
from guardlens.results.files import load_tensors, reading, require_path, save_tensors
from guardlens.results.provenance import Provenance


@dataclass(frozen=True, eq=False)
class Activations:
    """One state per query and layer.

    Attributes:
        states: The states, in float32 or bfloat16. States from a file are mapped into memory.
        layers: The layer of each index of the second axis.
        queries: The query of each index of the first axis. Their images are left out when saved.
        hook: The hook that was read.
        positions: The tokens that were read. The states of several tokens are averaged.
        presentation: The name of the presentation.
        provenance: The model, its chat template, library versions and the date.
        intervention: The `repr` of the intervention under which the states were read; empty for unedited forward passes.
        shows_images: Whether any query was presented with an image.
        checked: Whether the states are already known to be finite, which skips the check.

    Raises:
        NumericsError: A state is NaN or infinite (its layer and query are named), or the states are not floating-point numbers.
        MismatchError: The number of queries or layers differs from the shape of the states.
        SiteError: The hook does not exist, or a layer is invalid or appears twice.

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
        require_type(self.states, Tensor, MismatchError, "pass a tensor of shape query, layer, d_model")
        for query in self.queries if isinstance(self.queries, Sequence) else (None,):
            require_type(query, Query, QueryError, "pass the queries in the order of the states")
        if not self.states.is_floating_point():
            raise NumericsError(f"states of the dtype {self.states.dtype}", "floating-point numbers", "convert them with states.float()")
        if self.states.shape[:2] != (len(self.queries), len(self.layers)):
            raise MismatchError(
                f"states of shape {tuple(self.states.shape)} for {len(self.queries)} queries and {len(self.layers)} layers",
                "one state per query and layer",
                "select states, queries and layers together",
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
        """Return the indices of the harmful queries and of their harmless twins.

        Warns:
            UserWarning: The twins of some queries are missing. These queries are left out.

        Raises:
            QueryError: There is no pair, or two queries of a pair have the same label.
        """
        sides = sides_of_pairs(self.queries)
        complete = [side for side in sides.values() if set(side) == {"harmful", "harmless"}]
        if not complete:
            found = f"{len(self.queries)} queries without a single pair"
            raise QueryError(found, "harmful queries with harmless twins", "collect QueryPairs")
        if len(complete) < len(sides):
            warn(f"{len(sides) - len(complete)} of {len(sides)} pairs lack a twin and are left out")
        return torch.tensor([side["harmful"] for side in complete]), torch.tensor([side["harmless"] for side in complete])

    def at(self, layer: int) -> Float[Tensor, "query d_model"]:
        """Return the states of one layer.

        Raises:
            SiteError: The layer was not collected.
        """
        return self.states[:, layer_index(self.layers, layer, f"states of {self.hook}")]

    def select(self, which: Iterable[int] | Int[np.ndarray, "chosen"] | Bool[np.ndarray, "query"]) -> "Activations":
        """Return the activations of some of the queries, or of a resample of them.

        Args:
            which: A mask, or indices in the order of the result. A query that is selected several times counts as often, and so does its
                pair: `directions.ssd(fit.select(np.concatenate([chosen, chosen + n])))` uses a resample of the n pairs.

        Raises:
            QueryError: The selection is empty, or it is neither a mask of all queries nor valid indices.

        Examples:
            >>> text.select(text.harmful)
            Activations(resid_post at 'last', 'text', 100 queries, 8 layers, d_model 128)
        """
        indices = _as_indices(which, len(self.queries))
        seen: Counter[int] = Counter()
        queries = []
        for index in indices.tolist():
            query = self.queries[index]
            seen[index] += 1
            if query.pair and seen[index] > 1:
                query = replace(query, pair=f"{query.pair} ({seen[index]})")
            queries.append(query)
        return replace(self, states=self.states[torch.from_numpy(indices)], queries=tuple(queries))

    def __repr__(self) -> str:
        size = f"{len(self.queries)} queries, {len(self.layers)} layers, d_model {self.d_model}"
        return f"Activations({self.hook} at {self.positions!r}, {self.presentation!r}, {size})"

    def _repr_html_(self) -> str:
        shown = {
            "states": " x ".join(map(str, self.states.shape)) + " (query, layer, d_model)",
            "queries": label_counts(self.queries),
            "layers": notebooks.span(self.layers),
            "presentation": self.presentation,
            "hook": self.hook,
            "positions": self.positions,
            "model": self.provenance.model,
        }
        return notebooks.captioned(repr(self), notebooks.facts(shown))

    def save(self, path: str | Path) -> None:
        """Write the activations to a safetensors file."""
        save_tensors(path, KIND, {TENSOR: self.states}, self.header)

    @property
    def header(self) -> dict[str, Any]:
        """Everything but the states and the queries' images, as values for JSON."""
        facts = {f: getattr(self, f) for f in ("layers", "hook", "positions", "presentation", "intervention", "shows_images")}
        queries = [{**asdict(replace(query, images=())), "images": ()} for query in self.queries]
        return {**facts, "queries": queries, "provenance": asdict(self.provenance)}

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> "Activations":
        """Load activations from a file of `save` or a directory of `gl.collect(..., out=directory)`.

        The states are mapped into memory, so that the disk is read only where they are used.

        Args:
            path: The file or the directory.
            verify: Read all states once, and compare them with the checksums in the file or directory.

        Raises:
            StorageError: The path holds no activations, the collection is unfinished, or (with `verify`) a checksum differs.
        """
        path = require_path(path)
        streamed = path.is_dir()
        file = states_in(path, verify=verify) if streamed else path
        tensors, header = load_tensors(file, KIND, verify=verify and not streamed)
        with reading(file, "activations that this version saved"):
            return cls._from_file(tensors, header)

    @classmethod
    def _from_file(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "Activations":
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


def _as_indices(which: Any, n: int) -> Int[np.ndarray, "chosen"]:
    """Return a mask of n queries, or indices of some of them, as indices from 0 up.

    Raises:
        QueryError: The selection is empty, or is neither a mask nor valid indices.
    """
    array_like = hasattr(which, "__array__") or isinstance(which, str) or not isinstance(which, Iterable)
    given = np.asarray(which if array_like else list(which))
    is_mask = given.dtype == bool and given.shape == (n,)
    are_indices = given.dtype.kind in "iu" and given.ndim == 1 and bool(((given >= -n) & (given < n)).all())
    if given.size and not (is_mask or are_indices):
        raise QueryError(
            f"a selection by {given.dtype} of shape {given.shape} among {n} queries",
            f"a mask of {n}, or whole numbers from 0 to {n - 1}",
            "check that the selection was made for these queries",
        )
    chosen = given.nonzero()[0] if is_mask else given.astype(int) % n
    if not len(chosen):
        raise QueryError("a selection without a single query", "at least one", "check the mask or the indices")
    return chosen


def require_finite(
    states: Float[Tensor, "query layer d"], queries: tuple[Query, ...], layers: tuple[int, ...], where: str = "layer"
) -> None:
    """Reject states that are NaN or infinite.

    Args:
        states: The states to check.
        queries: The query of each index of the first axis.
        layers: The number of each index of the second axis.
        where: The name of the second axis in the error message.

    Raises:
        NumericsError: A state is not finite. The first one's query and layer are named.
    """
    bad = ~torch.isfinite(states).all(dim=-1)
    if bad.any():
        query, layer = (int(i) for i in bad.nonzero()[0])
        raise NumericsError(
            f"NaN or infinity in {where} {layers[layer]}, query {queries[query].id!r} ({int(bad.sum())} states in all)",
            "finite numbers",
            "load the model in bfloat16 or float32 instead of float16, or weaken the edit",
        )
