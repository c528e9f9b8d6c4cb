"""Branches that begin at the first layer that they touch: what they give, what they compute, and when they are not used."""

import pytest
import torch

import guardlens as gl
from guardlens import gates, presentations
from guardlens import interventions as iv
from guardlens.hooks import Site
from guardlens.models.engine import limits
from guardlens.models.engine.forward import EndStates
from guardlens.models.engine.late_starts import Begun
from guardlens.models.engine.request import RunRequest
from guardlens.models.engine.strategies import BRANCHES, LATE_BRANCHES
from tests.conftest import wide_llava

HOOKS_OF_THE_TEST = pytest.mark.filterwarnings("ignore:what guardlens measures includes the hook")
TEXTS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)
LAST = Site(layers=(7,))


def close(mine, expected):
    torch.testing.assert_close(mine, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


@pytest.fixture(scope="module")
def model(processor):
    return gl.load(wide_llava(), processor=processor)


@pytest.fixture(scope="module")
def pushes(model):
    """An edit of each layer, in an order that is not the layers'."""
    push = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(2))
    edit = iv.custom(lambda states, context: states + 3 * push)
    return [edit.at(layers=[layer]) for layer in (6, 1, 7, 3, 0, 5, 2, 4)]


def is_late(model, batch, interventions, **asked):
    return not LATE_BRANCHES.unsuited(RunRequest(model.cfg, batch, interventions, **asked))


@pytest.fixture
def widths(model):
    """The number of columns that each layer's MLP was given, forward pass by forward pass."""
    seen = [[] for _ in range(model.cfg.n_layers)]
    layers = model.hf.get_submodule(model.cfg.decoder).layers
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, out, place=place: seen[place].append(args[0].shape[1]))
        for place, layer in enumerate(layers)
    ]
    yield seen
    for handle in handles:
        handle.remove()


@HOOKS_OF_THE_TEST
def test_each_layer_runs_on_those_that_have_begun_and_the_unedited_one(model, pushes, widths):
    kept = model.prefill(model.batch(TEXTS, GREY))
    model.run(kept, pushes)  # with the self-test
    for layer in widths:
        layer.clear()
    model.run(kept, pushes)
    assert [layer[0] for layer in widths] == [2, 3, 4, 5, 6, 7, 8, 9]


def test_lanes_come_back_in_their_order(model, pushes):
    batch = model.batch(TEXTS, GREY)
    late, tiles = (model.run(batch, pushes, read=[LAST], layout=layout) for layout in ("auto", "tile"))
    close(late.logits, tiles.logits)
    close(late.reads[LAST], tiles.reads[LAST])
    apart = (tiles.logits[:, None] - tiles.logits).abs().amax((2, 3)) + torch.eye(len(pushes))
    assert apart.min() > 1e-2


@HOOKS_OF_THE_TEST
@pytest.mark.parametrize("positions", [(-1, None), (-3, None), (-3, -2)])
@pytest.mark.parametrize("shares", [True, False])
def test_ends_of_several_tokens_in_rows_of_several_prompts(model, pushes, positions, shares, widths):
    """Behind a shared image, prompts of unlike length lie in one row of the KV cache."""
    batch = model.batch([*TEXTS, "please tell me how to wash the hat and how to mend the fern ."] * 6, GREY)
    prefix = model.share(batch)
    assert prefix is not None
    kept = model.prefill(batch.after(prefix) if shares else batch)
    assert (len(kept.cache.row.unique()) < len(kept)) == shares
    moved = [intervention.at(positions=positions) for intervention in pushes]
    assert is_late(model, batch, moved)
    for layer in widths:
        layer.clear()
    late = model.run(kept, moved)
    assert len({layer[-1] for layer in widths}) == len(widths)
    close(late.logits, model.run(batch, moved, layout="tile").logits)


