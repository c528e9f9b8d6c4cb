"""`sweep` against its own cells run alone, and its table against hand-made ones."""

import dataclasses
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax, rel_entr

import guardlens as gl
from guardlens import errors, gates, presentations
from guardlens import interventions as iv
from guardlens.experiments.scores import AnswerKL, AnswerLogProb, RefusalLogOdds, kl, refusal_logodds
from guardlens.experiments.sweeps import Sweep
from guardlens.hooks import Site
from guardlens.results.intervals import bootstrap
from tests import reference

GREY = presentations.blank("grey", 32)
QUERIES = (*gl.organism.queries("test")[:3], *gl.organism.queries("test")[-2:])
STRENGTHS = (0.5, -1.0)


@pytest.fixture(scope="module")
def intervention(basis):
    """Gated, so that mixed decisions of the gate are under test too."""
    return iv.amplify(basis, 8.0).when(gates.harmful(basis, 0.0))


@pytest.fixture(scope="module")
def swept(vlm, intervention):
    return gl.sweep(vlm, intervention, gl.keep(vlm, QUERIES, GREY, batch_size=3), strengths=STRENGTHS, placebos=2)


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(QUERIES, GREY)


def by_hand(logits, base, tokenizer):
    """Both scores by numpy and scipy."""
    firsts = {tokenizer(start, add_special_tokens=False)["input_ids"][0] for start in refusal_logodds.starts}
    log_q, log_p = (log_softmax(x.double().numpy(), axis=-1) for x in (logits, base))
    ids = sorted(firsts - {tokenizer.unk_token_id})
    refused = np.exp(log_q[:, ids]).sum(-1)
    return {"refusal_logodds": np.log(refused / (1 - refused)), "kl": rel_entr(np.exp(log_p), np.exp(log_q)).sum(-1)}


def cell(table, **where):
    rows = table.where(**where)
    assert rows.columns["query"].tolist() == [query.id for query in QUERIES]
    return rows.columns["value"]


def test_every_cell_equals_its_own_run(vlm, swept, intervention, batch):
    base = vlm.run(batch).logits[0]
    variants = {"edit": intervention, "placebo 0": intervention.placebo(0), "placebo 1": intervention.placebo(1)}
    assert len(swept) == 3 * 8 * 2 * 2 * len(QUERIES)
    for variant, acting in variants.items():
        for layer in range(8):
            for strength in STRENGTHS:
                alone = by_hand(vlm.run(batch, acting.placed([layer], strength)).logits[0], base, vlm.tokenizer)
                for score, values in alone.items():
                    found = cell(swept, variant=variant, layer=layer, strength=strength, score=score)
                    np.testing.assert_allclose(found, values, atol=2e-4, rtol=1e-4)
    assert not np.allclose(cell(swept, variant="edit", layer=5, strength=-1.0, score="kl"), 0)


def test_base_is_the_unedited_run(vlm, swept, batch):
    base = vlm.run(batch).logits[0]
    expected = by_hand(base, base, vlm.tokenizer)
    for score in ("refusal_logodds", "kl"):
        rows = swept.where(score=score).columns["base"].reshape(-1, len(QUERIES))
        np.testing.assert_allclose(rows, np.tile(expected[score], (len(rows), 1)), atol=1e-4)
    assert np.all(swept.where(score="kl").columns["base"] == 0)


def test_gates_are_respected(vlm, swept, basis):
    """Where the gate is closed nothing changes; the placebo keeps the gate."""
    states = vlm.run(vlm.batch(QUERIES), read=[Site()], logits=None).reads[Site()][0]
    opened = torch.stack([states[:, layer] @ basis.at(layer)[0] > 0 for layer in range(8)]).numpy()
    assert 0 < opened.sum() < opened.size
    for variant in ("edit", "placebo 1"):
        for layer in range(8):
            change = np.abs(cell(swept, variant=variant, layer=layer, strength=-1.0, score="kl"))
            assert (change[opened[layer]] > 1e-4).all() and (change[~opened[layer]] < 1e-6).all()


