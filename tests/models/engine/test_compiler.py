"""Taps on bare tensors: order at a point, lanes, gates, reads, phases."""

import pytest
import torch

from guardlens import errors, gates, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.hooks import Point, Site
from guardlens.models.engine.compiler import compile_taps
from guardlens.models.engine.held_states import wanted_states
from guardlens.models.engine.layout import Layout
from tests.strategies import gaussian, make_batch, make_directions

POST = [Point("resid_post", layer) for layer in (0, 1)]


def add(number):
    return iv.custom(lambda states, context: states + number)


def times(number):
    return iv.custom(lambda states, context: states * number)


def drive(interventions, values, reads=(), batch=None, step=0, held=None, record=None, taps=None):
    """Run taps over independent values of each point."""
    batch = batch or make_batch((3, 5))
    if taps is None:
        taps, record = compile_taps(interventions, reads, Layout.tile(2, 5, len(interventions)), batch, 2, held or {})
    values = dict(values)
    for tap in taps:
        if step == 0 or tap.decode:
            new = tap.fn(values[tap.point], step)
            values[tap.point] = values[tap.point] if new is None else new
    return values, record, taps


def both(seed=0, rows=2, width=5):
    return {point: gaussian(seed + i, rows, width, 6, dtype=torch.float32) for i, point in enumerate(POST)}


def test_order_at_a_point():
    """An edit's own state sees the edits before it, not itself; a later layer's and a read see all."""
    seen = {}

    def note(name, state):
        def fn(states, context):
            seen[name] = context.held(state)
            return states + 100

        return iv.custom(fn, (state,))

    values = both()
    intervention = (
        add(1).at(layers=[0])
        >> note("own", iv.own_state).at(layers=[0])
        >> add(10).at(layers=[0])
        >> note("later", iv.State(layer=0, positions="all")).at(layers=[1])
    )
    batch = make_batch((5, 5))
    changed, record, _ = drive([intervention], values, [Site(layers=(0,))], batch)
    start = values[POST[0]]
    torch.testing.assert_close(seen["own"], start[:, -1] + 1)
    full = start.clone()
    full[:, -1] += 111
    torch.testing.assert_close(changed[POST[0]], full)
    torch.testing.assert_close(seen["later"], full.mean(1))
    torch.testing.assert_close(record.reads[Site(layers=(0,)), POST[0]][0], full[:, -1])


def test_steps_at_one_point_follow_the_intervention():
    values = both()
    one, other = (
        drive([intervention.at(layers=[0])], values)[0][POST[0]][:, -1] for intervention in (add(2) >> times(3), times(3) >> add(2))
    )
    torch.testing.assert_close(one, (values[POST[0]][:, -1] + 2) * 3)
    torch.testing.assert_close(other, values[POST[0]][:, -1] * 3 + 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_lanes_touch_only_their_rows_and_never_padding(side):
    batch, values = make_batch((3, 5), side), both(rows=6)
    interventions = [iv.nothing, add(1).at(positions="all", layers=[0]), times(2).at(layers=[0])]
    changed, record, _ = drive(interventions, values, [Site(positions="all")], batch)
    before, after = values[POST[0]], changed[POST[0]]
    assert torch.equal(after[:2], before[:2]) and torch.equal(changed[POST[1]], values[POST[1]])
    torch.testing.assert_close(after[2:4], before[2:4] + batch.mask[..., None])
    torch.testing.assert_close(after[4:], torch.where(batch.select("last")[..., None], 2 * before[4:], before[4:]))
    read = record.reads[Site(positions="all"), POST[0]]
    for lane in range(3):
        for row in range(2):
            torch.testing.assert_close(read[lane, row], after[2 * lane + row, batch.mask[row]].mean(0))


def test_gates_decide_per_query_and_lane():
    V = make_directions(dtype=torch.float32)
    twin = torch.stack([V.at(0)[0], -V.at(0)[0]])
    gated = add(5).when(gates.harmful(V, 0.0)).at(layers=[0])
    values = both(rows=4)
    held = {(iv.State(text_only, "resid_post"), 0): twin}
    changed, record, _ = drive([gated, add(5).when(~gates.harmful(V, 0.0)).at(layers=[0])], values, held=held)
    moved = (changed[POST[0]] - values[POST[0]])[:, -1, 0]
    torch.testing.assert_close(moved, torch.tensor([5.0, 0, 0, 5]))
    assert torch.equal(changed[POST[0]][1:3], values[POST[0]][1:3])
    assert record.decisions[0, 0, 0].tolist() == [True, False] and record.decisions[1, 0, 0].tolist() == [False, True]


def test_strength_interpolates_and_zero_is_bit_identical():
    values = both()
    start = values[POST[0]][:, -1]
    torch.testing.assert_close(drive([times(3).scaled(0.25).at(layers=[0])], values)[0][POST[0]][:, -1], 1.5 * start)
    assert torch.equal(drive([times(3).scaled(0.0)], values)[0][POST[0]], values[POST[0]])


def test_reads_are_copies_and_inputs_are_not_written():
    values = both()
    kept = {point: value.clone() for point, value in values.items()}
    changed, record, _ = drive([add(1)], values, [Site()])
    read = record.reads[Site(), POST[0]].clone()
    changed[POST[0]].zero_()
    assert torch.equal(record.reads[Site(), POST[0]], read) and all(torch.equal(values[p], kept[p]) for p in POST)


@pytest.mark.parametrize(("phase", "prefill", "decode"), [("prefill", 1, 0), ("decode", 0, 1), ("always", 1, 1)])
def test_phases(phase, prefill, decode):
    values, token = both(rows=4), both(seed=9, rows=4, width=1)
    interventions = [iv.nothing, add(1).during(phase).at(positions="image")]
    first, record, taps = drive(interventions, values)
    later, _, _ = drive(interventions, token, step=3, record=record, taps=taps)
    moved = (first[POST[0]] - values[POST[0]])[..., 0]
    expected = torch.zeros(4, 5)
    expected[2:] = make_batch((3, 5)).image * prefill
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close((later[POST[0]] - token[POST[0]])[:, 0, 0], torch.tensor([0.0, 0, decode, decode]))


def test_a_gate_is_latched_for_decode_steps():
    V = make_directions(dtype=torch.float32)
    gate = gates.harmful(V, 0.0, iv.own_state)
    values, token = both(), both(seed=9, width=1)
    values[POST[0]][:, -1] = torch.stack([V.at(0)[0], -V.at(0)[0]])
    _, record, taps = drive([add(1).when(gate).during("decode").at(layers=[0])], values)
    later, _, _ = drive([], token, step=1, record=record, taps=taps)
    torch.testing.assert_close((later[POST[0]] - token[POST[0]])[:, 0, 0], torch.tensor([1.0, 0]))


def test_taps_come_in_order_of_execution():
    intervention = add(1).at(hook="resid_pre") >> add(1).at(hook="embed") >> add(1).at(hook="attn_out", layers=[1])
    taps, _ = compile_taps([intervention], [Site("ln_final")], Layout.tile(2, 5, 1), make_batch((3, 5)), 2, {})
    names = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "ln_final.hook_out"]
    assert [tap.point.name for tap in taps] == names


