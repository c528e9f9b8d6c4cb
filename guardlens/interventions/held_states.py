"""Held states: vectors of a run, one per query, that edits and gates may look at besides the states that they are given."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from guardlens.data.presentations import Presentation, text_only
from guardlens.data.presentations.protocol import require_presentation
from guardlens.errors import InterventionError, require_type
from guardlens.hooks import HOOKS, Point, Positions, Site, as_layer, parse


@dataclass(frozen=True)
class State:
    """One vector per query, read in the prefill of some run and held for the decode steps.

    Attributes:
        presentation: The presentation whose unedited run is read; None for the run that is being edited, edits included. `text_only` means
            the prompt as it is shown, words around the query included, without its images.
        hook: The hook to read. None means the hook of the edit that asks, or, for a gate, the hook that its directions were read at.
        layer: The layer to read; None for the layer of the edit that asks.
        positions: The tokens to read. The states of several tokens are averaged.

    Raises:
        SiteError: The hook, the layer or the positions do not exist; see `Site`.
        PresentationError: `presentation` is not a presentation.

    Examples:
        >>> early = iv.State(hook="resid_post", layer=2)  # this run's own state after layer 2
        >>> run = model.run(batch, iv.patch(ssd[5], early).at(layers=5))
        >>> run.logits.shape  # lane, query, vocabulary
        torch.Size([1, 3, 251])
    """

    presentation: Presentation | None = None
    hook: str | None = None
    layer: int | None = None
    positions: Positions = "last"

    def __post_init__(self) -> None:
        if self.presentation is not None:
            require_presentation(self.presentation)
        layers = None if self.layer is None else (as_layer(self.layer),)
        site = Site("resid_post" if self.hook is None else self.hook, layers, self.positions)
        object.__setattr__(self, "hook", None if self.hook is None else site.hook)
        object.__setattr__(self, "layer", None if site.layers is None else site.layers[0])
        object.__setattr__(self, "positions", site.positions)


own_state = State()
"""This run's own state, at the hook and the layer of the edit that asks.

Examples:
    >>> same = iv.patch(ssd, iv.own_state).at(layers=5)  # a state's own component takes its place: nothing changes
    >>> torch.allclose(model.run(batch, same).logits, model.run(batch).logits, atol=1e-3)
    True
"""

text_twin = State(presentation=text_only)
"""The same prompt without its images, as the LLM reads it: `model.llm`, which is the VLM's own language model if no other was given.

Examples:
    >>> twin = iv.swap(iv.text_twin).at(layers=7)  # the last state of the text, beside an image
    >>> alone = model.batch(queries[:3], presentations.text_only)
    >>> torch.allclose(model.run(batch, twin).logits, model.run(alone).logits, atol=1e-3)
    True
"""


@dataclass(frozen=True, eq=False)
class Context:
    """What an edit may know about the states that it is given.

    Attributes:
        hook: Short name of the hook.
        layer: The layer; None if the hook has none.
        decode_step: 0 in the prefill, then 1, 2, ... in the decode steps; 0 for all tokens of an answer that is only scored.
        query: The index in the batch of the query that each state belongs to.
        strength: The step's strength, which the engine applies, not the edit.
        lookup: The held states by query; `held` gives them by state.

    Examples:
        >>> def louder(states, context):
        ...     assert states.shape == context.held(iv.text_twin).shape  # state, d_model
        ...     return states + 0.5 * (context.held(iv.text_twin) - states)
        >>> run = model.run(batch, iv.custom(louder, requires=(iv.text_twin,)).at(layers=5))
    """

    hook: str
    layer: int | None
    decode_step: int
    query: Int[Tensor, "state"]
    strength: float
    lookup: Callable[[State], Float[Tensor, "query d_model"]]

    def held(self, state: State) -> Float[Tensor, "state d_model"]:
        """Return, for each state, the held vector of its query.

        Raises:
            InterventionError: The edit does not name `state` in its `requires`, or `state` is not a `State`.
        """
        require_type(state, State, InterventionError, "ask for a State, such as interventions.text_twin")
        return self.lookup(state).to(self.query.device)[self.query]


def resolved(state: State, asked_at: Point) -> State:
    """Return a held state with the hook that it means for an edit at `asked_at`."""
    return replace(state, hook=asked_at.hook) if state.hook is None else state


def source_of(state: State, asked_at: Point, n_layers: int) -> Point:
    """Return the point at which a held state is read for an edit at `asked_at`: the last layer if neither names one."""
    hook = parse(state.hook or asked_at.hook).hook
    if not HOOKS[hook].layered:
        return Point(hook)
    layer = asked_at.layer if state.layer is None else state.layer
    return Point(hook, n_layers - 1 if layer is None else layer)