def test_placebos_move_as_much_elsewhere(swept):
    edit, first, second = (
        cell(swept, variant=variant, layer=6, strength=-1.0, score="refusal_logodds") for variant in ("edit", "placebo 0", "placebo 1")
    )
    assert not np.allclose(edit, first) and not np.allclose(first, second)


def test_columns_name_every_cell(swept):
    frame = swept.frame
    assert list(frame.columns) == [
        "intervention",
        "variant",
        "layers",
        "layer",
        "strength",
        "query",
        "label",
        "cluster",
        "score",
        "value",
        "base",
    ]
    assert not frame.duplicated(["intervention", "variant", "layers", "strength", "query", "score"]).any()
    assert dict(zip(frame["query"], frame["label"], strict=True)) == {query.id: query.label for query in QUERIES}
    assert set(frame["strength"]) == {0.5, -1.0} and set(frame["intervention"]) == {"edit"}


def test_batch_size_lanes_and_progress_do_not_matter(vlm, intervention, swept, capsys, monkeypatch):
    monkeypatch.setattr("guardlens.models.engine.limits.BRANCH_TOKENS_PER_FORWARD", 12)
    with gl.progress_bars(True):
        again = gl.sweep(vlm, intervention, gl.keep(vlm, QUERIES, GREY, batch_size=5), layers=[2, 6], strengths=STRENGTHS)
    assert "sweep, 8 cells, blank grey" in capsys.readouterr().err
    for layer in (2, 6):
        for score in ("kl", "refusal_logodds"):
            where = {"variant": "placebo 0", "layer": layer, "strength": 0.5, "score": score}
            np.testing.assert_allclose(cell(again, **where), cell(swept, **where), atol=1e-4)


@pytest.mark.parametrize("phase", ["prefill", "always"])
def test_scores_of_an_answer_are_those_of_raw_hooks_on_prompts_and_answers(vlm, basis, batch, phase):
    """Log-probability of a text, and KL along the model's own answer: each token after the hooked ones before it."""
    text, (V,) = "sorry , i can not", (basis.at(5).T @ basis.at(5),)
    scores, intervention = [AnswerLogProb(text), kl, AnswerKL(tokens=4)], iv.amplify(basis, 8.0).during(phase)
    found = gl.sweep(vlm, intervention, QUERIES, GREY, scores=scores, layers=[5], placebos=0)
    assert found.facts["layout"] == ["branch"] and found.facts["units"]["answer_logprob"] == "log p('sorry , i can not') (nats)"
    own = reference.generate(vlm.hf, batch.inputs, 5, lambda h: h, "always", 4)
    given = torch.tensor(vlm.tokenizer(text, add_special_tokens=False)["input_ids"]).expand(len(QUERIES), -1)
    width = batch.mask.shape[1]

    def after(tokens, edited):
        def hook(out):
            out, until = out.clone(), None if phase == "always" else width
            out[:, width - 1 : until] += 8.0 * out[:, width - 1 : until] @ V
            return out

        ids = torch.cat([batch.inputs["input_ids"], tokens], dim=1)
        inputs = batch.inputs | {"input_ids": ids, "attention_mask": torch.cat([batch.mask.long(), torch.ones_like(tokens)], dim=1)}
        logits = reference.with_hooks(vlm.hf, inputs, edits={5: hook} if edited else {})
        return log_softmax(logits[:, width - 1 : -1].double().numpy(), axis=-1)

    expected = np.take_along_axis(after(given, True), given.numpy()[..., None], axis=2)[..., 0].sum(1)
    np.testing.assert_allclose(cell(found, score="answer_logprob"), expected, atol=1e-3)
    log_q, log_p = after(own, True), after(own, False)
    ended = (own == vlm.hf.generation_config.eos_token_id).int()
    real = (ended.cumsum(1) - ended == 0).numpy()
    expected = (rel_entr(np.exp(log_p), np.exp(log_q)).sum(-1) * real).sum(1) / real.sum(1)
    np.testing.assert_allclose(cell(found, score="answer_kl"), expected, atol=1e-3, rtol=1e-3)
    assert np.abs(found.where(score="answer_kl").columns["base"]).max() < 1e-6 < expected.min()