def test_wanted_states_are_united_and_leave_out_the_own_run():
    V, twin, white = make_directions(), iv.State(text_only, "resid_post"), iv.State(presentations.blank("white"), "resid_post")
    interventions = [
        iv.patch(V, iv.text_twin).at(layers=[0]),
        iv.patch(V, iv.text_twin).at(layers=[1]) >> iv.patch(V, white).at(layers=[1]),
        iv.patch(V, iv.own_state),
    ]
    assert wanted_states(interventions, 2) == {twin: {0, 1}, white: {1}}


def test_a_layer_that_is_not_there():
    with pytest.raises(errors.SiteError, match=r"Found layer 2.\nExpected a layer from 0 to 1"):
        drive([add(1).at(layers=[2])], both())


def noting(seen, state, moved=100):
    """An edit that writes down a state and moves on."""

    def note(states, context):
        seen.append(context.held(state))
        return states + moved

    return iv.custom(note, (state,))


def test_a_step_has_the_own_state_of_just_before_it():
    seen, values = [], both()
    intervention = noting(seen, iv.own_state).at(layers=[0])
    drive([intervention >> add(1).at(layers=[0]) >> intervention], values)
    start = values[POST[0]][:, -1]
    assert torch.equal(seen[0], start) and torch.equal(seen[1], start + 101)


def test_a_state_of_an_earlier_layer_is_that_after_all_its_edits_whoever_else_asks_there():
    """A step at its very place sees it before itself; later ones, where the intervention puts them or not, after all edits of the place."""
    early, later, values, first = [], [], both(), iv.State(layer=0)
    drive([noting(later, first).at(layers=[1]) >> noting(early, first).at(layers=[0]) >> noting(later, first).at(layers=[1])], values)
    start = values[POST[0]][:, -1]
    assert torch.equal(early[0], start)
    assert all(torch.equal(seen, start + 100) for seen in later) and len(later) == 2


def test_steps_at_one_place_have_gates_of_their_own_states():
    """The first step carries every state over the threshold, so the second one's gate opens for all."""
    V = make_directions(dtype=torch.float32)
    gate = gates.harmful(V, 0.0, iv.own_state)
    values, push = both(), iv.custom(lambda states, context: states + 9 * V.at(0)[0])
    values[POST[0]][:, -1] = torch.stack([V.at(0)[0], -V.at(0)[0]])
    intervention = add(0).when(gate) >> push >> add(0).when(gate)
    _, record, _ = drive([intervention.at(layers=[0])], values)
    assert record.decisions[0, 0, 0].tolist() == [True, False] and record.decisions[0, 2, 0].tolist() == [True, True]
