"""Maps of hidden states. All linear ones are one type, a low-rank affine map; its constructors are in `guardlens.interventions`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.directions import Directions
from guardlens.errors import (
    InterventionError,
    MismatchError,
    NumericsError,
    SiteError,
    as_count,
    as_number,
    is_several,
    quoted,
    require_type,
    type_of,
)
from guardlens.hooks import numbered, require_same_space
from guardlens.interventions.held_states import Context, State
from guardlens.results.provenance import require_same_model


@runtime_checkable
class Edit(Protocol):
    """A map of states that never sees padding, batches or lanes.

    Examples:
        >>> isinstance(guard.steps[0].edit, iv.Edit), guard.steps[0].edit.requires == (iv.text_twin,)
        (True, True)
    """

    @property
    def requires(self) -> tuple[State, ...]:
        """The held states that it will ask its context for."""
        ...

    @property
    def model(self) -> str:
        """The model that it was made for; empty for any."""
        ...

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]: ...


@dataclass(frozen=True, eq=False)
class Affine:
    """h -> h + h down^T up + r held_down^T held_up + shift, with factors of each layer and r one held state.

    Closed under composition (`then`). Projections are computed in float32 at least, whatever the model's precision.

    Attributes:
        label: How it was made, for `repr`.
        layers: The layer of each index of the first axis; None where one map serves every layer.
        held: The state r; None if the map needs none (its factors then have rank 0).
        model: The model that it was made for; empty for any.
        hook: The hook that its directions were read at; empty for any.

    Raises:
        MismatchError: Factors that don't fit each other or the layers.
        NumericsError: NaN or infinity in a factor.

    Examples:
        >>> out, back = (intervention.steps[0].edit for intervention in (iv.project_out(ssd), iv.add(ssd, 2.0)))
        >>> out.then(back)  # one map instead of two
        project_out(ssd(rank=1)) >> add(ssd(rank=1), alpha=2)
    """

    label: str
    layers: tuple[int, ...] | None
    down: Float[Tensor, "layer rank d_model"]
    up: Float[Tensor, "layer rank d_model"]
    held_down: Float[Tensor, "layer held_rank d_model"]
    held_up: Float[Tensor, "layer held_rank d_model"]
    shift: Float[Tensor, "layer d_model"]
    held: State | None = None
    model: str = ""
    hook: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", None if self.layers is None else numbered(self.layers, self.hook))
        if self.held is not None:
            require_type(self.held, State, InterventionError, "hold a State, such as interventions.text_twin")
        factors = {name: getattr(self, name) for name in _FACTORS}
        require_factors(self.label, self.layers, **factors)
        pairs = (self.down, self.up), (self.held_down, self.held_up)
        if any(one.shape != other.shape for one, other in pairs) or len({factor.shape[-1] for factor in factors.values()}) > 1:
            shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
            raise MismatchError(f"factors of the shapes {shapes}", "down and up alike, all of one width", "make them of one basis")

    @property
    def requires(self) -> tuple[State, ...]:
        return () if self.held is None else (self.held,)

    @property
    def d_model(self) -> int:
        """Width of the states that it maps."""
        return self.shift.shape[-1]

    def index(self, layer: int | None) -> int:
        """Where a layer's factors are on the first axis.

        Raises:
            SiteError: There are none for it.
        """
        if self.layers is None:
            return 0
        if layer not in self.layers:
            raise SiteError(
                f"{self.label} at layer {layer}, with directions for the layers {list(self.layers)}",
                "a layer that has directions",
                "collect that layer too, or use one layer's everywhere with directions[layer]",
            )
        return self.layers.index(layer)

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        i, h = self.index(context.layer), _precise(states)
        delta = h @ self.down[i].to(h).T @ self.up[i].to(h) + self.shift[i].to(h)
        if self.held is not None:
            delta = delta + context.held(self.held).to(h) @ self.held_down[i].to(h).T @ self.held_up[i].to(h)
        return (h + delta).to(states.dtype)

    def then(self, after: "Affine") -> "Affine":
        """One map that does this one first, then `after`.

        Raises:
            InterventionError: They hold different states, or have other layers.
            MismatchError: They were made for different models, or of directions in different spaces.
        """
        require_same_model(f"the directions of {after!r}", after.model, self.model)
        require_same_space(f"{after!r}, with directions", after.hook, *filter(None, (self.hook,)))
        if None not in (self.held, after.held) and self.held != after.held:
            raise InterventionError(
                f"two held states, {self.held} and {after.held}", "at most one in a folded map", "keep them as two steps (a >> b)"
            )
        if self.layers is not None and after.layers is not None and self.layers != after.layers:
            raise InterventionError(
                f"maps of the layers {self.layers} and {after.layers}", "the same layers", "restrict them with directions[layer]"
            )

        def through(up: Tensor) -> Tensor:
            return up + up @ after.down.transpose(1, 2) @ after.up

        return Affine(
            f"{self.label} >> {after.label}",
            after.layers if self.layers is None else self.layers,
            _join(self.down, after.down),
            _join(through(self.up), after.up),
            _join(self.held_down, after.held_down),
            _join(through(self.held_up), after.held_up),
            through(self.shift[:, None])[:, 0] + after.shift,
            after.held if self.held is None else self.held,
            self.model or after.model,
            self.hook or after.hook,
        )

    def scaled(self, strength: float) -> "Affine":
        """h + strength (self(h) - h)."""
        factors = {name: strength * getattr(self, name) for name in ("up", "held_up", "shift")}
        return replace(self, label=f"{strength:g} * ({self.label})", **factors)

    def to(self, device: torch.device) -> "Affine":
        """With its factors on a device."""
        if self.shift.device == device:
            return self
        moved = copy.copy(self)  # not anew: its numbers were checked where it was made, and a GPU would be waited for
        for name in _FACTORS:
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved

    def span(self, layer: int | None) -> Float[Tensor, "rank d_model"]:
        """Orthonormal rows that span everything the map can add at a layer."""
        i = self.index(layer)
        rows = torch.cat([self.up[i], self.held_up[i], self.shift[i][None]])
        _, values, basis = torch.linalg.svd(rows, full_matrices=False)
        return basis[values > 1e-6 * values.max().clamp_min(torch.finfo(values.dtype).tiny)]

    def __repr__(self) -> str:
        return self.label


_FACTORS = ("down", "up", "held_down", "held_up", "shift")


@dataclass(frozen=True, eq=False)
class RelativeAdd:
    """h -> h + alpha |h| v, with a unit vector v of each layer.

    Raises:
        MismatchError: Other than one vector per layer.
        NumericsError: NaN or infinity in a vector.
        InterventionError: An alpha that is no finite number.

    Examples:
        >>> iv.add_relative(ssd, 0.1).steps[0].edit
        add_relative(ssd(rank=1), alpha=0.1)
    """

    label: str
    layers: tuple[int, ...] | None
    vectors: Float[Tensor, "layer d_model"]
    alpha: float
    model: str = ""
    hook: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", None if self.layers is None else numbered(self.layers, self.hook))
        object.__setattr__(self, "alpha", as_number(self.alpha, "alpha", InterventionError, "say add_relative(directions, 0.1)"))
        require_factors(self.label, self.layers, vectors=self.vectors)

    @property
    def requires(self) -> tuple[State, ...]:
        return ()

    @property
    def d_model(self) -> int:
        """Width of the states that it maps."""
        return self.vectors.shape[-1]

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        if self.layers is not None and context.layer not in self.layers:
            raise SiteError(f"{self.label} at layer {context.layer}", f"one of the layers {list(self.layers)}", "collect that layer too")
        h = _precise(states)
        vector = self.vectors[0 if self.layers is None else self.layers.index(context.layer)]
        return (h + self.alpha * h.norm(dim=-1, keepdim=True) * vector.to(h)).to(states.dtype)

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Swap:
    """h -> r: the held state r in place of the state, or in place of one of its equal stretches (a head of z).

    Attributes:
        held: The state r, read at the same hook.
        part: `(index, of)`: only the stretch `index` of `of`; None for the whole state.

    Raises:
        InterventionError: No state, or no such part.

    Examples:
        >>> iv.swap(iv.text_twin, part=(3, 4)).steps[0].edit.part
        (3, 4)
    """

    held: State
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        require_type(self.held, State, InterventionError, "put in a State, such as interventions.text_twin")
        if self.part is None:
            return
        next_step = "give (index, of), as in (3, 32)"
        if not isinstance(self.part, tuple | list) or len(self.part) != 2:
            raise InterventionError(f"part={quoted(self.part)}", "an index and a number of parts", next_step)
        number, of = (as_count(each, "part", InterventionError, next_step, least=0) for each in self.part)
        if number >= of:
            raise InterventionError(f"part {number} of {of}", f"an index from 0 to {of - 1}", next_step)
        object.__setattr__(self, "part", (number, of))

    @property
    def requires(self) -> tuple[State, ...]:
        return (self.held,)

    @property
    def model(self) -> str:
        return ""

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        reference, (index, of) = context.held(self.held).to(states), self.part or (0, 1)
        if reference.shape != states.shape or states.shape[-1] % of:
            raise MismatchError(
                f"a held state of width {reference.shape[-1]} for states of width {states.shape[-1]}, in {of} parts",
                "equal widths that the parts divide",
                "hold the state of the hook that is edited, of a model with the same heads",
            )
        width = states.shape[-1] // of
        here = torch.arange(states.shape[-1], device=states.device) // width == index
        return torch.where(here, reference, states)

    def __repr__(self) -> str:
        return f"swap({self.held}{'' if self.part is None else f', part={self.part}'})"


@dataclass(frozen=True, eq=False)
class Custom:
    """Any function of states and context. It can't be saved.

    Attributes:
        fn: The function.
        requires: The held states that it asks for.
        model: The model that it was made for; empty for any.
        name: What stands for the function in fingerprints: another name for whatever does something else. Empty for no fingerprint.

    Raises:
        InterventionError: What is no function, requires anything but states, or a name that is no text.

    Examples:
        >>> iv.custom(lambda states, context: states * 0.5).steps[0].edit.requires
        ()
    """

    fn: Callable[[Tensor, Context], Tensor]
    requires: tuple[State, ...] = ()
    model: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        require_type(self.name, str, InterventionError, "say name='...'")
        if not callable(self.fn) or isinstance(self.fn, type):
            raise InterventionError(type_of(self.fn), "a function (states, context) -> states", "hand in a function, or an object to call")
        if not is_several(self.requires):
            raise InterventionError(f"requires={quoted(self.requires)}", "states in a tuple", "say requires=(state,)")
        object.__setattr__(self, "requires", tuple(self.requires))
        for state in self.requires:
            require_type(state, State, InterventionError, "name states in requires=, as in requires=(interventions.text_twin,)")

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        # Copies: a function that works in place must not change what the edit is compared with, nor whose states these are.
        return self.fn(states.clone(), replace(context, query=context.query.clone()))

    def __repr__(self) -> str:
        return f"custom({self.name or getattr(self.fn, '__name__', self.fn)})"


@dataclass(frozen=True, eq=False)
class Placebo:
    """Another edit's displacement, of the same norm for every state, turned into random directions: the placebo of that edit.

    The space that the edit writes to is mapped onto a random one of the same rank, layer by layer; where that space is not known (a custom
    edit), the norm alone is kept. So it adds as much, for the same queries, in a direction that means nothing.

    Examples:
        >>> guard.placebo(seed=1).steps[0].edit
        placebo(replace(ssd(rank=1), text_twin, gain=1), seed=1)
    """

    edit: Any
    seed: int = 0

    def __post_init__(self) -> None:
        require_edit(self.edit)
        object.__setattr__(self, "seed", as_count(self.seed, "seed", InterventionError, "say placebo(0), placebo(1), ...", least=0))

    @property
    def requires(self) -> tuple[State, ...]:
        return self.edit.requires

    @property
    def model(self) -> str:
        return self.edit.model

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        h = _precise(states)
        delta = self.edit(h, context) - h  # before anything is rounded to the model's precision
        if isinstance(self.edit, Affine):
            coordinates = delta @ self.edit.span(context.layer).to(h).T
        else:
            coordinates = delta.norm(dim=-1, keepdim=True)
        turned = coordinates @ self._random_rows(coordinates.shape[-1], h.shape[-1], context.layer).to(h)
        return (h + turned).to(states.dtype)

    def _random_rows(self, rank: int, width: int, layer: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + (-1 if layer is None else layer) + 1)
        gaussian = torch.randn(width, rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gaussian).Q.T

    def __repr__(self) -> str:
        return f"placebo({self.edit!r}, seed={self.seed})"


def require_edit(edit: Any) -> None:
    """Refuse what maps no states.

    Raises:
        InterventionError: As said.
    """
    if isinstance(edit, type) or not isinstance(edit, Edit):
        raise InterventionError(type_of(edit), "an edit", "take one of interventions, such as custom(fn); interventions are joined with >>")


def require_directions(directions: Any) -> None:
    """Refuse what are no directions, and such as are zero at a layer.

    Raises:
        InterventionError, NumericsError: As said.
    """
    require_type(directions, Directions, InterventionError, "make directions of a vector of your own: directions.from_vectors(vector)")
    directions.require_some()


def require_factors(label: str, layers: tuple[int, ...] | None, **factors: Any) -> None:
    """Refuse factors that are no tensors with one index per layer first, or that are not finite.

    Raises:
        InterventionError, MismatchError, NumericsError: As said.
    """
    number = 1 if layers is None else len(layers)
    for name, factor in factors.items():
        require_type(factor, Tensor, InterventionError, f"make {name} a tensor")
        if not factor.is_floating_point():
            raise InterventionError(f"{name} of {factor.dtype} in {label}", "floating-point numbers", f"say {name}.float()")
        if factor.ndim == 0 or len(factor) != number:
            raise MismatchError(f"{name} of shape {tuple(factor.shape)} in {label}", f"{number} on the first axis", "give one per layer")
        if not torch.isfinite(factor).all():
            raise NumericsError(f"NaN or infinity in the {name} of {label}", "finite numbers", "look at what it was made of")


def _precise(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _join(first: Tensor, second: Tensor) -> Tensor:
    layers = max(len(first), len(second))
    return torch.cat([first.expand(layers, -1, -1), second.expand(layers, -1, -1)], dim=1)