def test_an_answer_that_the_tokenizer_does_not_know_is_refused(vlm, intervention):
    for text in ("", "flibbertigibbet"):
        with pytest.raises(errors.ModelError, match="that the tokenizer does not know"):
            gl.sweep(vlm, intervention, QUERIES, scores=[AnswerLogProb(text)], layers=[4])


def test_groups_of_layers_are_edited_together(vlm, intervention, batch):
    found = gl.sweep(vlm, intervention, QUERIES, GREY, scores=[kl], layers=[(2, 5), 3, [6]], placebos=0)
    assert list(dict.fromkeys(zip(found.columns["layers"], found.columns["layer"], strict=True))) == [("2+5", 2), ("3", 3), ("6", 6)]
    base = vlm.run(batch).logits[0]
    together = by_hand(vlm.run(batch, intervention.at(layers=[2, 5])).logits[0], base, vlm.tokenizer)["kl"]
    np.testing.assert_allclose(cell(found, layers="2+5"), together, atol=2e-4, rtol=1e-4)
    assert set(found.columns["variant"]) == {"edit"}


def test_strength_zero_is_left_out(vlm, intervention):
    found = gl.sweep(vlm, intervention, QUERIES, scores=[kl], strengths=(0.0, 1.0, 0.0), layers=[4], placebos=0)
    assert found.columns["strength"].tolist() == [1.0] * len(QUERIES)


def test_cells_are_named_once_whatever_names_their_layers_and_strengths(vlm, intervention):
    options = {"scores": [kl], "placebos": 1}
    strengths = (strength for strength in (1.0, np.float32(2), 1))
    found = gl.sweep(vlm, intervention, QUERIES, layers=np.array([5, 5]), strengths=strengths, **options)
    assert len(found) == 2 * 2 * len(QUERIES) and set(found.columns["strength"]) == {1.0, 2.0}  # both for the placebo, too
    found = gl.sweep(vlm, intervention, QUERIES, layers=[(5, 6), (6, 5), torch.tensor(6)], strengths=[1.0], **options)
    assert list(dict.fromkeys(found.columns["layers"])) == ["5+6", "6"]
    assert len(gl.sweep(vlm, intervention, QUERIES, layers=np.int64(5), **options)) == 2 * len(QUERIES)


def test_only_free_steps_move_and_scale(vlm, basis, batch):
    fixed, free = iv.add(basis.truncate(1), 9.0).at(layers=[1]), iv.amplify(basis, 4.0)
    found = gl.sweep(vlm, fixed >> free, QUERIES, GREY, scores=[kl], layers=[6], strengths=[0.25], placebos=0)
    base = vlm.run(batch).logits[0]
    expected = by_hand(vlm.run(batch, fixed >> iv.amplify(basis, 1.0).at(layers=[6])).logits[0], base, vlm.tokenizer)["kl"]
    np.testing.assert_allclose(cell(found), expected, atol=2e-4, rtol=1e-4)


def test_several_interventions_by_name(vlm, basis, batch):
    interventions = {"weak": iv.amplify(basis, 1.0), "strong": iv.amplify(basis, 9.0)}
    found = gl.sweep(vlm, interventions, QUERIES, GREY, scores=[refusal_logodds], layers=[4])
    base = vlm.run(batch).logits[0]
    for name, intervention in interventions.items():
        expected = by_hand(vlm.run(batch, intervention.at(layers=[4])).logits[0], base, vlm.tokenizer)["refusal_logodds"]
        np.testing.assert_allclose(cell(found, intervention=name, variant="edit"), expected, atol=2e-4)
    assert found.facts["interventions"] == {name: repr(intervention) for name, intervention in interventions.items()}


def test_summary_is_the_mean_change_of_each_cell(swept):
    summary, frame = swept.summary(), swept.frame
    assert len(summary) == 2 * 2 * 8 * 2 * 2  # scores, variants, layers, strengths, labels
    for row in summary.itertuples():
        variants = frame["variant"] == "edit" if row.variant == "edit" else frame["variant"].str.startswith("placebo")
        part = frame[variants & (frame["score"] == row.score) & (frame["layer"] == row.layer) & (frame["strength"] == row.strength)]
        part = part[part["label"] == row.label]
        assert row.change == pytest.approx((part["value"] - part["base"]).mean(), abs=1e-9)
        assert row.n == {"harmful": 3, "harmless": 2}[row.label]
        assert row.low - 1e-9 <= row.change <= row.high + 1e-9