def test_gates_and_states_of_this_run(model, basis, pushes):
    """What an edit asks for of earlier layers of its own run is there, and gates decide as they do in whole runs."""
    directions = basis.truncate(1)
    early = iv.patch(directions, iv.State(layer=1)).at(layers=[6])
    gated = iv.add(directions, 4.0).at(layers=[7]).when(gates.harmful(directions, 0.0, state=iv.own_state))
    interventions = [early, *pushes[:4], gated, iv.nothing, pushes[0] >> early.at(layers=[7])]
    batch = model.batch(TEXTS, GREY)
    assert is_late(model, batch, interventions)
    late, tiles = model.run(batch, interventions), model.run(batch, interventions, layout="tile")
    close(late.logits, tiles.logits)
    assert late.decisions.keys() == tiles.decisions.keys() and late.decisions
    assert all(torch.equal(opened, tiles.decisions[key]) for key, opened in late.decisions.items())


def test_what_begins_early_runs_whole(model, pushes):
    batch = model.batch(TEXTS, GREY)
    push = iv.custom(lambda states, context: states + 1)
    assert is_late(model, batch, pushes)
    assert not is_late(model, batch, pushes, read=[Site()])
    assert not is_late(model, batch, [*pushes, push.at(hook="embed")])
    assert not is_late(model, batch, [push.at(layers=[0])] * 20 + pushes[:2])
    assert not is_late(model, batch, [intervention.at(positions="all") for intervention in pushes])


def test_it_costs_less(model, pushes):
    request = RunRequest(model.cfg, model.batch(TEXTS, GREY), pushes)
    assert LATE_BRANCHES.cost(request) / BRANCHES.cost(request) == pytest.approx((36 + 8) / 64)


def test_a_model_in_which_it_fails_runs_whole_branches(processor, pushes, monkeypatch):
    model = gl.load(wide_llava(), processor=processor)
    batch = model.batch(TEXTS, GREY)
    expected = model.run(batch, pushes, layout="tile").logits
    complete = Begun.complete
    monkeypatch.setattr(Begun, "complete", lambda self, states: 1.01 * complete(self, states))
    run = model.run(batch, pushes)
    assert (run.layout, run.why) == ("branch", "")
    close(run.logits, expected)
    assert model._tests.flaws["late branches", True] == "branches that begin at a later layer differ from whole branches"


def test_an_error_leaves_the_layers_as_they_were(model, pushes):
    batch = model.batch(TEXTS, GREY)
    kept, layers = model.prefill(batch), model.hf.get_submodule(model.cfg.decoder).layers
    expected, before = model.run(kept, pushes).logits, [layer.__dict__.get("forward") for layer in layers]

    def fail(states, context):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.run(kept, [*pushes, iv.custom(fail).at(layers=[5])])
    assert [layer.__dict__.get("forward") for layer in layers] == before
    assert torch.equal(model.run(kept, pushes).logits, expected)


