"""The constructors: each makes an intervention of one step. Modifiers and `>>` make the rest."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.directions import Directions
from guardlens.directions.checks import require_directions
from guardlens.errors import InterventionError, as_number, type_of
from guardlens.hooks import Site
from guardlens.interventions.edits import Affine, Custom, RelativeAdd, Swap
from guardlens.interventions.held_states import Context, State, own_state, text_twin
from guardlens.interventions.intervention import Intervention
from guardlens.interventions.step import Step

Reference = State | Tensor | float
"""What a component is taken from: a held state; a vector of `d_model`, or one per layer; or 0, which takes the component away."""


def project_out(directions: Directions) -> Intervention:
    """h - h V^T V: remove the state's component in the span of V (VLM-Guard's projection; directional ablation for rank 1).

    Examples:
        >>> site = gl.Site(layers=[5])
        >>> run = model.run(batch, iv.project_out(ssd).at(layers=5), read=[site])
        >>> bool((run.reads[site][0, :, 0] @ ssd.at(5)[0]).abs().max() < 1e-3)  # reads: lane, query, layer, d_model
        True
    """
    vectors = _vectors(directions)
    return _affine(f"project_out({directions.method})", directions, down=vectors, up=-vectors)


def amplify(directions: Directions, alpha: float = 1.0) -> Intervention:
    """h + alpha h V^T V: scale the component by 1 + alpha. `amplify(V, -1)` is `project_out(V)`.

    Examples:
        >>> iv.amplify(ssd, 2.0)
        amplify(ssd(rank=1), alpha=2).at(positions='last')
    """
    vectors = _vectors(directions)
    alpha = _number(alpha, "alpha")
    return _affine(f"amplify({directions.method}, alpha={alpha:g})", directions, down=vectors, up=alpha * vectors)


def replace(directions: Directions, reference: Reference, gain: float = 1.0) -> Intervention:
    """h (I - V^T V) + gain r V^T V: replace the component by that of a reference, times a gain.

    With the text twin as reference this is VLM-Guard's edit, whose alpha is the gain. `gain=1` is `patch`, and `gain=0` is `project_out`.

    Examples:
        >>> intervention = iv.replace(ssd, iv.text_twin).at(layers=7)
        >>> [model.generate(queries[1], grey, each).split()[0] for each in (iv.nothing, intervention)]
        ['sure', 'sorry']
    """
    vectors = _vectors(directions)
    gain = _number(gain, "gain")
    name = f"replace({directions.method}, {_name(reference)}, gain={gain:g})"
    return _affine(name, directions, down=vectors, up=-vectors, reference=reference, gain=gain)


def patch(directions: Directions, reference: Reference) -> Intervention:
    """h + (r - h) V^T V: replace the component by that of a reference. Idempotent.

    Examples:
        >>> site = gl.Site(layers=[5])
        >>> run = model.run(batch, iv.patch(ssd, ssd.harmless_mean).at(layers=5), read=[site])
        >>> torch.allclose(run.reads[site][0, :, 0] @ ssd.at(5)[0], ssd.harmless_mean[5] @ ssd.at(5)[0], atol=1e-3)
        True
    """
    vectors = _vectors(directions)
    name = f"patch({directions.method}, {_name(reference)})"
    return _affine(name, directions, down=vectors, up=-vectors, reference=reference, gain=1.0)


def add_component(directions: Directions, reference: Reference, gain: float = 1.0) -> Intervention:
    """h + gain r V^T V: add a reference's component to the state's own.

    Examples:
        >>> iv.add_component(ssd, iv.text_twin, gain=0.5)
        add_component(ssd(rank=1), text_twin, gain=0.5).at(positions='last')
    """
    require_directions(directions)
    gain = _number(gain, "gain")
    name = f"add_component({directions.method}, {_name(reference)}, gain={gain:g})"
    return _affine(name, directions, reference=reference, gain=gain)


def add(directions: Directions, alpha: float = 1.0) -> Intervention:
    """h + alpha v: add a multiple of the unit vector v of each layer (rank 1).

    Raises:
        InterventionError: The rank of the directions is not 1.

    Examples:
        >>> site = gl.Site(layers=[5])
        >>> run = model.run(batch, [iv.nothing, iv.add(ssd, 4.0).at(layers=5)], read=[site])  # two lanes
        >>> moved = run.reads[site][1] - run.reads[site][0]
        >>> torch.allclose(moved[:, 0], 4 * ssd.at(5), atol=1e-3)
        True
    """
    vector = _single(directions)
    alpha = _number(alpha, "alpha")
    return _affine(f"add({directions.method}, alpha={alpha:g})", directions, shift=alpha * vector)


def add_relative(directions: Directions, alpha: float = 0.1) -> Intervention:
    """h + alpha |h| v: add a share of the state's norm along the unit vector v of each layer (rank 1).

    Raises:
        InterventionError: The rank of the directions is not 1.

    Examples:
        >>> iv.add_relative(ssd, 0.1)  # a tenth of each state's norm
        add_relative(ssd(rank=1), alpha=0.1).at(positions='last')
    """
    vector = _single(directions)
    alpha = _number(alpha, "alpha")
    label = f"add_relative({directions.method}, alpha={alpha:g})"
    edit = RelativeAdd(label, directions.layers, vector, alpha, model=directions.provenance.model, hook=directions.hook)
    return Intervention((Step(edit),))


def linear(matrix: Float[Tensor, "d_model d_model"], alpha: float = 1.0) -> Intervention:
    """h + alpha h M: add the product with a matrix (a null-space map, an erasure, ...), the same in every layer.

    Raises:
        InterventionError: `matrix` is not a square matrix.
        NumericsError: The matrix holds NaN or infinity.

    Examples:
        >>> halved = iv.linear(torch.eye(128), alpha=-0.5).at(layers=5)
        >>> halved
        linear(128 x 128, alpha=-0.5).at(layers=[5], positions='last')
    """
    _require_square(matrix)
    matrix = _real(matrix)
    alpha = _number(alpha, "alpha")
    width = len(matrix)
    none = matrix.new_zeros(1, 0, width)
    edit = Affine(
        label=f"linear({width} x {width}, alpha={alpha:g})",
        layers=None,
        down=torch.eye(width, dtype=matrix.dtype)[None],
        up=alpha * matrix[None],
        held_down=none,
        held_up=none,
        shift=matrix.new_zeros(1, width),
    )
    return Intervention((Step(edit),))


def swap(reference: State, part: tuple[int, int] | None = None) -> Intervention:
    """r: put the held state in place of the state, at the hook and the positions where it is held (activation patching).

    A reference without a hook of its own, such as `text_twin`, is held at the hook that is edited: `swap(text_twin).at(hook="z")`.

    Args:
        reference: The state to put in, e.g. `State(presentation=text_only, hook="attn_out")`.
        part: `(index, number)` puts in only one of a number of equal parts: `(3, 32)` is the fourth of 32 heads at the hook z.

    Raises:
        InterventionError: `reference` is not a `State`, or there is no such part.

    Examples:
        >>> iv.swap(iv.State(presentation=presentations.text_only, hook="z"), part=(3, 4)).at(layers=5).steps[0].site
        Site(hook='z', layers=(5,), positions='last')
    """
    edit = Swap(reference, part)
    return Intervention((Step(edit, Site(reference.hook or "resid_post", positions=reference.positions)),))


def custom(fn: Callable[[Tensor, Context], Tensor], requires: tuple[State, ...] = (), name: str = "") -> Intervention:
    """Make any function `(states, context) -> states` of the tensor `state d_model` an intervention.

    Args:
        fn: The function. It receives exactly the states that the site selects, never padding. Soft or per-state gates are written in it.
        requires: The held states that it asks for with `context.held(state)`.
        name: Stands for the function in fingerprints, which runs with `out=` need. Give every function its own name.

    Raises:
        InterventionError: `fn` is not a function, `requires` holds something other than states, or `name` is not text.

    Examples:
        >>> def half(states, context):
        ...     return states * 0.5
        >>> iv.custom(half).at(layers=5)
        custom(half).at(layers=[5], positions='last')
        >>> iv.custom(half, name="half").fingerprint == iv.custom(lambda h, context: h / 2, name="half").fingerprint
        True
    """
    return Intervention((Step(Custom(fn, requires, name=name)),))


def _affine(
    label: str,
    directions: Directions,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    reference: Reference = 0.0,
    gain: float = 0.0,
    shift: Tensor | None = None,
) -> Intervention:
    """Make an affine edit of directions: h + h down^T up + gain r V^T V + shift, where r is the reference."""
    vectors = directions.vectors
    none = vectors[:, :0]
    is_held = isinstance(reference, State)
    if shift is None:
        shift = torch.zeros_like(vectors[:, 0]) if is_held else gain * _component(vectors, reference)
    edit = Affine(
        label=label,
        layers=directions.layers,
        down=none if down is None else down,
        up=none if up is None else up,
        held_down=vectors if is_held else none,
        held_up=gain * vectors if is_held else none,
        shift=shift,
        held=reference if is_held else None,
        model=directions.provenance.model,
        hook=directions.hook,
    )
    return Intervention((Step(edit),))


def _component(vectors: Float[Tensor, "layer rank d"], reference: Tensor | float) -> Float[Tensor, "layer d"]:
    """Return a constant reference's component in the span of the vectors of each layer."""
    layers, _, width = vectors.shape
    constant = _real(reference)
    if constant.shape not in ((), (width,), (layers, width)):
        raise InterventionError(
            f"a reference of shape {tuple(constant.shape)}",
            f"a vector of width {width}, {layers} of them, one per layer, or 0",
            "take a class mean of the same directions, such as directions.harmless_mean",
        )
    if not constant.ndim and constant:
        raise InterventionError(
            f"the number {constant:g} as a reference, which is no state",
            "a vector, or 0 for none",
            "for a coordinate, say number * directions.at(layer)[0]",
        )
    per_layer = constant.to(vectors).expand(layers, width)
    return torch.einsum("ld,lrd,lre->le", per_layer, vectors, vectors)