def test_intervals_resample_clusters_of_queries(swept):
    changes, clusters = np.array([0.0, 1.0, 4.0, 5.0, 9.0, 10.0]), np.repeat(["a", "b", "c"], 2)
    rows = [
        {"intervention": "edit", "variant": "edit", "layers": "3", "layer": 3, "strength": 1.0, "query": f"q{5 - i}", "label": "harmful"}
        | {"cluster": cluster, "score": "kl", "value": 7.0 + change, "base": 7.0}
        for i, (change, cluster) in enumerate(zip(changes, clusters, strict=True))
    ]
    (found,) = Sweep.from_rows(rows).summary().itertuples()
    expected = bootstrap(lambda chosen: changes[chosen].mean(), 6, clusters)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.n == 6
    alone = bootstrap(lambda chosen: changes[chosen].mean(), 6)
    assert found.high - found.low > 1.2 * (alone.high - alone.low)
    assert {q.id: q.cluster for q in QUERIES} == dict(zip(swept.columns["query"], swept.columns["cluster"], strict=True))


def hand_made(effects, strengths=(1.0,), **more):
    """A sweep with these changes: {(layer, label): change, or one per strength}; two queries per label."""
    rows = [
        {"intervention": "edit", "variant": "edit", "layers": str(layer), "layer": int(str(layer).split("+")[0]), "strength": strength}
        | {"query": f"{label}{i}", "label": label, "score": "refusal_logodds", "value": 2.0 + change + i, "base": 2.0 + i}
        | more
        for (layer, label), changes in effects.items()
        for strength, change in zip(strengths, changes if isinstance(changes, tuple) else (changes,), strict=True)
        for i in range(2)
    ]
    return Sweep.from_rows(rows)


class TestBest:
    EFFECTS: ClassVar = {
        **{(0, "harmful"): 1.0, (0, "harmless"): 0.0},  # merit 1
        **{(1, "harmful"): 5.0, (1, "harmless"): 4.5},  # .5: it refuses harmless ones too
        **{(2, "harmful"): 2.0, (2, "harmless"): -3.0},  # 2: a fall for harmless ones is no merit
        **{(3, "harmful"): 2.5, (3, "harmless"): 0.1},  # 2.4
    }  # fmt: skip

    def test_most_for_harmful_and_least_for_harmless(self):
        table = hand_made(self.EFFECTS)
        assert [table.best(k) for k in (1, 2, 3, 4)] == [(3,), (2, 3), (0, 2, 3), (0, 1, 2, 3)]

    def test_a_rise_and_a_fall_at_two_strengths_do_not_cancel(self):
        effects = {(0, "harmful"): (3.0, 3.0), (0, "harmless"): (2.0, -2.0), (1, "harmful"): (2.5, 2.5), (1, "harmless"): (0.0, 0.0)}
        assert hand_made(effects, (1.0, 2.0)).best() == (1,)

    def test_ties_go_to_the_later_layer(self):
        assert hand_made(
            {(layer, label): float(label == "harmful") for layer in (0, 1, 2) for label in ("harmful", "harmless")}
        ).best() == (2,)

    def test_placebos_groups_other_scores_and_interventions_do_not_count(self):
        best = {(0, "harmful"): 9.0, (0, "harmless"): 0.0}
        others = [hand_made(best, variant="placebo 0"), hand_made(best, score="kl"), hand_made(best, intervention="other")]
        others.append(hand_made({("0+3", "harmful"): 9.0, ("0+3", "harmless"): 0.0}))
        tables = [hand_made(self.EFFECTS), *others]
        table = Sweep({name: np.concatenate([t.columns[name] for t in tables]) for name in tables[0].columns})
        assert table.best(intervention="edit") == (3,)
        assert table.best(intervention="other") == (0,)

    def test_errors(self):
        with pytest.raises(
            errors.MismatchError, match=r"Found 4 single layers.*\nExpected at least 5 layers with the refusal log-odds of both"
        ):
            hand_made(self.EFFECTS).best(5)
        with pytest.raises(errors.MismatchError, match=r"labels \['harmful'\]"):
            hand_made({(0, "harmful"): 1.0}).best()
        with pytest.raises(errors.MismatchError, match="Found 0 single layers"):
            hand_made(self.EFFECTS, score="kl").best()


