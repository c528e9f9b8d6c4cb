"""Interventions: what to change in the hidden states of a forward pass.

Each constructor makes an intervention of one step; modifiers (`.at`, `.when`, `.during`, `.scaled`, `.placebo`) and `>>` make the rest.

    project_out(V)          h - h V^T V
    amplify(V, alpha)       h + alpha h V^T V
    patch(V, r)             h + (r - h) V^T V
    replace(V, r, gain)     h (I - V^T V) + gain r V^T V
    add_component(V, r, a)  h + a r V^T V
    add(v, alpha)           h + alpha v
    add_relative(v, alpha)  h + alpha |h| v
    linear(M, alpha)        h + alpha h M
    swap(r)                 r
    custom(fn)              fn(states, context)

`h` is a hidden state, `V` the directions of its layer as orthonormal rows, `v` the only row of rank-1 directions, and `M` a square matrix.
`r` is a reference: a held state (`text_twin`, `own_state`, or any `State`), or a constant, which is zero, a vector, or one vector per layer
(a class mean, say). A held state is read at the hook and the layer of the edit unless the `State` names its own.
A strength s means the same for every edit: h + s (edit(h) - h).
"""

from guardlens.interventions import gates
from guardlens.interventions.constructors import (
    add,
    add_component,
    add_relative,
    amplify,
    custom,
    linear,
    patch,
    project_out,
    replace,
    swap,
)
from guardlens.interventions.edits import Affine, Custom, Edit, Placebo, RelativeAdd, Swap
from guardlens.interventions.held_states import Context, State, own_state, text_twin
from guardlens.interventions.intervention import Intervention, nothing
from guardlens.interventions.step import Phase, Step

__all__ = [
    "Affine",
    "Context",
    "Custom",
    "Edit",
    "Intervention",
    "Phase",
    "Placebo",
    "RelativeAdd",
    "State",
    "Step",
    "Swap",
    "add",
    "add_component",
    "add_relative",
    "amplify",
    "custom",
    "gates",
    "linear",
    "nothing",
    "own_state",
    "patch",
    "project_out",
    "replace",
    "swap",
    "text_twin",
]
