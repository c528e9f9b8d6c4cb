"""Estimators of safety directions from activations, random directions as a control, and directions from given vectors."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.data.activations import Activations
from guardlens.data.queries import Query, require_labels
from guardlens.directions.basis import Directions
from guardlens.errors import ArgumentError, MismatchError, NumericsError, as_count, require_type, warn
from guardlens.hooks import axis_layers
from guardlens.results.files import digest
from guardlens.results.provenance import Provenance

ROUNDING = 50 * torch.finfo(torch.float32).eps
"""Differences of states below this share of the norm of the states are rounding errors, which have no direction."""


def ssd(activations: Activations, rank: int = 1) -> Directions:
    """Estimate safety steering directions: the first right singular vectors of the paired differences.

    Let A have the rows h(harmful) - h(harmless), which are not centred, and let A = U S V^T. Row m of the result is row m of V^T, with its
    sign chosen so that the mean of A v is positive.

    Args:
        activations: The activations of `QueryPairs`. VLM-Guard uses those of the LLM (text only) at the last token of the prompt.
        rank: The number of directions, from 1 to the number of pairs.

    Warns:
        UserWarning: The pairs differ in fewer than `rank` directions at some layers, which are named, up to rounding in float32. The other
            rows are zero there. Edits, gates and comparisons reject layers without any direction.

    Raises:
        QueryError: The queries are not paired.
        NumericsError: The rank is larger than the number of pairs or the width.

    Source: VLM-Guard (Liu, Wang, Xiao, Chen 2025, arXiv 2502.10486).

    Examples:
        >>> two = directions.ssd(text, rank=2)
        >>> two.at(5).shape  # rank, d_model
        torch.Size([2, 128])
        >>> harmful, harmless = two.coordinates(text)[:, :, 0].split(100)  # along the first direction
        >>> bool((harmful.mean(dim=0) > harmless.mean(dim=0)).all())
        True
    """
    require_type(activations, Activations, MismatchError, "collect states first: gl.collect(model.llm, pairs)")
    harmful, harmless = activations.pairs()
    most = min(len(harmful), activations.d_model)
    if not 1 <= as_count(rank, "rank", NumericsError, f"ask for one from 1 to {most}", least=0) <= most:
        raise NumericsError(f"rank {rank} of {len(harmful)} pairs", f"a rank from 1 to {most}", "ask for a lower rank, or give more pairs")
    found = [
        _ssd_rows(activations.at(layer)[harmful].double(), activations.at(layer)[harmless].double(), rank) for layer in activations.layers
    ]
    vectors, spectrum = (torch.stack(each) for each in zip(*found, strict=True))
    queries = [activations.queries[i] for i in (*harmful, *harmless)]
    return _directions(activations, vectors, spectrum, f"ssd(rank={rank})", _means(activations, harmful, harmless), queries)


def _ssd_rows(
    harmful: Float[Tensor, "pair d_model"], harmless: Float[Tensor, "pair d_model"], rank: int
) -> tuple[Float[Tensor, "rank d_model"], Float[Tensor, "value"]]:
    """The directions of one layer and the singular values. Both are zero where the singular values are rounding errors."""
    differences = harmful - harmless
    _, values, rows = torch.linalg.svd(differences, full_matrices=False)
    values = values.where(values > ROUNDING * torch.cat([harmful, harmless]).norm(), 0)
    rows = rows[:rank] * (values[:rank, None] > 0)
    toward = (differences @ rows.T).sum(0)
    return torch.where(toward[:, None] < 0, -rows, rows), values


def diff_in_means(activations: Activations) -> Directions:
    """Estimate one direction per layer: the unit vector from the harmless to the harmful mean.

    Args:
        activations: The activations of harmful and harmless queries, which need not be paired.

    Warns:
        UserWarning: The means differ only by rounding errors at some layers, which are named. The row is zero there.

    Raises:
        QueryError: A query has no label, or all queries have the same.

    Source: Arditi et al. 2024 (arXiv 2406.11717), who do not normalise the vector.

    Examples:
        >>> mean = directions.diff_in_means(text)
        >>> bool((mean.at(5)[0] @ ssd.at(5)[0]) > 0.9)  # close to the first singular vector
        True
    """
    require_type(activations, Activations, MismatchError, "collect states first: gl.collect(model.llm, queries)")
    require_labels(activations.queries)
    harmful = torch.from_numpy(activations.harmful)
    means = _means(activations, harmful, ~harmful)
    difference = means[0] - means[1]
    size = torch.cat(means, dim=-1).norm(dim=-1, keepdim=True)
    norm = difference.norm(dim=-1, keepdim=True)
    vectors = (difference / norm).where(norm > ROUNDING * size, 0)[:, None]
    return _directions(activations, vectors, vectors.new_zeros(len(vectors), 0), "diff_in_means()", means, activations.queries)


def random(like: Directions, seed: int = 0) -> Directions:
    """Draw random orthonormal rows in the shape of other directions, independently in each layer: the control for claims about directions.

    Rows that are zero in the other directions are zero here, too.

    Raises:
        ArgumentError: The seed is not a whole number from 0 up.

    Examples:
        >>> control = directions.random(ssd, seed=1)
        >>> control.vectors.shape == ssd.vectors.shape, bool(abs(control.at(5)[0] @ ssd.at(5)[0]) < 0.5)
        (True, True)
    """
    require_type(like, Directions, MismatchError, "pass the directions whose shape to take, as in directions.random(ssd)")
    generator = torch.Generator().manual_seed(as_count(seed, "seed", ArgumentError, "leave it out, or say seed=1", least=0))
    gaussian = torch.randn(like.vectors.shape, generator=generator, dtype=torch.float64).transpose(1, 2)
    vectors = torch.linalg.qr(gaussian).Q.transpose(1, 2).to(like.vectors) * like.vectors.any(-1, keepdim=True)
    return replace(like, vectors=vectors, spectrum=like.spectrum[:, :0], method=f"random(seed={seed})", made_from=())


def from_vectors(
    vectors: Any,
    *,
    model: Any = "",
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    method: str = "from_vectors",
) -> Directions:
    """Make directions from vectors of your own. Rows are normalised and keep their order and signs.

    Args:
        vectors: A tensor, an array or a list: one vector of shape `d_model`, one per layer of shape `layer d_model`, or several at right
            angles of shape `layer rank d_model`.
        model: `model.id` of the model that the directions are for, so that other models reject them; empty for any model.
        layers: The layer of each index of the first axis; None for one basis that serves every layer.
        hook: The hook whose states have these directions.
        method: The name of the directions in interventions and tables.

    Returns:
        Directions without class means and so without midpoints. A gate on them needs a threshold in numbers.

    Raises:
        MismatchError: The vectors have an unsupported shape, are not real numbers, or are not one basis per layer.
        NumericsError: The rows of a layer are not at right angles, not finite, or zero.
        SiteError: The hook does not exist, or a layer is invalid or appears twice.

    Examples:
        >>> mine = directions.from_vectors(torch.ones(128), model=model.id, method="ones")
        >>> mine, round(float(mine.vectors.norm()), 3)
        (Directions(ones, rank 1, every layer, d_model 128), 1.0)
    """
    require_type(model, str, MismatchError, "pass model.id, which is text")
    rows = _unit(vectors).float()
    rows = rows.reshape(-1, *rows.shape[-2:]) if rows.ndim > 2 else rows.reshape(-1, 1, rows.shape[-1])
    unknown = torch.full_like(rows[:, 0], float("nan"))
    given = None if layers is None else axis_layers(layers, hook)
    return Directions(rows.contiguous(), given, unknown, unknown, rows.new_zeros(len(rows), 0), method, hook, Provenance(model))


def _unit(vectors: Any) -> Float[Tensor, "*axes d_model"]:
    """Normalise vectors in float64. Dividing by the largest number first keeps squares from overflowing and from vanishing."""
    try:
        given = torch.as_tensor(vectors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MismatchError(f"vectors that torch cannot make a tensor of ({error})", "numbers", "stack them with torch.stack") from None
    dense = given.layout == torch.strided and not given.is_meta and not given.is_complex()
    if not (dense and 1 <= given.ndim <= 3 and given.numel()):
        raise MismatchError(
            f"vectors of shape {tuple(given.shape)}, {given.dtype}, {given.layout}, on {given.device}",
            "real numbers of shape d_model, layer d_model or layer rank d_model",
            "pass dense vectors that are not empty",
        )
    rows = given.detach().cpu().double()
    largest = rows.abs().amax(-1, keepdim=True)
    if not (largest.isfinite() & (largest > 0)).all():
        raise NumericsError("a vector that is zero or not finite", "finite numbers that are not all 0", "leave that vector out")
    return torch.nn.functional.normalize(rows / largest, dim=-1)


def _means(activations: Activations, harmful: Tensor, harmless: Tensor) -> list[Float[Tensor, "layer d_model"]]:
    """The mean states of both classes, computed layer by layer, since the states may be mapped from a file that is larger than memory."""
    by_layer = [[activations.at(layer)[chosen].double().mean(0) for layer in activations.layers] for chosen in (harmful, harmless)]
    return [torch.stack(means) for means in by_layer]


def _directions(
    activations: Activations, vectors: Tensor, spectrum: Tensor, method: str, means: Sequence[Tensor], queries: Iterable[Query]
) -> Directions:
    """Directions of the given rows, with a warning about layers that have fewer directions than rows."""
    harmful, harmless = means
    made = Directions(
        vectors.float().contiguous(),
        activations.layers,
        harmful.float(),
        harmless.float(),
        spectrum.float(),
        method,
        activations.hook,
        activations.provenance,
        tuple(sorted({digest(query.text.encode()) for query in queries})),
    )
    found = made.vectors.any(-1).sum(-1).tolist()
    if missing := {layer: number for layer, number in zip(activations.layers, found, strict=True) if number < made.rank}:
        places = ", ".join(f"{number} of {made.rank} at layer {layer}" for layer, number in missing.items())
        warn(f"{method} has fewer directions than rows ({places}), since harmful and harmless queries differ in no more")
    return made