class TestRowsThatAreLacking:
    """A cell that lacks a query, or has one twice, is compared with no other."""

    @pytest.mark.parametrize("use", [Sweep.summary, Sweep.best, Sweep.plot], ids=["summary", "best", "plot"])
    @pytest.mark.parametrize("twice", [False, True], ids=["lacking", "twice"])
    def test_are_named(self, use, twice):
        whole = hand_made({(layer, label): 1.0 for layer in (0, 1) for label in ("harmful", "harmless")})
        one = np.flatnonzero(whole.columns["layer"] == 1)[0]
        rows = np.append(np.arange(len(whole)), one) if twice else np.delete(np.arange(len(whole)), one)
        table = Sweep({name: values[rows] for name, values in whole.columns.items()})
        with pytest.raises(
            errors.MismatchError, match=r"rows of \d+ quer.* in the cell refusal_logodds, edit, edit, 1, .*\nExpected one for"
        ):
            use(table)

    def test_of_a_filtered_sweep_are_none(self):
        whole = hand_made({(layer, label): 1.0 for layer in (0, 1) for label in ("harmful", "harmless")})
        whole = Sweep({**whole.columns, "cluster": whole.columns["query"]})
        for part in (whole.where(layer=1), whole.where(label="harmful"), whole.where(query=whole.columns["query"][0])):
            assert (part.summary()["n"] <= whole.summary()["n"].max()).all()


class Odd:
    """A score of its own making."""

    name, unit = "odd", "nothing"

    def __init__(self, make):
        self.make = make

    def __call__(self, logits, base, tokenizer):
        return self.make(logits)


class OddAnswer(AnswerLogProb):
    """An answer's score that writes over what it is given."""

    def __call__(self, logits, base, answer):
        return logits.zero_().add_(base.zero_()).sum((1, 2)) + super().__call__(logits + 0, base, answer)


