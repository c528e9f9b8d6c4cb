"""VLM-Guard's gate along the first safety direction, and how to choose its threshold."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.data.activations import Activations
from guardlens.directions import Directions
from guardlens.directions.checks import require_directions
from guardlens.errors import InterventionError, NumericsError, as_number, quoted, require_type
from guardlens.interventions.gates.linear import Linear
from guardlens.interventions.held_states import State, own_state, text_twin


def harmful(directions: Directions, threshold: float | str | Tensor = "midpoint", state: State = text_twin) -> Linear:
    """Open where the state lies on the harmful side of the first direction.

    Args:
        directions: The first row of each layer is v1.
        threshold: `"midpoint"` (between the class means), a number (0 is the paper's), or one number per layer.
        state: What the gate looks at, by default at the hook that the directions were read at. The text twin is the default because an
            image cannot change it.

    Raises:
        InterventionError: `threshold` is a word other than "midpoint", or not one finite number, or one for each layer; it is "midpoint"
            and the directions have no class means; or `state` is not a `State`.
        NumericsError: The directions are zero at a layer.

    Source: VLM-Guard's g = 1[h(q) v1 > t].

    Examples:
        >>> batch = model.batch(queries[:3] + queries[-3:], grey)
        >>> run = model.run(batch, iv.replace(ssd, iv.text_twin).when(gates.harmful(ssd)).at(layers=5))
        >>> run.decisions[0, 0, 5]  # (lane, step, layer) -> query: the gate opens for the harmful ones
        tensor([ True,  True,  True, False, False, False])
    """
    require_directions(directions)
    require_type(state, State, InterventionError, "look at a State, such as interventions.text_twin")
    thresholds, shown = _thresholds(threshold, directions)
    label = f"harmful({directions.method}, threshold={shown}{_shown(state)})"
    return Linear(
        label,
        directions.layers,
        directions.vectors[:, 0].contiguous(),
        thresholds,
        state=state,
        model=directions.provenance.model,
        hook=directions.hook,
    )


def _shown(state: State) -> str:
    """Return the state as an argument for the label of a gate; empty for the default."""
    if state == text_twin:
        return ""
    return f", state={'own_state' if state == own_state else state}"


def _thresholds(threshold: Any, directions: Directions) -> tuple[Float[Tensor, "layer"], str | float]:
    """Return the threshold of each layer, and the word or number that stands for them in a label."""
    layers = len(directions.vectors)
    next_step = "say 'midpoint' or 0.0, or see gates.threshold_at_fpr"
    if isinstance(threshold, str):
        if threshold != "midpoint":
            raise InterventionError(f"the threshold {quoted(threshold)}", "'midpoint', a number, or one number per layer", next_step)
        if directions.midpoints.isnan().any():
            raise InterventionError("The directions have no class means, and so no midpoint.", "a threshold in numbers", next_step)
        return directions.midpoints.contiguous(), threshold
    is_per_layer = isinstance(threshold, Tensor | np.ndarray | list | tuple) and np.ndim(threshold) > 0
    if is_per_layer:
        if len(threshold) != layers:
            raise InterventionError(f"{len(threshold)} thresholds", f"one number, or one for each of {layers} layers", next_step)
        numbers = [as_number(each, "threshold", InterventionError, next_step) for each in threshold]
        return torch.tensor(numbers), "per layer"
    number = as_number(threshold, "threshold", InterventionError, next_step)
    return torch.full((layers,), number), number


def threshold_at_fpr(directions: Directions, activations: Activations, rate: float = 0.05) -> Float[Tensor, "layer"]:
    """Return the threshold of each layer at which at most `rate` of the harmless queries open the gate.

    Args:
        directions: The first row of each layer is v1.
        activations: Labelled activations with all layers of the directions (of one layer only, if the directions serve every layer).
        rate: The false-positive rate, from 0 to 1.

    Raises:
        NumericsError: The rate is out of range, or no query is labelled harmless.
        SiteError: A layer of the directions was not collected.
        MismatchError: The activations have another width or space than the directions, or come from another model.

    Examples:
        >>> threshold = gates.threshold_at_fpr(ssd, text, rate=0.05)  # one number per layer
        >>> above = ssd.coordinates(text)[~torch.from_numpy(text.harmful), :, 0] > threshold
        >>> bool((above.float().mean(dim=0) <= 0.05).all())
        True
        >>> careful = gates.harmful(ssd, threshold)
    """
    require_directions(directions)
    directions.require_fit(activations)
    rate = as_number(rate, "rate", NumericsError, "say rate=0.05")
    harmless = torch.tensor([query.label == "harmless" for query in activations.queries])
    if not (0 <= rate <= 1 and harmless.any()):
        raise NumericsError(
            f"a rate of {rate} over {int(harmless.sum())} harmless queries",
            "a rate from 0 to 1, and one harmless query at least",
            "say rate=0.05, and label the queries",
        )
    layers = activations.layers[:1] if directions.layers is None else directions.layers
    scores = [activations.at(layer)[harmless].to(directions.vectors) @ directions.at(layer)[0] for layer in layers]
    thresholds = np.quantile(torch.stack(scores).numpy(), 1 - rate, axis=1, method="higher")
    return torch.from_numpy(thresholds).float()