def _vectors(directions: Any) -> Float[Tensor, "layer rank d"]:
    """Return the vectors of usable directions."""
    require_directions(directions)
    return directions.vectors


def _single(directions: Directions) -> Float[Tensor, "layer d"]:
    """Return the only vector of each layer.

    Raises:
        InterventionError: The rank of the directions is not 1.
    """
    vectors = _vectors(directions)
    if directions.rank != 1:
        raise InterventionError(f"{directions.rank} directions per layer", "one", "take the first with directions.truncate(1)")
    return vectors[:, 0]


def _number(value: Any, name: str) -> float:
    return as_number(value, name, InterventionError, "give a number, such as 1.0")


def _require_square(matrix: Any) -> None:
    if isinstance(matrix, Tensor | np.ndarray) and matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]:
        return
    found = f"shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor | np.ndarray) else type_of(matrix)
    raise InterventionError(f"a matrix of {found}", "a square tensor, d_model by d_model", "pass torch.eye(d_model) or its like")


def _real(values: Any) -> Tensor:
    """Return a number, an array or a tensor as a tensor of floating-point numbers."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        expected = "numbers: one, a vector, or a vector per layer"
        raise InterventionError(type_of(values), expected, "pass a tensor") from None
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _name(reference: Any) -> str:
    """Return how a reference is called in the label of an edit.

    Raises:
        InterventionError: The value is not a reference.
    """
    if isinstance(reference, State):
        named = {text_twin: "text_twin", own_state: "own_state"}
        return named.get(reference, str(reference))
    if isinstance(reference, Tensor | np.ndarray) and reference.ndim:
        return "constant"
    next_step = "take interventions.text_twin, a State, a number or a class mean"
    return f"{as_number(reference, 'reference', InterventionError, next_step):g}"
