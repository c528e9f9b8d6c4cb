"""VLM-Guard (Liu, Wang, Xiao, Chen 2025, arXiv 2502.10486) in its four readings.

The paper projects the safety component out of the VLM's state, h(Q) (I - V^T V), and adds that of the LLM, alpha g h(q) V^T V, for the
image-free query q. It leaves open how the two join; `reading` names the ways, `closed` what a closed gate leaves.
"""

from typing import Literal, get_args

from guardlens.defences.base import Defence
from guardlens.directions import Directions
from guardlens.errors import InterventionError, one_of, quoted, require_type
from guardlens.hooks import Layers, Positions
from guardlens.interventions import Intervention, add_component, amplify, gates, project_out, replace, text_twin
from guardlens.interventions.gates import Gate
from guardlens.interventions.held_states import State
from guardlens.interventions.step import Phase

Reading = Literal["replace", "add", "amplify", "project"]
"""How the projection and the alignment of the paper join; see `vlm_guard`.

Examples:
    >>> from typing import get_args
    >>> get_args(defences.Reading)
    ('replace', 'add', 'amplify', 'project')
"""

Closed = Literal["untouched", "project"]


def vlm_guard(
    directions: Directions,
    layers: Layers | None = None,
    *,
    reading: Reading = "replace",
    alpha: float = 1.0,
    gate: "Gate | str | float | None" = "midpoint",
    closed: Closed = "untouched",
    reference: State = text_twin,
    positions: Positions = "last",
    phase: Phase = "prefill",
) -> Defence:
    """The guard as a defence.

    Args:
        directions: Safety steering directions (`directions.ssd`).
        layers: The layers of the paper's L_G; None leaves them free for a sweep.
        reading: `"replace"`: h(Q)(I - V^T V) + alpha h(q) V^T V. `"add"`: h(Q) + alpha h(q) V^T V.
            `"amplify"`: h(Q) + alpha h(Q) V^T V, which needs no text twin. `"project"`: h(Q)(I - V^T V) alone, the negative control.
        alpha: The gain of the safety component (not used by `"project"`).
        gate: For which queries: `"midpoint"` or a threshold of h(q) v1 (0 is the paper's), a gate of your own, or None for all.
            `"project"` is never gated, unless you pass a gate of your own.
        closed: What queries get for which the gate is closed: nothing (`"untouched"`: bit-identical), or the projection without the
            addition (`"project"`, the literal reading of `"replace"`; it can turn harmless requests into refusals).
        reference: Where h(q) is read: the text twin of the query. Without an image beside the query, that is the run itself: there,
            `"replace"` changes nothing, and `"add"` is `"amplify"`.
        positions: The paper leaves them open; the prompt's last token by default.
        phase: Likewise; the prefill by default.

    Raises:
        InterventionError: An unknown reading or `closed`, `closed="project"` with another reading than `"replace"`, or what is no
            directions, no number, no gate or no state where one is asked for.

    Examples:
        >>> defence = defences.vlm_guard(ssd, layers=7)
        >>> defence.intervention
        replace(ssd(rank=1), text_twin, gain=1).at(layers=[7], positions='last').when(harmful(ssd(rank=1), threshold=midpoint))
        >>> [model.generate(queries[1], grey, intervention).split()[0] for intervention in (iv.nothing, defence.intervention)]
        ['sure', 'sorry']
    """
    if not one_of(reading, get_args(Reading)):
        raise InterventionError(
            f"the reading {quoted(reading)}", f"one of {', '.join(get_args(Reading))}", "see the docstring of vlm_guard"
        )
    if not one_of(closed, get_args(Closed)):
        raise InterventionError(
            f"closed={quoted(closed)}", f"one of {', '.join(map(repr, get_args(Closed)))}", "see the docstring of vlm_guard"
        )
    if closed == "project" and reading != "replace":
        raise InterventionError(f"closed='project' with the reading {reading!r}", "the reading 'replace'", "leave closed out")
    require_type(reference, State, InterventionError, "read h(q) in a State, such as interventions.text_twin")
    own_gate = gate if isinstance(gate, Gate) or gate is None else gates.harmful(directions, gate, reference)
    intervention = (
        _literal(directions, alpha, own_gate, reference) if closed == "project" else _intervention(directions, reading, alpha, reference)
    )
    gated = own_gate is not None and closed == "untouched" and (reading != "project" or isinstance(gate, Gate))
    intervention = intervention.when(own_gate) if gated and own_gate is not None else intervention
    return Defence(f"vlm_guard[{reading}]", intervention.at(layers=layers, positions=positions).during(phase))


def _intervention(directions: Directions, reading: Reading, alpha: float, reference: State) -> Intervention:
    match reading:
        case "replace":
            return replace(directions, reference, gain=alpha)
        case "add":
            return add_component(directions, reference, gain=alpha)
        case "amplify":
            return amplify(directions, alpha)
        case "project":
            return project_out(directions)


def _literal(directions: Directions, alpha: float, gate: Gate | None, reference: State) -> Intervention:
    """Step 3 for everyone, then step 5 where the gate is open."""
    addition = add_component(directions, reference, gain=alpha)
    return project_out(directions) >> (addition.when(gate) if gate is not None else addition)