class TestErrors:
    def test_an_intervention_without_a_free_step(self, vlm, basis):
        with pytest.raises(
            errors.InterventionError, match=r"Found the intervention 'set', whose layers are all set.\nExpected a step without layers"
        ):
            gl.sweep(vlm, {"free": iv.project_out(basis), "set": iv.project_out(basis).at(layers=[2])}, QUERIES)

    def test_no_queries(self, vlm, basis):
        with pytest.raises(errors.QueryError, match="Found no queries"):
            gl.sweep(vlm, iv.project_out(basis), [])

    def test_a_layer_that_is_not_there(self, vlm, basis):
        with pytest.raises(errors.SiteError, match=r"Found layer 8.\nExpected a layer from 0 to 7"):
            gl.sweep(vlm, iv.project_out(basis[0]), QUERIES, layers=[8])

    @pytest.mark.parametrize(
        ("make", "found"),
        [
            (lambda logits: 3.0, "something of type float from the score 'odd'"),
            (lambda logits: None, "something of type NoneType from the score 'odd'"),
            (lambda logits: logits[:, 0].numpy(), "something of type ndarray from the score 'odd'"),
            (lambda logits: logits, r"torch.float32 of shape \(5, 251\) from the score 'odd'"),
            (lambda logits: logits[:2, 0], r"torch.float32 of shape \(2,\)"),
            (lambda logits: logits[:, 0] * 1j, r"torch.complex64 of shape \(5,\)"),
        ],
    )
    def test_a_score_gives_one_number_per_query(self, vlm, intervention, make, found):
        with pytest.raises(
            errors.ArgumentError, match=rf"Found {found}[\s\S]*\nExpected a tensor of one number per query, of shape \(5,\)"
        ):
            gl.sweep(vlm, intervention, QUERIES, scores=[Odd(make)], layers=[4], placebos=0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_score_that_is_not_finite_is_refused_and_named(self, vlm, intervention, value):
        odd = Odd(lambda logits: torch.where(torch.arange(len(logits)) == 1, value, logits[:, 0]))
        with pytest.raises(errors.NumericsError, match=rf"Found {value} as the score 'odd' of query '.*' under amplify\(.*layers=\[4\]"):
            gl.sweep(vlm, intervention, QUERIES, scores=[kl, odd], layers=[4], placebos=0)

    def test_whole_numbers_and_truths_are_scores(self, vlm, intervention):
        for make in (lambda logits: logits.argmax(1), lambda logits: logits[:, 0] > 0):
            found = gl.sweep(vlm, intervention, QUERIES, scores=[Odd(make)], layers=[4], placebos=0)
            expected = make(vlm.run(vlm.batch(QUERIES)).logits[0])
            assert found.columns["base"].tolist() == expected.double().tolist()

    def test_a_score_can_not_change_what_others_see(self, vlm, intervention):
        odd, options = OddAnswer("sorry , i can not", name="odd"), {"layers": [4, 5], "placebos": 0}
        with pytest.warns(UserWarning, match="changes no score"):  # it answers the same to everything
            alone = gl.sweep(vlm, intervention, QUERIES, scores=[odd], **options)
        both = gl.sweep(vlm, intervention, QUERIES, scores=[odd, AnswerLogProb("sorry , i can not")], **options).where(
            score="answer_logprob"
        )
        sober = gl.sweep(vlm, intervention, QUERIES, scores=[AnswerLogProb("sorry , i can not")], **options)
        assert np.array_equal(both.columns["value"], sober.columns["value"])
        assert len(set(np.round(alone.columns["value"], 3))) == 1

    def test_refusals_in_an_unknown_language(self, vlm, basis):
        with pytest.raises(errors.ModelError, match="a tokenizer that knows none of the openings of a refusal"):
            gl.sweep(vlm, iv.project_out(basis), QUERIES, scores=[RefusalLogOdds(("Entschuldigung",))], layers=[1])


def test_saved_and_loaded(swept, tmp_path):
    swept.save(tmp_path / "sweep.csv")
    loaded = Sweep.load(tmp_path / "sweep.csv")
    pd.testing.assert_frame_equal(loaded.frame, swept.frame)
    pd.testing.assert_frame_equal(loaded.summary(), swept.summary())
    assert loaded.facts == swept.facts and loaded.provenance == swept.provenance


def test_unlabelled_queries_are_kept_in_their_order(vlm, intervention):
    unlabelled = [dataclasses.replace(query, label=None) for query in QUERIES]
    found = gl.sweep(vlm, intervention, unlabelled, scores=[kl], layers=[4], placebos=0)
    assert found.columns["query"].tolist() == [query.id for query in QUERIES] and set(found.columns["label"]) == {""}
    assert len(found.summary()) == 1


def test_plot_is_a_heat_map_per_arm_and_label(swept):
    axes = swept.plot("kl")
    assert axes.shape == (2, 2)
    summary = swept.summary()
    summary = summary[(summary["score"] == "kl") & (summary["variant"] == "edit") & (summary["label"] == "harmless")]
    drawn = np.asarray(axes[0, 1].collections[0].get_array()).reshape(2, 8)
    expected = summary.pivot_table(index="strength", columns="layer", values="change").to_numpy()
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0))
    assert any("KL divergence" in ax.get_ylabel() for ax in axes[0, 0].figure.axes)
    plt.close(axes[0, 0].figure)


@pytest.mark.parametrize(
    "idle",
    [
        lambda basis: iv.amplify(basis, 8.0).when(gates.harmful(basis, 1e9)),
        lambda basis: iv.amplify(basis, 8.0).during("decode"),
        lambda basis: iv.patch(basis, iv.text_twin),
    ],
    ids=["a closed gate", "later tokens than are scored", "a text twin of text"],
)
def test_an_intervention_that_changes_no_score_is_said_to(vlm, basis, idle):
    with pytest.warns(UserWarning, match="the intervention 'idle' changes no score in any cell"):
        gl.sweep(vlm, {"idle": idle(basis), "busy": iv.amplify(basis, 8.0)}, QUERIES, layers=[2, 5])
