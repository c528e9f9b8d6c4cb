"""`UneditedRun`: what an unedited run leaves, and how a run continues from it at a later layer."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from guardlens.models.engine.replaced_forwards import argument_names, replaced


@dataclass(eq=False)
class UneditedRun:
    """What an unedited run leaves for forks to continue from.

    Attributes:
        inputs: The arguments of the decoder.
        states: The inputs of some layers, by layer.
        gives_tuple: Whether each layer that ran returns a tuple.
    """

    inputs: dict[str, Any]
    states: dict[int, Float[Tensor, "row width d"]]
    gives_tuple: dict[nn.Module, bool]

    def record_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the arguments of the decoder (a forward pre-hook)."""
        self.inputs.update(dict(zip(argument_names(type(module)), args, strict=False)) | kwargs)

    def record_form(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Record whether a layer returns a tuple (a forward hook)."""
        self.gives_tuple[module] = isinstance(output, tuple)

    def record_states(self, layer: int, states: Float[Tensor, "row width d"], step: int) -> None:
        """Record the input of a layer (a tap)."""
        self.states[layer] = states.clone()

    def skipping(self, blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Within this context, these layers return their input."""
        return replaced({block: partial(_identity, self.gives_tuple.get(block, False)) for block in blocks})


def _identity(gives_tuple: bool, *args: Any, **kwargs: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    return (states,) if gives_tuple else states
