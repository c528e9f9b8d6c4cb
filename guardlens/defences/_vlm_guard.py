"""VLM-Guard (Liu, Wang, Xiao, Chen 2025, arXiv 2502.10486) in its readings.

The paper projects the safety component out of the VLM's state, h(Q) (I - V^T V), which is its step 3. Its step 5 adds the component of the
LLM, alpha g h(q) V^T V, for the query q without its image and the gate g. It leaves open how the two steps join; `reading` chooses.
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

Reading = Literal["replace", "add", "amplify", "project", "literal"]
"""How the projection and the alignment of the paper join; see `vlm_guard`.

Examples:
    >>> from typing import get_args
    >>> get_args(defences.Reading)
    ('replace', 'add', 'amplify', 'project', 'literal')
"""


def vlm_guard(
    directions: Directions,
    layers: Layers | None = None,
    *,
    reading: Reading = "replace",
    alpha: float = 1.0,
    gate: Gate | str | float | None = "midpoint",
    reference: State = text_twin,
    positions: Positions = "last",
    phase: Phase = "prefill",
) -> Defence:
    """Make VLM-Guard a defence.

    The readings, of which `"project"` is the negative control:

        "replace"   h(Q) (I - V^T V) + alpha h(q) V^T V where the gate is open
        "add"       h(Q) + alpha h(q) V^T V where the gate is open
        "amplify"   h(Q) + alpha h(Q) V^T V where the gate is open; needs no text twin
        "project"   h(Q) (I - V^T V) for every query
        "literal"   h(Q) (I - V^T V) + alpha g h(q) V^T V for every query, with g = 1 where the gate is open and 0 elsewhere

    All but the last two leave the state of a query bit-identical if its gate is closed. `"literal"` projects it, which can turn harmless
    requests into refusals.

    Args:
        directions: Safety steering directions (`directions.ssd`).
        layers: The layers of the paper's L_G; None leaves them free for a sweep.
        reading: How the two steps join.
        alpha: The gain of the safety component; `"project"` does not use it.
        gate: For which queries the gate opens: `"midpoint"` or a threshold of h(q) v1 (0 is the paper's), a `Gate`, or None for all.
            `"project"` is gated only by a `Gate`.
        reference: Where h(q) is read: in the text twin of the query. For a query without an image, the text twin is the run itself, so
            `"replace"` changes nothing and `"add"` is `"amplify"`.
        positions: Which tokens are edited. The paper leaves this open; the default is the prompt's last token.
        phase: When they are edited. The paper leaves this open; the default is the prefill.

    Raises:
        InterventionError: The reading is unknown, or an argument is not of the type that it should be.
        NumericsError: The directions are zero at a layer.

    Examples:
        >>> defence = defences.vlm_guard(ssd, layers=7)
        >>> defence.intervention
        replace(ssd(rank=1), text_twin, gain=1).at(layers=[7], positions='last').when(harmful(ssd(rank=1), threshold=midpoint))
        >>> [model.generate(queries[1], grey, intervention).split()[0] for intervention in (iv.nothing, defence.intervention)]
        ['sure', 'sorry']
    """
    if not one_of(reading, get_args(Reading)):
        raise InterventionError(f"the reading {quoted(reading)}", f"one of {', '.join(get_args(Reading))}", "say reading='replace'")
    require_type(reference, State, InterventionError, "read h(q) in a State, such as interventions.text_twin")
    is_gate = isinstance(gate, Gate)
    chosen_gate = gate if is_gate or gate is None else gates.harmful(directions, gate, reference)
    if reading == "project" and not is_gate:
        chosen_gate = None
    intervention = _intervention(directions, reading, alpha, chosen_gate, reference)
    return Defence(f"vlm_guard[{reading}]", intervention.at(layers=layers, positions=positions).during(phase))


def _intervention(directions: Directions, reading: Reading, alpha: float, gate: Gate | None, reference: State) -> Intervention:
    match reading:
        case "replace":
            return _gated(replace(directions, reference, gain=alpha), gate)
        case "add":
            return _gated(add_component(directions, reference, gain=alpha), gate)
        case "amplify":
            return _gated(amplify(directions, alpha), gate)
        case "project":
            return _gated(project_out(directions), gate)
        case "literal":
            return project_out(directions) >> _gated(add_component(directions, reference, gain=alpha), gate)


def _gated(intervention: Intervention, gate: Gate | None) -> Intervention:
    return intervention if gate is None else intervention.when(gate)
