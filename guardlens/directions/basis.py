"""An orthonormal basis of safety directions per layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardlens.data.activations import Activations
from guardlens.data.queries import Query
from guardlens.errors import InterventionError, MismatchError, NumericsError, as_count, require_type, warn
from guardlens.hooks import axis_layers, layer_index, parse, require_same_space
from guardlens.results import notebook_html as notebooks
from guardlens.results.files import bytes_of, digest, in_memory, load_tensors, reading, save_tensors
from guardlens.results.provenance import Provenance, require_related

ORTHONORMAL = 1e-2
"""How far the products of rows may be from 0 and 1: as far as bfloat16 rounds them."""


@dataclass(frozen=True, eq=False)
class Directions:
    """A basis of `rank` directions in each layer, the harmful side positive.

    Attributes:
        vectors: Orthonormal rows; zero where there is no direction: at a layer at which no query differs from another, or beyond the
            number of directions in which pairs differ.
        layers: The layer of each index of the first axis; None for a single basis that serves every layer.
        harmful_mean: Mean state of the harmful queries (nan where it is not known).
        harmless_mean: Mean state of the harmless queries.
        spectrum: Singular values of the paired differences, largest first, 0 where they are rounding (empty where there are none).
        method: How they were made.
        hook: The hook that they were read at.
        provenance: Whose they are; another model refuses them.
        made_from: Digests of the texts of the queries that they were made from; empty where these are not known.

    Raises:
        MismatchError: Other than one basis, one mean of each class and one spectrum per layer.
        SiteError: There is no such hook, or a layer is none or there twice.
        NumericsError: Rows that are not orthonormal.

    Examples:
        >>> ssd.coordinates(text).shape  # query, layer, rank
        torch.Size([200, 8, 1])
        >>> ssd.midpoints.shape  # layer: where a gate on them parts harmful from harmless
        torch.Size([8])
        >>> ssd[5]  # the basis of layer 5, for every layer
        Directions(ssd(rank=1)[5], rank 1, every layer, d_model 128)
        >>> ssd.save("ssd.safetensors")
        >>> gl.Directions.load("ssd.safetensors").fingerprint == ssd.fingerprint
        True
    """

    vectors: Float[Tensor, "layer rank d_model"]
    layers: tuple[int, ...] | None
    harmful_mean: Float[Tensor, "layer d_model"]
    harmless_mean: Float[Tensor, "layer d_model"]
    spectrum: Float[Tensor, "layer value"]
    method: str
    hook: str = "resid_post"
    provenance: Provenance = field(default_factory=Provenance)
    made_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", axis_layers(self.layers, self.hook))
        elif self.hook:
            parse(self.hook)
        self._require_shapes()
        products = self.vectors.double() @ self.vectors.double().transpose(1, 2)
        off = products - torch.diag_embed((products.diagonal(dim1=1, dim2=2) > 0).double())
        if not off.abs().max() < ORTHONORMAL:
            raise NumericsError(
                f"directions whose products are {off.abs().max():.2g} off those of orthonormal ones",
                "unit vectors at right angles in each layer",
                "normalise them, as directions.from_vectors does; torch.linalg.qr makes right angles",
            )

    def _require_shapes(self) -> None:
        vectors = self.vectors
        if not (vectors.ndim == 3 and vectors.is_floating_point() and vectors.numel()):
            raise MismatchError(
                f"vectors of shape {tuple(vectors.shape)} in {vectors.dtype}",
                "floating-point numbers of shape layer, rank, d_model",
                "make them with directions.from_vectors",
            )
        n, _, width = vectors.shape
        if n != (1 if self.layers is None else len(self.layers)):
            raise MismatchError(f"{n} bases for the layers {self.layers}", "one basis per layer", "index both together")
        shapes = {"harmful_mean": (n, width), "harmless_mean": (n, width), "spectrum": (n, *self.spectrum.shape[1:2])}
        wrong = next((name for name, shape in shapes.items() if getattr(self, name).shape != shape), None)
        if wrong is not None:
            raise MismatchError(
                f"{wrong} of shape {tuple(getattr(self, wrong).shape)} beside vectors of shape {tuple(vectors.shape)}",
                "means of shape layer, d_model and a spectrum of shape layer, value",
                "index all of them together",
            )

    __iter__ = None  # else `list(directions)` would ask for layer after layer, without an end where one basis serves all

    @property
    def rank(self) -> int:
        """How many directions each layer has."""
        return self.vectors.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.vectors.shape[2]

    @property
    def exists(self) -> Bool[Tensor, "layer"]:
        """At which layers there is a direction.

        Examples:
            >>> bool(ssd.exists.all())
            True
        """
        return self.vectors.any(dim=2).any(dim=1)

    def require_some(self, layers: Iterable[int] | None = None) -> None:
        """Refuse layers without a direction, at which edits would change nothing, gates would never open, and states have no coordinate.

        Args:
            layers: Which ones are used; all without it.

        Raises:
            NumericsError: The layers are named.
            SiteError: There is no basis for a layer.
        """
        names = self.layers or (None,)
        used = range(len(names)) if layers is None else [self.index(layer) for layer in layers]
        if empty := [names[i] for i in used if not self.exists[i]]:
            raise NumericsError(
                f"the directions {self.method!r}, which are zero{'' if self.layers is None else f' at the layers {empty}'}",
                "a direction at each layer that is used",
                "leave these layers out when you collect, or take one layer's directions, as in directions[5]",
            )

    def index(self, layer: int) -> int:
        """Where `layer` is on the first axis.

        Raises:
            SiteError: There is no basis for it.
        """
        return layer_index(self.layers, layer, f"the directions {self.method!r}")

    def at(self, layer: int) -> Float[Tensor, "rank d_model"]:
        """The basis of one layer."""
        return self.vectors[self.index(layer)]

    def __getitem__(self, layer: int) -> "Directions":
        """The basis of one layer, which then serves every layer."""
        i = slice(index := self.index(layer), index + 1)
        fields = {name: getattr(self, name)[i] for name in ("vectors", "harmful_mean", "harmless_mean", "spectrum")}
        return replace(self, **fields, layers=None, method=f"{self.method}[{layer}]")

    def truncate(self, rank: int) -> "Directions":
        """The first `rank` directions of each layer.

        Raises:
            NumericsError: There are not as many.

        Examples:
            >>> directions.ssd(text, rank=3).truncate(1).rank
            1
        """
        if not 1 <= as_count(rank, "rank", NumericsError, f"ask for one from 1 to {self.rank}", least=0) <= self.rank:
            raise NumericsError(f"rank {rank}", f"a rank from 1 to {self.rank}", "make the directions with a higher rank")
        return replace(self, vectors=self.vectors[:, :rank])

    def coordinates(self, activations: Activations) -> Float[Tensor, "query layer rank"]:
        """Each state's coordinates along the directions of its layer.

        Raises:
            MismatchError: Another width, states of another space, or of a model that the directions were not made for.
            NumericsError: There is no direction at a layer of theirs.
        """
        self.require_fit(activations)
        self.require_some(activations.layers)
        along = [activations.at(layer).to(self.vectors) @ self.at(layer).T for layer in activations.layers]
        return torch.stack(along, dim=1)

    def require_fit(self, activations: Activations) -> None:
        """Refuse states that these are no directions of.

        Raises:
            MismatchError: Another width, states of another space, or of a model that the directions were not made for.
        """
        require_type(activations, Activations, MismatchError, "collect states first: gl.collect(model, queries)")
        require_same_space(f"the directions {self.method!r}", self.hook, activations.hook)
        require_related(f"the directions {self.method!r}", self.provenance, activations.provenance)
        if activations.d_model != self.d_model:
            raise MismatchError(
                f"states of width {activations.d_model}", f"width {self.d_model}, the directions' own", "use one model for both"
            )

    def cosine(self, other: "Directions") -> Float[Tensor, "layer"]:
        """The cosine of the first direction of each layer with that of another set: do two estimators, or two sets of pairs, agree?

        One layer's directions serve every layer: `ssd.cosine(ssd[5])` says how far each layer's direction is that of layer 5. nan where one
        of the two is zero.

        Raises:
            MismatchError: Another width or space, or another model's.
            SiteError: The other set has no basis for a layer.

        Examples:
            >>> bool((ssd.cosine(directions.diff_in_means(text))[4:] > 0.95).all())  # the later layers
            True
        """
        require_type(other, Directions, MismatchError, "make others, as with directions.diff_in_means(activations)")
        require_same_space(f"the directions {self.method!r}", self.hook, other.hook)
        require_related(f"the directions {other.method!r}", other.provenance, self.provenance)
        if other.d_model != self.d_model:
            raise MismatchError(f"directions of the widths {self.d_model} and {other.d_model}", "one width", "use one model for both")
        first = [other.vectors[other.index(layer), 0] for layer in self.layers] if self.layers else [other.vectors[0, 0]]
        mine, theirs = self.vectors[:, 0], torch.stack(first).to(self.vectors)
        return torch.nn.functional.cosine_similarity(mine, theirs, dim=-1).where(mine.any(-1) & theirs.any(-1), torch.nan)

    @property
    def shares(self) -> Float[Tensor, "layer value"]:
        """How much of the paired differences each direction holds: its part of the sum of squared singular values, from 0 to 1.

        All 0 at a layer at which pairs don't differ.

        Examples:
            >>> first = ssd.shares[:, 0]  # of v1, layer by layer
            >>> bool((first > 0.5).all())
            True
        """
        power = self.spectrum.double() ** 2
        return (power / power.sum(dim=1, keepdim=True)).nan_to_num(0.0).to(self.spectrum)

    @property
    def midpoints(self) -> Float[Tensor, "layer"]:
        """The point between the class means along the first direction; nan where there is none, or where the means are not known."""
        middle = torch.einsum("ld,ld->l", (self.harmful_mean + self.harmless_mean) / 2, self.vectors[:, 0])
        return middle.where(self.vectors[:, 0].any(-1), torch.nan)

    @property
    def fingerprint(self) -> str:
        """Changes with the vectors and the layers."""
        return digest(bytes_of(self.vectors), repr(self.layers).encode())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header = {name: getattr(self, name) for name in ("layers", "method", "hook", "made_from")} | {"provenance": asdict(self.provenance)}
        save_tensors(path, "directions", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "Directions":
        """Read what `save` wrote.

        Raises:
            StorageError: Not such a file.
        """
        tensors, header = load_tensors(path, "directions")
        with reading(Path(path), "directions that this version saved"):
            layers = None if header["layers"] is None else tuple(header["layers"])
            facts = {"layers": layers, "method": header["method"], "hook": header["hook"], "made_from": tuple(header.get("made_from", ()))}
            return cls(**in_memory(tensors), **facts, provenance=Provenance(**header["provenance"]))

    def plot(self, ax: Any = None) -> Any:
        """How the paired differences spread over directions, layer by layer, and how alike the first directions of the layers are.

        What there is not is left out: a spectrum of directions that were not made of pairs, or layers beside a single one.

        Args:
            ax: Where to draw, one axes per picture; a new figure without it.

        Returns:
            The axes, one per picture (see `plots.spectrum` and `plots.cosines`).

        Raises:
            NumericsError: Neither is there.

        Examples:
            >>> spectrum, cosines = ssd.plot()
        """
        import pandas as pd

        from guardlens.results import plots

        layers = self.layers or (0,)
        shares = [
            {"layer": layer, "index": index + 1, "share": float(value)}
            for layer, values in zip(layers, self.shares, strict=True)
            for index, value in enumerate(values[:10])
        ]
        first = self.vectors[:, 0]
        alike = [
            {"layer": layer, "other": other, "value": float(value)}
            for layer, row in zip(layers, first @ first.T, strict=True)
            for other, value in zip(layers, row, strict=True)
        ]
        return plots.basis(pd.DataFrame(shares), pd.DataFrame(alike if len(layers) > 1 else []), axes=ax)

    def plot_coordinates(self, runs: Mapping[str, Activations], layer: int, ax: Any = None) -> Any:
        """Where the queries of some runs lie along the first direction of a layer, harmful against harmless (see `plots.coordinates`).

        Args:
            runs: Activations by the name that their panel gets.
            layer: Which one to show.
            ax: Where to draw, one axes per run; a new figure without it.

        Returns:
            The axes, one per run. The midpoint of the class means is marked, where these are known.

        Raises:
            MismatchError: States of another width or space, or of a model that the directions were not made for.
            NumericsError: There is no direction at the layer.

        Examples:
            >>> beside = gl.collect(model, pairs, grey)
            >>> llm, vlm = ssd.plot_coordinates({"LLM": text, "VLM": beside}, layer=5)
            >>> vlm.get_xlabel()
            'projection on $v_1$, layer 5'
        """
        import pandas as pd

        from guardlens.results import plots

        self.require_some([layer])
        for run in runs.values():
            self.require_fit(run)
        direction, threshold = self.at(layer)[0], float(self.midpoints[self.index(layer)])
        rows = [
            {"run": name, "label": query.label or "", "coordinate": float(value), "threshold": threshold}
            for name, run in runs.items()
            for query, value in zip(run.queries, run.at(layer).to(direction) @ direction, strict=True)
        ]
        return plots.coordinates(pd.DataFrame(rows), ax, name=f"projection on $v_1$, layer {layer}")

    def __repr__(self) -> str:
        where = "every layer" if self.layers is None else f"{len(self.layers)} layers"
        return f"Directions({self.method}, rank {self.rank}, {where}, d_model {self.d_model})"

    def _repr_html_(self) -> str:
        apart = torch.einsum("ld,ld->l", self.harmful_mean - self.harmless_mean, self.vectors[:, 0])
        rows = [
            {"layer": "all" if self.layers is None else self.layers[i], "class means apart": float(apart[i]), "midpoint": float(midpoint)}
            | {f"share of v{rank + 1}": float(share) for rank, share in enumerate(self.shares[i, : self.rank])}
            for i, midpoint in enumerate(self.midpoints)
        ]
        made = notebooks.facts({"hook": self.hook, "model": self.provenance.model})
        return notebooks.captioned(repr(self), made, notebooks.table(rows))


_TENSORS = ("vectors", "harmful_mean", "harmless_mean", "spectrum")


def warn_of_own_queries(directions: Directions, queries: Sequence[Query]) -> None:
    """Say so where directions are measured on the very queries that they were made from, which they separate better than others.

    Warns:
        UserWarning: As said.

    Examples:
        >>> directions.warn_of_own_queries(ssd, queries)  # quiet: made of other queries
    """
    known = set(directions.made_from)
    own = sum(digest(query.text.encode()) in known for query in queries)
    if own:
        warn(
            f"{own} of the {len(queries)} queries made the directions {directions.method!r}, which part these better than new ones: "
            "measure them on other queries",
        )


def require_directions(directions: Any) -> None:
    """Refuse what are no directions, and such as are zero at a layer.

    Raises:
        InterventionError, NumericsError: As said.
    """
    require_type(directions, Directions, InterventionError, "make directions of a vector of your own: directions.from_vectors(vector)")
    directions.require_some()
