"""An orthonormal basis of safety directions per layer."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardlens.data.activations import Activations
from guardlens.errors import MismatchError, NumericsError, as_count, require_type
from guardlens.hooks import axis_layers, layer_index, parse, require_same_space
from guardlens.results import notebook_html as notebooks
from guardlens.results.files import bytes_of, digest, in_memory, load_tensors, reading, save_tensors
from guardlens.results.provenance import Provenance, require_related

ORTHONORMAL = 1e-2
"""How far the products of rows may be from 0 and 1, which allows for rounding to bfloat16."""


@dataclass(frozen=True, eq=False)
class Directions:
    """An orthonormal basis of `rank` directions in each layer. The harmful side of each direction is positive.

    Attributes:
        vectors: Orthonormal rows. A row is zero if it has no direction, because the queries differ in fewer directions at this layer.
        layers: The layer of each index of the first axis; None for a single basis that serves every layer.
        harmful_mean: The mean state of the harmful queries; nan if it is unknown.
        harmless_mean: The mean state of the harmless queries; nan if it is unknown.
        spectrum: The singular values of the paired differences, largest first, with rounding errors set to 0. Its second axis is empty if
            the directions were not made from pairs.
        method: The estimator, with its arguments.
        hook: The hook whose states the directions were made from; empty for any.
        provenance: The model whose states they were made from. Other models reject the directions.
        made_from: Digests of the texts of the queries that the directions were made from; empty if these are unknown.

    Raises:
        MismatchError: The number of bases, means or spectra differs from the number of layers.
        SiteError: The hook does not exist, or a layer is invalid or appears twice.
        NumericsError: The rows of a layer are not orthonormal.

    Examples:
        >>> ssd.coordinates(text).shape  # query, layer, rank
        torch.Size([200, 8, 1])
        >>> ssd.midpoints.shape  # layer: the default threshold of a gate on these directions
        torch.Size([8])
        >>> ssd[5]  # the basis of layer 5, used at every layer
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
                "normalise them with directions.from_vectors, and make right angles with torch.linalg.qr",
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
            raise MismatchError(f"{n} bases for the layers {self.layers}", "one basis per layer", "select bases and layers together")
        shapes = {"harmful_mean": (n, width), "harmless_mean": (n, width), "spectrum": (n, *self.spectrum.shape[1:2])}
        wrong = next((name for name, shape in shapes.items() if getattr(self, name).shape != shape), None)
        if wrong is not None:
            raise MismatchError(
                f"{wrong} of shape {tuple(getattr(self, wrong).shape)} beside vectors of shape {tuple(vectors.shape)}",
                "means of shape layer, d_model and a spectrum of shape layer, value",
                "select all of them together",
            )

    __iter__ = None  # else `list(directions)` would ask for layer after layer, without an end where one basis serves all

    @property
    def rank(self) -> int:
        """The number of directions in each layer."""
        return self.vectors.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.vectors.shape[2]

    @property
    def exists(self) -> Bool[Tensor, "layer"]:
        """Whether there is a direction at each layer.

        Examples:
            >>> bool(ssd.exists.all())
            True
        """
        return self.vectors.any(dim=2).any(dim=1)

    def require_some(self, layers: Iterable[int] | None = None) -> None:
        """Reject layers without a direction, where edits would change nothing and gates would never open.

        Args:
            layers: The layers that are used; all by default.

        Raises:
            NumericsError: Some layers, which are named, have no direction.
            SiteError: There is no basis for a layer.
        """
        names = self.layers or (None,)
        used = range(len(names)) if layers is None else [self.index(layer) for layer in layers]
        if empty := [names[i] for i in used if not self.exists[i]]:
            raise NumericsError(
                f"the directions {self.method!r}, which are zero{'' if self.layers is None else f' at the layers {empty}'}",
                "a direction at each layer that is used",
                "leave these layers out when you collect, or use the directions of one layer, as in directions[5]",
            )

    def index(self, layer: int) -> int:
        """Return the index of a layer on the first axis.

        Raises:
            SiteError: There is no basis for it.
        """
        return layer_index(self.layers, layer, f"the directions {self.method!r}")

    def at(self, layer: int) -> Float[Tensor, "rank d_model"]:
        """Return the basis of one layer."""
        return self.vectors[self.index(layer)]

    def __getitem__(self, layer: int) -> "Directions":
        """Return the directions of one layer as directions that serve every layer."""
        index = self.index(layer)
        fields = {name: getattr(self, name)[index : index + 1] for name in _TENSORS}
        return replace(self, **fields, layers=None, method=f"{self.method}[{layer}]")

    def truncate(self, rank: int) -> "Directions":
        """Return the first `rank` directions of each layer.

        Raises:
            NumericsError: The rank is not between 1 and the number of directions.

        Examples:
            >>> directions.ssd(text, rank=3).truncate(1).rank
            1
        """
        if not 1 <= as_count(rank, "rank", NumericsError, f"ask for one from 1 to {self.rank}", least=0) <= self.rank:
            raise NumericsError(f"rank {rank}", f"a rank from 1 to {self.rank}", "make the directions with a higher rank")
        return replace(self, vectors=self.vectors[:, :rank])

    def coordinates(self, activations: Activations) -> Float[Tensor, "query layer rank"]:
        """Return each state's coordinates along the directions of its layer.

        Raises:
            MismatchError: The states have another width, come from another space, or from a model that the directions were not made for.
            NumericsError: There is no direction at a layer of the states.
        """
        self.require_fit(activations)
        self.require_some(activations.layers)
        along = [activations.at(layer).to(self.vectors) @ self.at(layer).T for layer in activations.layers]
        return torch.stack(along, dim=1)

    def require_fit(self, activations: Activations) -> None:
        """Reject states that do not live in the space of these directions.

        Raises:
            MismatchError: The states have another width, come from another space, or from a model that the directions were not made for.
        """
        require_type(activations, Activations, MismatchError, "collect states first: gl.collect(model, queries)")
        require_same_space(f"the directions {self.method!r}", self.hook, activations.hook)
        require_related(f"the directions {self.method!r}", self.provenance, activations.provenance)
        if activations.d_model != self.d_model:
            raise MismatchError(
                f"states of width {activations.d_model}", f"width {self.d_model}, as the directions have", "use one model for both"
            )

    def cosine(self, other: "Directions") -> Float[Tensor, "layer"]:
        """Return the cosine of the first direction of each layer with the first direction of other directions at that layer.

        It says whether two estimators, or two sets of pairs, agree. `ssd.cosine(ssd[5])` compares each layer with layer 5. It is nan
        if one of the two directions is zero.

        Raises:
            MismatchError: The other directions have another width or space, or were made for another model.
            SiteError: The other directions have no basis for a layer.

        Examples:
            >>> bool((ssd.cosine(directions.diff_in_means(text))[4:] > 0.95).all())  # the later layers
            True
        """
        require_type(other, Directions, MismatchError, "pass other directions, such as directions.diff_in_means(activations)")
        require_same_space(f"the directions {self.method!r}", self.hook, other.hook)
        require_related(f"the directions {other.method!r}", other.provenance, self.provenance)
        if other.d_model != self.d_model:
            raise MismatchError(f"directions of the widths {self.d_model} and {other.d_model}", "one width", "use one model for both")
        first = [other.vectors[other.index(layer), 0] for layer in self.layers] if self.layers else [other.vectors[0, 0]]
        mine = self.vectors[:, 0]
        theirs = torch.stack(first).to(self.vectors)
        return torch.nn.functional.cosine_similarity(mine, theirs, dim=-1).where(mine.any(-1) & theirs.any(-1), torch.nan)

    @property
    def shares(self) -> Float[Tensor, "layer value"]:
        """The share of the paired differences along each direction: its part of the sum of squared singular values, from 0 to 1.

        All shares are 0 at a layer where no pair differs.

        Examples:
            >>> first = ssd.shares[:, 0]  # the share of v1 at each layer
            >>> bool((first > 0.5).all())
            True
        """
        power = self.spectrum.double() ** 2
        return (power / power.sum(dim=1, keepdim=True)).nan_to_num(0.0).to(self.spectrum)

    @property
    def midpoints(self) -> Float[Tensor, "layer"]:
        """The midpoint of the class means along the first direction; nan if there is no direction or the means are unknown."""
        middle = torch.einsum("ld,ld->l", (self.harmful_mean + self.harmless_mean) / 2, self.vectors[:, 0])
        return middle.where(self.vectors[:, 0].any(-1), torch.nan)

    @property
    def fingerprint(self) -> str:
        """A digest of the vectors and the layers."""
        return digest(bytes_of(self.vectors), repr(self.layers).encode())

    def save(self, path: str | Path) -> None:
        """Write the directions to a safetensors file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header = {name: getattr(self, name) for name in ("layers", "method", "hook", "made_from")} | {"provenance": asdict(self.provenance)}
        save_tensors(path, "directions", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "Directions":
        """Load directions from a file of `save`.

        Raises:
            StorageError: The file holds no directions.
        """
        tensors, header = load_tensors(path, "directions")
        with reading(Path(path), "directions that this version saved"):
            layers = None if header["layers"] is None else tuple(header["layers"])
            facts = {"layers": layers, "method": header["method"], "hook": header["hook"], "made_from": tuple(header.get("made_from", ()))}
            return cls(**in_memory(tensors), **facts, provenance=Provenance(**header["provenance"]))

    def plot(self, ax: Any = None) -> Any:
        """Plot the shares of the directions layer by layer, and the cosines between the first directions of the layers.

        Directions that were not made from pairs have no shares, and directions of a single layer no cosines; that panel is left out.

        Args:
            ax: The axes to draw on, one per panel; a new figure by default.

        Returns:
            The axes, one per panel (see `plots.spectrum` and `plots.cosines`).

        Raises:
            NumericsError: The directions have neither shares nor several layers.

        Examples:
            >>> spectrum, cosines = ssd.plot()
        """
        from guardlens.results.plots.directions import basis, basis_frames

        first = self.vectors[:, 0].float()
        shares, cosines = basis_frames(self.layers or (0,), self.shares.float().numpy(), (first @ first.T).numpy())
        return basis(shares, cosines, axes=ax)

    def plot_coordinates(self, runs: Mapping[str, Activations], layer: int, ax: Any = None) -> Any:
        """Plot the coordinates of harmful and harmless queries along the first direction of a layer (see `plots.coordinates`).

        Args:
            runs: The title of each panel -> its activations.
            layer: The layer.
            ax: The axes to draw on, one per panel; a new figure by default.

        Returns:
            The axes, one per panel. The midpoint of the class means is marked if the means are known.

        Raises:
            MismatchError: States have another width, come from another space, or from a model that the directions were not made for.
            NumericsError: There is no direction at the layer.

        Examples:
            >>> beside = gl.collect(model, pairs, grey)
            >>> llm, vlm = ssd.plot_coordinates({"LLM": text, "VLM": beside}, layer=5)
            >>> vlm.get_xlabel()
            'projection on $v_1$, layer 5'
        """
        from guardlens.results.plots.directions import coordinates, coordinates_frame

        self.require_some([layer])
        for run in runs.values():
            self.require_fit(run)
        direction = self.at(layer)[0]
        along = {name: (run.at(layer).to(direction) @ direction).float().numpy() for name, run in runs.items()}
        labels = {name: [query.label or "" for query in run.queries] for name, run in runs.items()}
        frame = coordinates_frame(along, labels, threshold=float(self.midpoints[self.index(layer)]))
        return coordinates(frame, ax, name=f"projection on $v_1$, layer {layer}")

    def __repr__(self) -> str:
        where = "every layer" if self.layers is None else f"{len(self.layers)} layers"
        return f"Directions({self.method}, rank {self.rank}, {where}, d_model {self.d_model})"

    def _repr_html_(self) -> str:
        layers = ["all"] if self.layers is None else self.layers
        distances = torch.einsum("ld,ld->l", self.harmful_mean - self.harmless_mean, self.vectors[:, 0])
        rows = []
        for layer, distance, midpoint, shares in zip(layers, distances, self.midpoints, self.shares, strict=True):
            row = {"layer": layer, "class means apart": float(distance), "midpoint": float(midpoint)}
            rows.append(row | {f"share of v{rank + 1}": float(share) for rank, share in enumerate(shares[: self.rank])})
        made = notebooks.facts({"hook": self.hook, "model": self.provenance.model})
        return notebooks.captioned(repr(self), made, notebooks.table(rows))


_TENSORS = ("vectors", "harmful_mean", "harmless_mean", "spectrum")
