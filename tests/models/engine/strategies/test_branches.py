"""Branches of the last token against whole runs, in every family; what is kept between questions; and what can't branch."""

import copy

import pytest
import torch

import guardlens as gl
from guardlens import directions, errors, gates, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.experiments.scores import kl, refusal_logodds
from guardlens.hooks import Site
from guardlens.models.engine.layout import Layout
from guardlens.models.engine.strategies import FORKS
from guardlens.models.engine.strategies.answers import answers_case
from guardlens.models.engine.strategies.tiles import Tiles
from guardlens.models.processing.chat_template import pad_token_id
from tests.models.architectures.test_families import BY_NAME, a_push, asked, batch_of, close, loaded, pushing, whole_batch
from tests.strategies import make_batch

TEXTS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)
SHARE_KEYS = {"Gemma 4"}
"""Families in which a layer attends to the keys of another, so that both must run on the same tokens."""


@pytest.fixture(params=list(BY_NAME), scope="module")
def name(request):
    return request.param


def interventions_of(model):
    """One that does nothing, one per layer, one of two layers, and one inside the attention where the family has that."""
    push, layers = a_push(model), range(model.cfg.n_layers)
    interventions = [
        iv.nothing,
        *(pushing(push).at(layers=[layer]) for layer in layers),
        pushing(-push).at(layers=[0, model.cfg.n_layers - 1]),
    ]
    inside = [point.layer for point in model.cfg.computed(False) if point.hook == "attn_out"]
    return interventions + ([pushing(push).at(hook="attn_out", layers=[inside[-1]])] if inside else [])


