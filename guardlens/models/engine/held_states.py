"""Held states of other presentations' runs. Each presentation runs once, unedited, for all lanes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from guardlens.data.presentations import Presentation
from guardlens.hooks import Site
from guardlens.interventions import Intervention, State
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.request import RunRequest

Wanted = Mapping[State, set[int | None]]
"""Held states whose hook is known, and the layers that each is needed at."""

Source = Callable[[Batch, Presentation], tuple[Any, Batch]]
"""The model and the prompts that the held states of a presentation are read from, as `HookedModel.source` gives them."""


def held_for(request: RunRequest, source: Source, prefill: Prefill | None) -> Held:
    """The states of other presentations' runs that a request requires. A prefill remembers them, then of all layers at once."""
    wanted = wanted_states(request.interventions, request.cfg.n_layers)
    read = partial(_read_presentation, request, source, prefill is not None)
    return held_states(wanted, read, None if prefill is None else prefill.held)


def _read_presentation(request: RunRequest, source: Source, all_layers: bool, presentation: Presentation, wanted: Wanted) -> Held:
    """The wanted states of a presentation's run, of all layers if they are to be remembered."""
    model, prompts = source(request.batch, presentation)
    if all_layers:
        computed = model.cfg.computed(prompts.beside_image)
        wanted = {state: {point.layer for point in computed if point.hook == state.hook} for state in wanted}
    found = read_states(wanted, request.cfg.n_layers, lambda sites: model.run(prompts, read=sites, logits=None).reads)
    return {key: states.to(request.batch.mask.device) for key, states in found.items()}


def wanted_states(interventions: Sequence[Intervention], n_layers: int) -> dict[State, set[int | None]]:
    """The states of other presentations' runs that interventions need, with their layers, united over all lanes."""
    wanted: dict[State, set[int | None]] = {}
    for intervention in interventions:
        for state, layers in intervention.requires(n_layers).items():
            if state.presentation is not None:
                wanted.setdefault(state, set()).update(layers)
    return wanted


def held_states(wanted: Wanted, read: Callable[[Presentation, Wanted], Held], known: dict | None = None) -> Held:
    """The wanted states, of which those that are not `known` are read, and then known.

    Args:
        wanted: The states and their layers.
        read: Runs a presentation unedited and returns the states of it.
        known: States that were read before; it is added to.
    """
    held = {} if known is None else known
    missing = {state: layers for state, layers in wanted.items() if any((state, layer) not in held for layer in layers)}
    presentations = {state.presentation for state in missing if state.presentation is not None}
    for presentation in presentations:
        held |= read(presentation, {state: layers for state, layers in missing.items() if state.presentation == presentation})
    return held


def read_states(
    wanted: Wanted, n_layers: int, run: Callable[[tuple[Site, ...]], Mapping[Site, Float[Tensor, "lane query layer d_model"]]]
) -> Held:
    """The wanted states of one presentation.

    Args:
        wanted: The states and their layers.
        n_layers: The number of layers of the model.
        run: Runs the presentation, and returns what it reads at some sites.
    """
    sites = {state: _site_of(state, layers) for state, layers in wanted.items()}
    reads = run(tuple(dict.fromkeys(sites.values())))
    return {
        (state, point.layer): reads[site][0, :, index] for state, site in sites.items() for index, point in enumerate(site.points(n_layers))
    }


def _site_of(state: State, layers: set[int | None]) -> Site:
    assert state.hook is not None
    return Site(state.hook, tuple(layer for layer in layers if layer is not None) or None, state.positions)