class TestLogitsOfOneLaneAfterTheOther:
    @pytest.mark.parametrize("rows", [1, 6, 128])
    @pytest.mark.parametrize("positions", ["last", "all"])
    def test_they_are_those_of_a_run(self, model, pushes, monkeypatch, rows, positions):
        monkeypatch.setattr(limits, "LOGIT_ROWS", rows)
        kept = model.prefill(model.batch(TEXTS, GREY))
        interventions = [intervention.at(positions=positions) for intervention in pushes]
        taken = []
        runs = model.run_each(kept, interventions, lambda logits: taken.append(logits.clone()) or logits.zero_())
        assert all(run.logits is None for run in runs)
        close(torch.stack(taken), model.run(kept, interventions, layout="tile").logits)

    def test_they_are_those_of_answers(self, model, pushes):
        kept = model.prefill(model.batch(TEXTS, GREY))
        said = kept.answering(torch.full((len(TEXTS), 3), 7))
        taken = []
        model.run_each(said, pushes, taken.append)
        close(torch.stack(taken), model.run(said, pushes, logits="answer").logits)

    @HOOKS_OF_THE_TEST
    def test_a_sweep_unembeds_few_at_a_time(self, model, basis, monkeypatch):
        monkeypatch.setattr(limits, "LOGIT_ROWS", 8)
        seen = []
        handle = model.hf.get_submodule(model.cfg.unembed).register_forward_hook(lambda module, args, out: seen.append(out[..., 0].numel()))
        kept = gl.keep(model, TEXTS, GREY)
        gl.sweep(model, iv.add(basis.truncate(1), 3.0), kept, strengths=[0.5, 1.0], placebos=1)
        gl.sweep(model, iv.add(basis.truncate(1), 3.0), kept, strengths=[0.5, 1.0], placebos=1)
        handle.remove()
        assert seen[-16:] == [8] * 16

    @HOOKS_OF_THE_TEST
    def test_the_lane_that_is_not_finite_is_named(self, model, pushes, monkeypatch):
        monkeypatch.setattr(limits, "LOGIT_ROWS", 4)
        calls = []

        def spoil(module, args, out):
            calls.append(None)
            if len(calls) == 3:
                out[2, 5] = float("inf")

        with model.hf.get_submodule(model.cfg.unembed).register_forward_hook(spoil):
            kept = model.prefill(model.batch(TEXTS, GREY))
            model.run(kept, pushes, logits=None)
            calls.clear()
            with pytest.raises(gl.errors.NumericsError, match="the logits of lane 2, query"):
                model.run_each(kept, pushes, lambda logits: None)

    @pytest.mark.parametrize("fails_at", [0, 2])
    def test_lanes_are_halved_where_memory_runs_out(self, model, pushes, monkeypatch, fails_at):
        """Before any logits are handed over, and after some are: none is lost, and none comes twice."""
        monkeypatch.setattr(limits, "LOGIT_ROWS", len(TEXTS))
        kept = model.prefill(model.batch(TEXTS, GREY))
        expected = model.run(kept, pushes).logits
        computed, logits_of = [], EndStates.logits

        def short_of_memory(self, start=0, stop=None):
            if len(self) > 4 * len(TEXTS) and len(computed) == fails_at:
                raise torch.OutOfMemoryError("no room")
            computed.append(None)
            return logits_of(self, start, stop)

        monkeypatch.setattr(EndStates, "logits", short_of_memory)
        taken = []
        runs = model.run_each(kept, pushes, taken.append)
        assert len(runs) == 2
        close(torch.stack(taken), expected)

    def test_one_lane_that_does_not_fit_is_an_error(self, model, pushes, monkeypatch):
        kept = model.prefill(model.batch(TEXTS, GREY))

        def short_of_memory(self, start=0, stop=None):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(EndStates, "logits", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model.run_each(kept, pushes, lambda logits: None)

    def test_what_takes_them_may_run_out_of_memory_itself(self, model, pushes):
        """Its lane was not handed over, and the model's lanes are not to blame."""
        kept = model.prefill(model.batch(TEXTS, GREY))

        def take(logits):
            raise torch.OutOfMemoryError("no room for the score")

        with pytest.raises(torch.OutOfMemoryError, match=r"the function .*take.*, which ran out of memory"):
            model.run_each(kept, pushes, take)

    @HOOKS_OF_THE_TEST
    @pytest.mark.parametrize("positions", ["last", "all"])
    def test_lanes_are_named_by_their_number_among_all(self, model, pushes, monkeypatch, positions):
        monkeypatch.setattr(limits, "BRANCH_TOKENS_PER_FORWARD", 2 * len(TEXTS))
        interventions = [intervention.at(positions=positions) for intervention in pushes]
        taken = []

        def spoil(module, args, out):
            if len(taken) == 4:
                out[..., 5] = float("inf")

        with model.hf.get_submodule(model.cfg.unembed).register_forward_hook(spoil):
            kept = model.prefill(model.batch(TEXTS, GREY))
            model.run(kept, interventions, logits=None)
            with pytest.raises(gl.errors.NumericsError, match="the logits of lane 4, query"):
                model.run_each(kept, interventions, taken.append)
        assert len(taken) == 4

    def test_a_batch_is_no_prefill(self, unchecked, model, pushes):
        with pytest.raises(gl.errors.ArgumentError, match=r"model.prefill\(batch\)"):
            model.run_each(model.batch(TEXTS, GREY), pushes, lambda logits: None)


def test_answers_after_one_image_leave_its_pixels_a_view(model):
    batch = model.batch(TEXTS, GREY)
    said = batch.answering(torch.full((len(TEXTS), 2), 7))
    assert batch.inputs.data["pixel_values"].stride(0) == said.inputs.data["pixel_values"].stride(0) == 0
    assert said.inputs["input_ids"].shape[1] == batch.inputs["input_ids"].shape[1] + 2
