"""Directions that carry safety: one orthonormal basis per layer, from paired or labelled activations."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens import notebooks
from guardlens.activations import Activations
from guardlens.errors import MismatchError, NumericsError, SiteError
from guardlens.queries import require_labels
from guardlens.sites import require_same_space
from guardlens.storage import Provenance, digest, load_tensors, require_same_model, save_tensors

ORTHONORMAL = 1e-2
"""How far the products of rows may be from 0 and 1: as far as bfloat16 rounds them."""


@dataclass(frozen=True, eq=False)
class Directions:
    """A basis of `rank` directions in each layer, the harmful side positive.

    Attributes:
        vectors: Orthonormal rows (zero where there is no direction: at a layer at which no query differs from another).
        layers: The layer of each index of the first axis; None for a single basis that serves every layer.
        harmful_mean: Mean state of the harmful queries (nan where it is not known).
        harmless_mean: Mean state of the harmless queries.
        spectrum: Singular values of the paired differences, largest first (empty where there are none).
        method: How they were made.
        hook: The hook that they were read at.
        provenance: Whose they are; another model refuses them.

    Raises:
        MismatchError: Other than one basis per layer.
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

    def __post_init__(self) -> None:
        if len(self.vectors) != (1 if self.layers is None else len(self.layers)):
            raise MismatchError(f"{len(self.vectors)} bases for the layers {self.layers}", "one basis per layer", "index both together")
        products = self.vectors.double() @ self.vectors.double().transpose(1, 2)
        off = products - torch.diag_embed((products.diagonal(dim1=1, dim2=2) > 0).double())
        if off.numel() and not off.abs().max() < ORTHONORMAL:
            raise NumericsError(
                f"directions whose products are {off.abs().max():.2g} off those of orthonormal ones",
                "unit vectors at right angles in each layer",
                "normalise them, as directions.from_vectors does; torch.linalg.qr makes right angles",
            )

    @property
    def rank(self) -> int:
        """How many directions each layer has."""
        return self.vectors.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.vectors.shape[2]

    def index(self, layer: int) -> int:
        """Where `layer` is on the first axis.

        Raises:
            SiteError: There is no basis for it.
        """
        if self.layers is None:
            return 0
        if layer not in self.layers:
            raise SiteError(f"layer {layer} for directions of {list(self.layers)}", "a layer that has them", "collect that layer too")
        return self.layers.index(layer)

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
        if not 1 <= rank <= self.rank:
            raise NumericsError(f"rank {rank}", f"a rank from 1 to {self.rank}", "make the directions with a higher rank")
        return replace(self, vectors=self.vectors[:, :rank])

    def coordinates(self, activations: Activations) -> Float[Tensor, "query layer rank"]:
        """Each state's coordinates along the directions of its layer.

        Raises:
            MismatchError: Another width, or states of another space.
        """
        require_same_space(f"the directions {self.method!r}", self.hook, activations.hook)
        if activations.d_model != self.d_model:
            raise MismatchError(
                f"states of width {activations.d_model}", f"width {self.d_model}, the directions' own", "use one model for both"
            )
        along = [activations.at(layer).to(self.vectors) @ self.at(layer).T for layer in activations.layers]
        return torch.stack(along, dim=1)

    def cosine(self, other: "Directions") -> Float[Tensor, "layer"]:
        """The cosine of the first direction of each layer with that of another set: do two estimators, or two sets of pairs, agree?

        One layer's directions serve every layer: `ssd.cosine(ssd[5])` says how far each layer's direction is that of layer 5.

        Raises:
            MismatchError: Another width or space, or another model's.
            SiteError: The other set has no basis for a layer.

        Examples:
            >>> bool((ssd.cosine(directions.diff_in_means(text))[4:] > 0.95).all())  # the later layers
            True
        """
        require_same_space(f"the directions {self.method!r}", self.hook, other.hook)
        require_same_model(f"the directions {other.method!r}", other.provenance.model, self.provenance.model)
        if other.d_model != self.d_model:
            raise MismatchError(f"directions of the widths {self.d_model} and {other.d_model}", "one width", "use one model for both")
        first = [other.vectors[other.index(layer), 0] for layer in self.layers] if self.layers else [other.vectors[0, 0]]
        return torch.nn.functional.cosine_similarity(self.vectors[:, 0], torch.stack(first).to(self.vectors), dim=-1)

    @property
    def shares(self) -> Float[Tensor, "layer value"]:
        """How much of the paired differences each direction holds: its part of the sum of squared singular values, from 0 to 1.

        Examples:
            >>> first = ssd.shares[:, 0]  # of v1, layer by layer
            >>> bool((first > 0.5).all())
            True
        """
        power = self.spectrum**2
        return power / power.sum(dim=1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)

    @property
    def midpoints(self) -> Float[Tensor, "layer"]:
        """The point between the class means along the first direction."""
        return torch.einsum("ld,ld->l", (self.harmful_mean + self.harmless_mean) / 2, self.vectors[:, 0])

    @property
    def fingerprint(self) -> str:
        """Changes with the vectors and the layers."""
        return digest(self.vectors.numpy().tobytes(), repr(self.layers).encode())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header = {"layers": self.layers, "method": self.method, "hook": self.hook, "provenance": asdict(self.provenance)}
        save_tensors(path, "directions", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "Directions":
        """Read what `save` wrote.

        Raises:
            StorageError: Not such a file.
        """
        tensors, header = load_tensors(path, "directions")
        layers = None if header["layers"] is None else tuple(header["layers"])
        return cls(**tensors, layers=layers, method=header["method"], hook=header["hook"], provenance=Provenance(**header["provenance"]))

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

        from guardlens import plots

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

        Examples:
            >>> beside = gl.collect(model, pairs, grey)
            >>> llm, vlm = ssd.plot_coordinates({"LLM": text, "VLM": beside}, layer=5)
            >>> vlm.get_xlabel()
            'projection on $v_1$, layer 5'
        """
        import pandas as pd

        from guardlens import plots

        direction, threshold = self.at(layer)[0], float(self.midpoints[self.index(layer)])
        rows = [
            {"run": name, "label": query.label or "", "coordinate": float(value), "threshold": threshold}
            for name, run in runs.items()
            for query, value in zip(run.queries, run.at(layer) @ direction, strict=True)
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


def ssd(activations: Activations, rank: int = 1) -> Directions:
    """Safety steering directions: the first right singular vectors of the paired differences.

    With the rows h(harmful) - h(harmless) of A, not centred, A = U S V^T; row m of the result is the m-th row of V^T,
    its sign chosen so that the mean of A v is positive.

    Args:
        activations: Of `QueryPairs`; in VLM-Guard, of the LLM (text only), at the last token of the prompt.
        rank: How many directions, from 1 to the number of pairs.

    Raises:
        QueryError: The queries come in no pairs.
        NumericsError: The rank is larger than the number of pairs or the width.

    Source: VLM-Guard (Liu, Wang, Xiao, Chen 2025, arXiv 2502.10486).

    Examples:
        >>> two = directions.ssd(text, rank=2)
        >>> two.at(5).shape  # rank, d_model
        torch.Size([2, 128])
        >>> harmful, harmless = two.coordinates(text)[:, :, 0].split(100)  # along the first one
        >>> bool((harmful.mean(dim=0) > harmless.mean(dim=0)).all())
        True
    """
    harmful, harmless = activations.pairs()
    most = min(len(harmful), activations.d_model)
    if not 1 <= rank <= most:
        raise NumericsError(f"rank {rank} of {len(harmful)} pairs", f"a rank from 1 to {most}", "ask for a lower rank, or give more pairs")
    found = []
    for layer in activations.layers:
        states = activations.at(layer).double()
        differences = states[harmful] - states[harmless]
        _, values, rows = torch.linalg.svd(differences, full_matrices=False)
        toward = (differences @ rows[:rank].T).sum(0)
        found.append((torch.where(toward[:, None] < 0, -rows[:rank], rows[:rank]), values))
    vectors, spectrum = (torch.stack(each) for each in zip(*found, strict=True))
    return _directions(activations, vectors, spectrum, f"ssd(rank={rank})", *_means(activations, harmful, harmless))


def diff_in_means(activations: Activations) -> Directions:
    """The unit vector from the harmless to the harmful mean.

    Args:
        activations: Of labelled queries of both classes; pairs are not needed.

    Raises:
        QueryError: A label is missing, or all are the same.

    Source: Arditi et al. 2024 (arXiv 2406.11717), there unnormalised.

    Examples:
        >>> mean = directions.diff_in_means(text)
        >>> bool((mean.at(5)[0] @ ssd.at(5)[0]) > 0.9)  # close to the first singular vector
        True
    """
    require_labels(activations.queries)
    harmful = torch.from_numpy(activations.harmful)
    means = _means(activations, harmful, ~harmful)
    vectors = torch.nn.functional.normalize(means[0] - means[1], dim=-1)[:, None]
    return _directions(activations, vectors, vectors.new_zeros(len(vectors), 0), "diff_in_means()", *means)


def random(like: Directions, seed: int = 0) -> Directions:
    """Random orthonormal rows in the shape of others, each layer its own: the control for every claim about a direction.

    Examples:
        >>> control = directions.random(ssd, seed=1)
        >>> control.vectors.shape == ssd.vectors.shape, bool(abs(control.at(5)[0] @ ssd.at(5)[0]) < 0.5)
        (True, True)
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(like.vectors.shape, generator=generator, dtype=torch.float64).transpose(1, 2)
    vectors = torch.linalg.qr(gaussian).Q.transpose(1, 2).to(like.vectors)
    return replace(like, vectors=vectors, spectrum=like.spectrum[:, :0], method=f"random(seed={seed})")


def from_vectors(
    vectors: Float[Tensor, "*axes d_model"],
    *,
    model: str = "",
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    method: str = "from_vectors",
) -> Directions:
    """Directions of your own: of another tool, a file, a formula. Rows are normalised; their order and signs are kept.

    Args:
        vectors: One vector, of shape `d_model`; one per layer, `layer d_model`; or several at right angles, `layer rank d_model`.
        model: `model.id` of the model that they are for, so that others refuse them; empty for any.
        layers: The layer of each index of the first axis; None for one basis that serves every layer.
        hook: The hook whose states they are directions of.
        method: A name for them, as it appears in plans and tables.

    Returns:
        Directions without class means, and so without midpoints: a gate on them needs a threshold in numbers.

    Raises:
        MismatchError: Other than one basis per layer.
        NumericsError: Rows of a layer that are not at right angles, or not finite.

    Examples:
        >>> mine = directions.from_vectors(torch.ones(128), model=model.id, method="ones")
        >>> mine, round(float(mine.vectors.norm()), 3)
        (Directions(ones, rank 1, every layer, d_model 128), 1.0)
    """
    rows = torch.nn.functional.normalize(vectors.detach().cpu().float(), dim=-1)
    rows = rows.reshape(-1, *rows.shape[-2:]) if rows.ndim > 2 else rows.reshape(-1, 1, rows.shape[-1])
    unknown = torch.full_like(rows[:, 0], float("nan"))
    given = None if layers is None else tuple(layers)
    return Directions(rows.contiguous(), given, unknown, unknown, rows.new_zeros(len(rows), 0), method, hook, Provenance(model))


def _means(activations: Activations, harmful: Tensor, harmless: Tensor) -> list[Float[Tensor, "layer d_model"]]:
    """The mean states of both classes, a layer at a time: the states may be mapped from a file that is larger than memory."""
    by_layer = [[activations.at(layer)[chosen].double().mean(0) for layer in activations.layers] for chosen in (harmful, harmless)]
    return [torch.stack(means) for means in by_layer]


def _directions(activations: Activations, vectors: Tensor, spectrum: Tensor, method: str, harmful: Tensor, harmless: Tensor) -> Directions:
    return Directions(
        vectors.float().contiguous(),
        activations.layers,
        harmful.float(),
        harmless.float(),
        spectrum.float(),
        method,
        activations.hook,
        activations.provenance,
    )