class TestEveryFamily:
    def test_branches_equal_whole_runs(self, name):
        family, model = BY_NAME[name], loaded(name)
        batch, interventions, site = whole_batch(family, model), interventions_of(model), Site()
        last = Site(layers=(model.cfg.n_layers - 1,))
        tiles = model.run(batch, interventions, read=[site, last], layout="tile")
        if family.lacks("branches"):
            fallen_back = model.run(batch, interventions, read=[site])
            assert fallen_back.layout == "tile" and fallen_back.why
            with pytest.raises(errors.InterventionError, match="Interventions can't run as branches: "):
                model.run(batch, interventions, layout="branch")
            close(fallen_back.logits, tiles.logits)
            return
        branches = model.run(batch, interventions, read=[site])
        assert (branches.layout, branches.why) == ("branch", "")
        close(branches.logits, tiles.logits)
        close(branches.reads[site], tiles.reads[site])
        late = model.run(batch, interventions, read=[last])
        flaw = model._tests.flaws["late branches", batch.beside_image]
        assert bool(flaw) == (name in SHARE_KEYS)
        close(late.logits, tiles.logits)
        close(late.reads[last], tiles.reads[last])
        assert (tiles.logits[1:-1] - tiles.logits[0]).flatten(1).abs().amax(1).min() > 1e-3

    def test_copies_of_longer_ends_equal_whole_runs(self, name):
        """An edit of one token, of all from there on, and of none; the last block's state at both of two tokens."""
        family, model = BY_NAME[name], loaded(name)
        if family.lacks("branches"):
            return
        batch, site = whole_batch(family, model), Site(layers=(model.cfg.n_layers - 1,), positions=(-2, None))
        interventions = [
            intervention.at(positions=where) for intervention in interventions_of(model)[:4] for where in ((-3, -2), (-3, None))
        ]
        branches, tiles = (model.run(batch, interventions, read=[site], layout=layout) for layout in ("branch", "tile"))
        close(branches.logits, tiles.logits)
        close(branches.reads[site], tiles.reads[site])

    def test_forks_equal_whole_runs(self, name):
        family, model = BY_NAME[name], loaded(name)
        batch, site = whole_batch(family, model), Site(layers=(model.cfg.n_layers - 1,))
        interventions = [intervention.at(positions="all") for intervention in interventions_of(model)]
        if family.lacks("forks"):
            assert model._tests.flaw_of(FORKS, "forks", batch)
            return
        forks, tiles = (model.run(batch, interventions, read=[site], layout=layout) for layout in ("fork", "tile"))
        assert (forks.layout, forks.why) == ("fork", "forks were asked for")
        close(forks.logits, tiles.logits)
        close(forks.reads[site], tiles.reads[site])

    def test_answers_behind_kept_prompts_are_those_of_whole_prompts(self, name):
        family, model = BY_NAME[name], loaded(name)
        if family.lacks("branches"):
            return
        batch, site = whole_batch(family, model), Site()
        interventions = [intervention.during(phase) for intervention in interventions_of(model)[:3] for phase in ("always", "decode")]
        kept = model.prefill(batch)
        size = kept.bytes
        behind, whole = (model.run(prompts, interventions, new_tokens=6, read=[site]) for prompts in (kept, batch))
        assert kept.bytes == size and torch.equal(behind.tokens, whole.tokens)
        close(behind.reads[site], whole.reads[site])
        assert bool(model._tests.flaws[answers_case(batch, shares_prefix=False), batch.beside_image]) == bool(family.lacks("answers"))

    def test_answers_put_into_the_models_mouth(self, name):
        """Behind what is kept, and as longer prompts, edited while it reads the answer too; forced answers are those it would give."""
        family, model = BY_NAME[name], loaded(name)
        batch, kept = whole_batch(family, model), model.prefill(whole_batch(family, model))
        interventions = [intervention.during("always") for intervention in interventions_of(model)[:4]]
        said = kept.answering(batch.inputs["input_ids"][:1, -5:].expand(len(kept), 5))
        if family.lacks("forced answers"):
            with pytest.raises(errors.ModelError, match="a model whose prompts see the answers behind them"):
                model.run(said, interventions, logits="answer")
            return
        mine, tiles = model.run(said, interventions, logits="answer"), model.run(said, interventions, logits="answer", layout="tile")
        assert mine.layout in (("tile", "fork") if family.lacks("branches") else ("branch",)) and tiles.layout == "tile"
        assert mine.logits.shape[:3] == (len(interventions), len(kept), 5)
        close(mine.logits, tiles.logits)
        close(mine.logits[:, :, 0], model.run(batch, interventions, layout="tile").logits)
        special = torch.tensor([pad_token_id(model.tokenizer), -1 if model.cfg.image_token_id is None else model.cfg.image_token_id])
        for intervention, tokens in zip(interventions[1:3], model.run(batch, interventions[1:3], new_tokens=4).tokens, strict=True):
            ended = torch.isin(tokens, special).cumsum(1) > 0
            forced = model.run(kept.answering(tokens.masked_fill(ended, 0)), intervention, logits="answer").logits[0].argmax(-1)
            assert torch.equal(forced[~ended], tokens[~ended])

    def test_half_precision_is_as_near_to_single_as_whole_runs_are(self, name):
        family, exact = BY_NAME[name], loaded(name)
        hf = copy.deepcopy(exact.hf)
        for parameter in hf.parameters():  # as a checkpoint is loaded; tables of positions stay as they are
            parameter.data = parameter.data.to(torch.bfloat16)
        half = gl.load(hf, processor=exact.processor, self_check=False)
        batch, interventions = batch_of(family, half), interventions_of(exact)[:4]
        for where in ("last", "all"):
            moved = [intervention.at(positions=where) for intervention in interventions]
            truth = exact.run(whole_batch(family, exact), moved, layout="tile").logits
            tiles, mine = half.run(batch, moved, layout="tile"), half.run(batch, moved)
            lacks = family.lacks("branches" if where == "last" else "forks")
            assert mine.layout == {"last": "fork" if lacks else "branch", "all": "tile" if lacks else "fork"}[where]
            noise = (tiles.logits.float() - truth).square().mean().sqrt()
            assert 0 < (mine.logits.float() - truth).square().mean().sqrt() < 1.25 * noise

    def test_asking_again_costs_nothing_of_what_is_kept(self, name):
        family, model = BY_NAME[name], loaded(name)
        if family.lacks("branches"):
            return
        batch, interventions = whole_batch(family, model), interventions_of(model)
        kept = model.prefill(batch)
        first = model.run(kept, interventions)
        close(first.logits[0], kept.logits)
        size = kept.bytes
        assert torch.equal(model.run(kept, interventions).logits, first.logits) and kept.bytes == size

    def test_one_prompt_alone_and_text_alone(self, name):
        family, model = BY_NAME[name], loaded(name)
        shown, own = asked(family)
        interventions = interventions_of(model)[:3]
        for presentation in (own, text_only) if family.vision and not family.lacks("text alone") else (own,):
            batch = model.batch(shown[2], presentation)
            close(model.run(batch, interventions).logits, model.run(batch, interventions, layout="tile").logits)


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(TEXTS, GREY)


@pytest.fixture(scope="module")
def gated(vlm, basis):
    """A text twin's component behind a gate that opens for some."""
    states = vlm.run(vlm.batch(TEXTS), read=[Site()]).reads[Site()][0, :, 3] @ basis.at(3)[0]
    return iv.replace(basis, iv.text_twin, gain=1.5).when(gates.harmful(basis, float(states.median()) + 1e-4)).at(layers=[3])


