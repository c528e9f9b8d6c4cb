"""The edit that self-tests make: one that every later state depends on."""

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.hooks import Positions, Site
from guardlens.interventions import Context, Custom, Intervention, Step


def push(positions: Positions, layer: int = 0) -> Intervention:
    """Add a vector as long as the state itself, so that a lane that loses or misplaces the edit differs visibly."""
    return Intervention((Step(Custom(_pushed), Site(layers=(layer,), positions=positions)),))


def _pushed(states: Float[Tensor, "state d"], context: Context) -> Float[Tensor, "state d"]:
    direction = torch.ones_like(states)
    direction[:, ::2] = -1
    return states + states.norm(dim=-1, keepdim=True) * direction / states.shape[-1] ** 0.5