def test_gates_twins_and_own_states_ride_along(vlm, batch, basis, gated):
    interventions = [
        gated,
        gated.placebo(),
        gated.scaled(0.5),
        iv.add(basis.truncate(1), 4.0).at(layers=[1]) >> iv.patch(basis, iv.State(layer=1)).at(layers=[5]),
        iv.amplify(basis, 2.0).when(gates.harmful(basis, "midpoint")).during("always"),
        iv.add(basis.truncate(1), 4.0).at(layers=[1], positions="all").during("decode"),
    ]
    branches, tiles = vlm.run(batch, interventions), vlm.run(batch, interventions, layout="tile")
    assert branches.layout == "branch"
    close(branches.logits, tiles.logits)
    assert branches.decisions.keys() == tiles.decisions.keys() and len(tiles.decisions) > 3
    assert all(torch.equal(opened, tiles.decisions[key]) for key, opened in branches.decisions.items())
    assert 0 < branches.decisions[0, 0, 3].sum() < len(TEXTS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_kernels_and_precisions(hf_vlm, processor, attention, dtype):
    hf = copy.deepcopy(hf_vlm).to(dtype)
    hf.set_attn_implementation(attention)
    model = gl.load(hf, processor=processor)
    batch, interventions = model.batch(TEXTS, GREY), interventions_of(model)
    branches, tiles = model.run(batch, interventions), model.run(batch, interventions, layout="tile")
    assert branches.layout == "branch"
    if dtype == torch.float32:
        close(branches.logits, tiles.logits)
        return
    exact = gl.load(hf_vlm, processor=processor).run(batch, interventions, layout="tile").logits
    noise = (tiles.logits.float() - exact).abs().max()
    assert (branches.logits.float() - exact).abs().max() < 1.5 * noise


@pytest.mark.parametrize(
    ("intervention", "options", "reason"),
    [
        (lambda basis: iv.amplify(basis).at(positions="all"), {}, "the positions 'all' are edited or read"),
        (lambda basis: iv.amplify(basis).at(positions="image"), {}, "the positions 'image' are edited or read"),
        (lambda basis: iv.amplify(basis), {"read": [Site(positions=(0, 3))]}, "the positions (0, 3) are edited or read"),
        (lambda basis: iv.amplify(basis), {"logits": "all"}, "logits of all tokens are asked for"),
        (lambda basis: iv.amplify(basis), {"new_tokens": 2}, "answers are generated"),
    ],
)
def test_what_reaches_beyond_the_last_token_runs_as_tiles(vlm, batch, basis, intervention, options, reason):
    interventions = [iv.nothing, intervention(basis)]
    run = vlm.run(batch, interventions, **options)
    assert (run.layout, run.why) == ("tile", reason)


def test_a_batch_padded_on_the_right_runs_as_tiles(vlm, basis):
    batch = vlm.batch(TEXTS, GREY, padding_side="right")
    run = vlm.run(batch, [iv.nothing, iv.amplify(basis)])
    assert run.why == "the batch is padded on the right"
    close(run.logits, vlm.run(vlm.batch(TEXTS, GREY), [iv.nothing, iv.amplify(basis)]).logits)


def test_an_error_in_an_edit_leaves_what_is_kept_whole(vlm, batch, basis):
    kept, calls = vlm.prefill(batch), []

    def fail(states, context):
        calls.append(context.layer)
        raise RuntimeError("mine")

    expected = vlm.run(kept, [iv.nothing, iv.amplify(basis)]).logits
    with pytest.raises(RuntimeError, match="mine"):
        vlm.run(kept, [iv.nothing, iv.custom(fail).at(layers=[4])])
    assert calls == [4]
    assert torch.equal(vlm.run(kept, [iv.nothing, iv.amplify(basis)]).logits, expected)


@pytest.mark.parametrize("rows", [[0, 1], [0, 0], [1, 0]])
def test_tails_lie_beside_each_other_in_the_rows_of_their_beginnings(rows):
    batch = make_batch((3, 5, 4))
    tail = batch.mask & (batch.mask.cumsum(1) > torch.tensor([2, 1, 3])[:, None])
    layout = Layout.continuations(tail, torch.tensor([*rows, 0]), range(2))
    assert (layout.name, layout.lanes, int((layout.lane >= 0).sum())) == ("branch", 2, 2 * (1 + 4 + 1))
    ids = batch.inputs["input_ids"]
    for lane in range(2):
        places = layout.find(tail)[lane]
        assert sorted(places.queries.tolist()) == [0, 1, 1, 1, 1, 2]
        assert (
            layout.gather(ids)[places.rows, places.columns].tolist()
            == ids[places.queries, layout.column[places.rows, places.columns]].tolist()
        )
        assert places.rows.tolist() == [[*rows, 0][query] for query in places.queries.tolist()]
    with pytest.raises(errors.InterventionError, match=r"12 chosen tokens of which 6 are computed in the layout 'branch'"):
        layout.find(batch.select("all"))


def test_forks_run_where_the_blocks_that_they_skip_make_up_for_one_run(vlm, batch, basis):
    def ran(layers):
        run = vlm.run(batch, [iv.amplify(basis).at(positions="all", layers=[layer]) for layer in layers])
        return run.layout, run.why

    why = "the positions 'all' are edited or read"
    assert ran([3, 5]) == ("tile", why) and ran([3, 5, 1]) == ("fork", why) and ran([0] * 9) == ("tile", why)


def test_a_block_that_was_skipped_is_whole_again(vlm, batch):
    def fail(states, context):
        raise RuntimeError("mine")

    plain = vlm.run(batch).logits
    with pytest.raises(RuntimeError, match="mine"):
        vlm.run(batch, [iv.custom(fail).at(layers=[6], positions="all")] * 2, layout="fork")
    assert torch.equal(vlm.run(batch).logits, plain)


def test_answers_need_prompts_that_are_kept(vlm, batch):
    tokens = torch.zeros(len(TEXTS), 2, dtype=torch.long)
    for prompts, options in (
        (batch, {"logits": "answer"}),
        (batch.answering(tokens), {}),
        (vlm.prefill(batch), {"logits": "answer"}),
        (vlm.prefill(batch).answering(tokens), {"new_tokens": 2}),
    ):
        with pytest.raises(errors.ArgumentError, match="an answer behind no prefilled prompts"):
            vlm.run(prompts, **options)
    with pytest.raises(errors.InterventionError, match="prompts with answers"):
        vlm.prefill(batch.answering(tokens))
    with pytest.raises(errors.InterventionError, match="padded on the right"):
        vlm.batch(TEXTS, padding_side="right").answering(tokens)


@pytest.fixture(scope="module")
def organism():
    return gl.load("organism")


class TestKept:
    def test_the_text_twin_runs_once_however_many_interventions_ask(self, vlm, batch, gated, basis, monkeypatch):
        runs, real = [], Tiles.run

        def note(self, engine, request, held, prefill=None):
            runs.append(request.batch.presentation.name)
            return real(self, engine, request, held, prefill)

        monkeypatch.setattr(Tiles, "run", note)
        kept = vlm.prefill(batch)
        runs.clear()
        for layer in range(8):
            vlm.run(kept, [iv.replace(basis, iv.text_twin).at(layers=[layer]), gated.scaled(0.5)])
        assert len(runs) == 1

    def test_sweeps_of_kept_prompts_are_sweeps(self, organism):
        ssd = directions.ssd(gl.collect(organism, gl.organism.pairs()))
        queries, guard = gl.organism.queries("validation")[:10], iv.replace(ssd, iv.text_twin)
        prompts = gl.keep(organism, queries, GREY, batch_size=4)
        assert (len(prompts), len(prompts.parts), prompts.bytes > 0) == (10, 3, True)
        options = {"scores": [refusal_logodds, kl], "strengths": [0.5, 1.0]}
        again = gl.sweep(organism, guard, prompts, **options)
        once = gl.sweep(organism, guard, queries, GREY, **options)
        assert again.facts["layout"] == once.facts["layout"] == ["branch"]
        assert again.facts["presentation"] == "blank grey"
        torch.testing.assert_close(torch.tensor(again.columns["value"]), torch.tensor(once.columns["value"]), atol=1e-4, rtol=0)
        everywhere = gl.sweep(organism, guard.at(positions="all"), prompts, layers=[2])
        assert everywhere.facts["layout"] == ["tile: the positions 'all' are edited or read"]

    def test_those_of_another_model_or_presentation_are_refused(self, vlm, organism):
        prompts = gl.keep(vlm, TEXTS, GREY)
        with pytest.raises(errors.MismatchError, match="prompts kept by"):
            gl.sweep(organism, iv.custom(lambda states, context: states), prompts)
        with pytest.raises(errors.MismatchError, match="one of 'noise'"):
            gl.sweep(vlm, iv.custom(lambda states, context: states), prompts, presentations.noise())
