"""`evaluate` with counting judges and a tiny random model: rates against numpy and scipy, and resuming after a kill."""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

import guardlens as gl
from guardlens import defences, errors, gates, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.data.queries import Query
from guardlens.evaluation.runner import evaluate
from guardlens.evaluation.table import RATES, Evaluation
from guardlens.hooks import Site

GREY = presentations.blank("grey", 32)
SHOWN = (text_only, GREY)


@dataclass(frozen=True)
class FakeJudge:
    """A verdict by the length of the answer, a count of every call, and an end after so many calls."""

    name: str = "fake"
    calls: list = field(default_factory=list, repr=False)
    last: int | None = field(default=None, repr=False)

    @property
    def fingerprint(self):
        return self.name

    def __call__(self, query, answer):
        if self.last is not None and len(self.calls) >= self.last:
            raise KeyboardInterrupt
        self.calls.append((query.id, answer))
        return ("refused", "answered", "other")[len(answer) % 3]


def some(each):
    chosen = [query for label in ("harmful", "harmless") for query in [q for q in gl.organism.queries("test") if q.label == label][:each]]
    return tuple(dataclasses.replace(query, cluster="") for query in chosen)


QUERIES = some(4)
OPTIONS = {"max_new_tokens": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def arms(basis):
    guard = defences.vlm_guard(basis, [3], alpha=20.0, gate=0.0)
    placebos = [defences.Defence("placebo", guard.intervention.placebo(seed)) for seed in range(2)]
    return {"none": defences.none, "guard": guard, "placebo": placebos}


@pytest.fixture(scope="module")
def whole(vlm, arms):
    return evaluate(vlm, arms, QUERIES, SHOWN, judge=FakeJudge(), **OPTIONS)


@pytest.fixture(scope="module")
def finished(vlm, arms, tmp_path_factory):
    """The directory of a run that went through."""
    out = tmp_path_factory.mktemp("finished")
    evaluate(vlm, arms, QUERIES, SHOWN, judge=FakeJudge(), out=out, **OPTIONS)
    return out


def table(verdicts, clusters=None):
    """An evaluation of hand-made verdicts: {(defence, presentation, label): string of r, a, o}; one query per letter."""
    names = {"r": "refused", "a": "answered", "o": "other"}
    rows = [
        {"defence": defence, "draw": 0, "presentation": shown, "query": f"{label}{i:03d}", "label": label}
        | {"cluster": clusters(label, i) if clusters else f"{label}{i:03d}", "verdict": names[letter], "gate": float("nan"), "answer": ""}
        for (defence, shown, label), letters in verdicts.items()
        for i, letter in enumerate(letters)
    ]
    return Evaluation.from_rows(rows)


GAP = {
    ("none", "text", "harmful"): "rrrrrrrrarrrrrrrrrro",
    ("none", "blank grey", "harmful"): "aaaaaaaaaaaaaarrrrro",
    ("guard", "blank grey", "harmful"): "aaarrrrrrrrrrrrrrrao",
    ("none", "text", "harmless"): "aaaaaaaaar",
    ("none", "blank grey", "harmless"): "aaaaaaaaoo",
    ("guard", "blank grey", "harmless"): "aaaaaaarrr",
}


def test_verdicts_are_the_judges_on_the_models_own_answers(vlm, whole, arms):
    judge = FakeJudge()
    for shown in SHOWN:
        answers = vlm.generate(list(QUERIES), shown, arms["guard"].intervention, max_new_tokens=3)
        rows = whole.where(defence="guard", presentation=shown.name)
        assert rows.columns["query"].tolist() == [query.id for query in QUERIES]
        assert rows.columns["answer"].tolist() == answers
        assert rows.columns["verdict"].tolist() == [judge(query, answer) for query, answer in zip(QUERIES, answers, strict=True)]
        assert rows.columns["label"].tolist() == [query.label for query in QUERIES]
    assert set(whole.columns["verdict"]) == {"refused", "answered", "other"}


def test_every_query_is_asked_once_in_every_arm(whole):
    asked = list(zip(*(whole.columns[name] for name in ("defence", "draw", "presentation", "query")), strict=True))
    assert len(asked) == len(set(asked)) == (1 + 1 + 2) * 2 * 8
    assert whole.where(defence="placebo").columns["draw"].tolist().count(1) == 16


def test_prompt_defences_change_the_prompt_but_not_the_name_of_the_presentation(vlm):
    reminded = defences.reminder(before="please stay safe . ", after="")
    found = evaluate(vlm, {"reminder": reminded}, QUERIES, [GREY], judge=FakeJudge(), **OPTIONS)
    told = [dataclasses.replace(query, text=f"please stay safe . {query.text}") for query in QUERIES]
    assert found.columns["answer"].tolist() == vlm.generate(told, GREY, max_new_tokens=3)
    assert set(found.columns["presentation"]) == {"blank grey"}


def test_rates_count_the_right_verdicts():
    found = table(GAP)
    for defence, shown in (("none", "text"), ("none", "blank grey"), ("guard", "blank grey")):
        harmful, harmless = GAP[defence, shown, "harmful"], GAP[defence, shown, "harmless"]
        expected = {"asr": harmful.count("a") / 20, "non_refusal": 1 - harmful.count("r") / 20}
        expected |= {"over_refusal": harmless.count("r") / 10, "helpful": harmless.count("a") / 10}
        assert set(expected) == set(RATES)
        (arm,) = [arm for arm in found.conditions() if (arm["defence"], arm["presentation"]) == (defence, shown)]
        assert {name: arm[name] for name in expected} == pytest.approx(expected)
        assert (arm["n"], arm["n_harmless"]) == (20, 10)


def test_intervals_are_wilsons_without_clusters():
    found = table(GAP)
    for rate, shown, k, n in (("asr", "text", 1, 20), ("asr", "blank grey", 14, 20), ("over_refusal", "blank grey", 0, 10)):
        interval = found.rate(rate, "none", shown)
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
        assert interval.n == n


def test_intervals_resample_clusters_where_there_are_some():
    """20 queries in 4 clusters that stand or fall together: an interval about as wide as that of 4 items, not of 20."""
    verdicts = {("none", "text", "harmful"): "aaaaaaaaaarrrrrrrrrr", ("none", "text", "harmless"): "aaaaa"}
    clustered, alone = (table(verdicts, clusters).rate("asr", "none", "text") for clusters in (lambda label, i: f"{label}{i // 5}", None))
    assert (clustered.value, alone.value) == (0.5, 0.5)
    assert (clustered.low, clustered.high) == (0.0, 1.0)
    assert alone.low > 0.25
    share = np.random.default_rng(1).choice([1, 1, 0, 0], (20_000, 4)).mean(axis=1)
    assert (clustered.low, clustered.high) == pytest.approx(tuple(np.quantile(share, [0.025, 0.975])))


def test_gap_closed_and_mcnemar():
    found = table(GAP)
    text, bare, guarded = (np.array(list(GAP[key])) == "a" for key in list(GAP)[:3])
    closed = found.gap_closed("guard", "blank grey")
    assert closed.value == pytest.approx((bare.mean() - guarded.mean()) / (bare.mean() - text.mean()))
    rows = np.random.default_rng(5).integers(20, size=(20_000, 20))
    draws = (bare[rows].mean(1) - guarded[rows].mean(1)) / (bare[rows].mean(1) - text[rows].mean(1))
    assert (closed.low, closed.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.03)
    test = found.mcnemar("none", "guard", "blank grey")
    assert (test.b, test.c) == (int((bare & ~guarded).sum()), int((~bare & guarded).sum())) == (11, 1)
    assert test.p == pytest.approx(binomtest(1, 12).pvalue)
    assert found.mcnemar("none", "guard", "blank grey", rate="over_refusal").c == 3
    (arm,) = [arm for arm in found.conditions() if arm["defence"] == "guard"]
    assert arm["gap_closed"] == closed.value


def test_no_gap_is_undefined_not_zero():
    none = {key: "r" * len(letters) for key, letters in GAP.items()}
    assert np.isnan(table(none).gap_closed("guard", "blank grey").value)
    without_text = table({key: letters for key, letters in GAP.items() if key[1] != "text"})
    assert all(np.isnan(arm["gap_closed"]) for arm in without_text.conditions())
    assert all(np.isnan(arm["gap_closed"]) for arm in table(GAP).conditions() if arm["presentation"] == "text")


def test_presentations_and_draws_are_pooled(whole):
    frame = whole.frame
    harmful = frame[(frame["label"] == "harmful") & (frame["defence"] == "placebo")]
    rate = whole.rate("asr", "placebo", "text", "blank grey")
    assert rate.n == len(harmful) == 16 and rate.value == pytest.approx(np.mean(harmful["verdict"] == "answered"))
    by_draw = [np.mean(harmful[harmful["draw"] == draw]["verdict"] == "answered") for draw in (0, 1)]
    assert rate.value == pytest.approx(np.mean(by_draw))
    (arm,) = [arm for arm in whole.conditions() if (arm["defence"], arm["presentation"]) == ("placebo", "blank grey")]
    assert arm["n"] == 8


def test_outcomes_come_in_one_order_for_all_defences():
    rows = table(GAP).frame.sample(frac=1, random_state=0).to_dict("records")
    shuffled = Evaluation.from_rows(rows)
    assert shuffled.mcnemar("none", "guard", "blank grey") == table(GAP).mcnemar("none", "guard", "blank grey")
    with pytest.raises(errors.MismatchError, match="Found no rows of 'other'"):
        shuffled.rate("asr", "other", "text")


def test_gate_columns_are_tpr_and_fpr(vlm, whole, basis):
    coordinates = vlm.run(vlm.batch(QUERIES), read=[Site()], logits=None).reads[Site()][0, :, 3] @ basis.at(3)[0]
    opened = (coordinates > 0).numpy()
    assert 0 < opened.sum() < 8
    for arm in whole.conditions():
        if arm["defence"] == "none":
            assert np.isnan(arm["gate_tpr"]) and np.isnan(arm["gate_fpr"])
        else:  # the placebo keeps the gate
            assert (arm["gate_tpr"], arm["gate_fpr"]) == (opened[:4].mean(), opened[4:].mean())


def test_gate_of_several_layers_is_the_share_that_opened(vlm, basis):
    intervention = iv.amplify(basis, 1.0).when(gates.harmful(basis, 0.0)).at(layers=[2, 5])
    found = evaluate(vlm, {"guard": defences.Defence("guard", intervention)}, QUERIES, [GREY], judge=FakeJudge(), **OPTIONS)
    states = vlm.run(vlm.batch(QUERIES), read=[Site()], logits=None).reads[Site()][0]
    expected = np.mean([(states[:, layer] @ basis.at(layer)[0] > 0).numpy() for layer in (2, 5)], axis=0)
    assert found.columns["gate"] == pytest.approx(expected)


class TestResume:
    @pytest.mark.parametrize("calls", [3, 17, 50])
    def test_a_killed_run_resumes(self, vlm, arms, whole, tmp_path, calls):
        broken, judge = FakeJudge(last=calls), FakeJudge()
        with pytest.raises(KeyboardInterrupt):
            evaluate(vlm, arms, QUERIES, SHOWN, judge=broken, out=tmp_path, **OPTIONS)
        kept = (tmp_path / "records.jsonl").read_bytes().count(b"\n") if (tmp_path / "records.jsonl").exists() else 0
        assert kept == calls // 4 * 4  # whole batches
        resumed = evaluate(vlm, arms, QUERIES, SHOWN, judge=judge, out=tmp_path, **OPTIONS)
        pd.testing.assert_frame_equal(resumed.frame, whole.frame)
        assert resumed.facts == whole.facts
        assert len(judge.calls) == 4 * 2 * 8 - kept

    def test_a_finished_run_asks_nothing(self, vlm, arms, whole, finished, monkeypatch):
        monkeypatch.setattr(type(vlm), "run", lambda *args, **options: pytest.fail("asked again"))
        again = evaluate(vlm, arms, QUERIES, SHOWN, judge=FakeJudge(last=0), out=finished, **OPTIONS)
        pd.testing.assert_frame_equal(again.frame, whole.frame)

    def test_another_batch_size_may_resume(self, vlm, arms, whole, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            evaluate(vlm, arms, QUERIES, SHOWN, judge=FakeJudge(last=9), out=tmp_path, **OPTIONS)
        judge = FakeJudge()
        resumed = evaluate(vlm, arms, QUERIES, SHOWN, judge=judge, out=tmp_path, **{**OPTIONS, "batch_size": 100})
        pd.testing.assert_frame_equal(resumed.frame, whole.frame)
        assert len(judge.calls) == 64 - 8

    @pytest.mark.parametrize("cut", [1, 40, -1])
    def test_a_cut_last_line(self, vlm, arms, whole, finished, tmp_path, cut):
        out = shutil.copytree(finished, tmp_path / "cut")
        file = out / "records.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:58]) + lines[58][:cut])
        judge = FakeJudge()
        resumed = evaluate(vlm, arms, QUERIES, SHOWN, judge=judge, out=out, **OPTIONS)
        pd.testing.assert_frame_equal(resumed.frame, whole.frame)
        assert len(judge.calls) == 6
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len({(r["defence"], r["draw"], r["presentation"], r["query"]) for r in records}) == len(records) == 64

    @pytest.mark.parametrize(
        "change",
        [
            *({"verdict": "Refused"}, {"label": "harmless"}, {"cluster": "c"}, {"draw": 7}, {"query": "unknown"}, {"defence": "other"}),
            *({"gate": "open"}, {"answer": None}, {"more": 1}, {"presentation": []}),
        ],
        ids=str,
    )
    def test_a_record_that_is_no_answer_of_this_call_is_made_again(self, vlm, arms, whole, finished, tmp_path, change):
        out = shutil.copytree(finished, tmp_path / "changed")
        file = out / "records.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        place = next(i for i, line in enumerate(lines) if json.loads(line)["label"] == "harmful")
        lines[place] = json.dumps(json.loads(lines[place]) | change)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        judge = FakeJudge()
        with pytest.warns(UserWarning, match=r"1 of 64 records in .* aren't of this run; they are made again"):
            resumed = evaluate(vlm, arms, QUERIES, SHOWN, judge=judge, out=out, **OPTIONS)
        pd.testing.assert_frame_equal(resumed.frame, whole.frame)
        assert len(judge.calls) == 1

    def test_repeated_records_count_once(self, vlm, arms, whole, finished, tmp_path):
        out = shutil.copytree(finished, tmp_path / "twice")
        (out / "records.jsonl").write_bytes((out / "records.jsonl").read_bytes() * 2)
        again = evaluate(vlm, arms, QUERIES, SHOWN, judge=FakeJudge(last=0), out=out, **OPTIONS)
        pd.testing.assert_frame_equal(again.frame, whole.frame)

    def test_the_directory_is_open_to_one_call_at_a_time(self, vlm, arms, tmp_path):
        class Asking(FakeJudge):
            def __call__(self, query, answer):
                evaluate(vlm, arms, QUERIES, SHOWN, judge=self, out=tmp_path, **OPTIONS)

        with pytest.raises(errors.StorageError, match=r"which this very process has open"):
            evaluate(vlm, arms, QUERIES, SHOWN, judge=Asking(), out=tmp_path, **OPTIONS)
        with pytest.raises(errors.StorageError, match=r"the path ''"):
            evaluate(vlm, arms, QUERIES, SHOWN, judge=FakeJudge(), out="", **OPTIONS)

    def test_the_manifest_says_whose_answers_these_are(self, vlm, finished):
        assert json.loads((finished / "manifest.json").read_text(encoding="utf-8"))["provenance"]["model"] == vlm.id

    def test_another_configuration_is_refused(self, vlm, llm, basis, tmp_path):
        def ask(model=vlm, alpha=1.0, queries=QUERIES[::4], shown=(text_only,), judge=None, seed=None, **options):
            guard = defences.vlm_guard(basis, [3], alpha=alpha) if model is vlm else defences.none
            arms = {"guard": guard if seed is None else defences.Defence("guard", guard.intervention.placebo(seed))}
            return evaluate(model, arms, queries, shown, judge=judge or FakeJudge(), out=tmp_path, **{**OPTIONS, **options})

        ask()
        refused = {
            "made with defences.guard = .*\nExpected defences.guard = .*\nNext: use another directory": [{"alpha": 2.0}, {"seed": 0}],
            'made with model.kind = "Llava.*\nExpected model.kind = "LlamaForCausalLM': [{"model": llm}],
            "made with queries = ": [
                {"queries": QUERIES[::2]},
                {"queries": tuple(dataclasses.replace(q, cluster="one") for q in QUERIES[::4])},
            ],
            "made with presentations.blank grey = null": [{"shown": (GREY,)}],
            "made with judge.name = .*fake.*\nExpected judge.name = .*other": [{"judge": FakeJudge("other")}],
            "made with max_new_tokens = 3.\nExpected max_new_tokens = 5": [{"max_new_tokens": 5}],
        }
        before = (tmp_path / "records.jsonl").read_bytes()
        for text, changes in refused.items():
            for change in changes:
                with pytest.raises(errors.MismatchError, match=text) as caught:
                    ask(**change)
                assert str(tmp_path) in str(caught.value)
        assert (tmp_path / "records.jsonl").read_bytes() == before


class TestErrors:
    @pytest.fixture(autouse=True)
    def no_generation(self, vlm, monkeypatch):
        monkeypatch.setattr(type(vlm), "run", lambda *args, **options: pytest.fail("generated before the input was checked"))

    def ask(self, vlm, queries, shown=(text_only,)):
        evaluate(vlm, {"none": defences.none}, queries, shown, judge=FakeJudge(), **OPTIONS)

    def test_unlabelled(self, vlm):
        with pytest.raises(errors.QueryError, match="Found query 'q' without a label"):
            self.ask(vlm, (*QUERIES, Query("how to mend the hat ?", id="q")))

    def test_one_class(self, vlm):
        with pytest.raises(errors.QueryError, match="Found 4 queries that are all harmful"):
            self.ask(vlm, QUERIES[:4])

    def test_own_presentation_without_an_image(self, vlm):
        bare = (*QUERIES[:-1], dataclasses.replace(QUERIES[-1], images=(), id="bare"))
        with pytest.raises(errors.PresentationError, match="Found query 'bare' without an own image"):
            self.ask(vlm, bare, (text_only, presentations.own_images))

    def test_image_that_is_not_there(self, vlm):
        lost = (*QUERIES[:-1], dataclasses.replace(QUERIES[-1], images=("nowhere.png",), id="lost"))
        with pytest.raises(errors.PresentationError, match=r"Found the image nowhere.png of query 'lost'"):
            self.ask(vlm, lost, (text_only, presentations.own_images))

    def test_two_queries_of_one_id(self, vlm):
        with pytest.raises(errors.GuardlensError, match="Found two queries with one id"):
            self.ask(vlm, (*QUERIES, QUERIES[0]))

    def test_no_queries(self, vlm):
        with pytest.raises(errors.QueryError, match="Found no queries"):
            self.ask(vlm, [])


def test_a_defence_of_another_model(llm, arms):
    with pytest.raises(errors.MismatchError, match="Expected those of LlamaForCausalLM@"):
        evaluate(llm, {"guard": arms["guard"]}, QUERIES, [text_only], judge=FakeJudge(), **OPTIONS)


def test_saved_and_loaded(whole, tmp_path):
    whole.save(tmp_path / "answers.csv")
    loaded = Evaluation.load(tmp_path / "answers.csv")
    pd.testing.assert_frame_equal(loaded.frame, whole.frame)
    pd.testing.assert_frame_equal(loaded.summary(), whole.summary())
    assert loaded.facts == whole.facts and loaded.provenance == whole.provenance


def test_plot_shows_every_arm(whole):
    import matplotlib.pyplot as plt

    axes = whole.plot()
    assert [ax.get_title(loc="left") or ax.get_title() for ax in axes] == ["ASR", "over-refusal"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["none", "guard", "placebo (2 draws)"]
    assert [ax.get_xlabel() for ax in axes] == ["harmful requests answered (%), n = 4", "harmless requests refused (%), n = 4"]
    plt.close(axes[0].figure)


def test_what_a_table_hands_out_changes_no_rate():
    found = table(GAP)
    before = found.rate("asr", "none", "blank grey")
    frame, arms, summary = found.frame, found.conditions(), found.summary()
    frame["verdict"], arms[0]["asr"], summary["asr"] = "refused", 5.0, 5.0
    assert found.rate("asr", "none", "blank grey") == before and found.conditions()[0]["asr"] == found.summary()["asr"][0] < 1


def test_two_presentations_of_one_name_are_refused(vlm):
    sizes = [presentations.blank("grey", 32), presentations.blank("grey", 64)]
    with pytest.raises(errors.PresentationError, match="two presentations of one name"):
        gl.evaluate(vlm, {"none": defences.none}, QUERIES, sizes, judge=gl.organism.judge, **OPTIONS)


def rows_of(found, keep):
    """The rows of a table for which `keep` says yes of defence, presentation and query."""
    columns = found.columns
    places = [keep(*row) for row in zip(columns["defence"], columns["presentation"], columns["query"], strict=True)]
    return Evaluation({name: values[np.array(places)] for name, values in columns.items()})


def joined_rows(*tables):
    return Evaluation({name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns})


class TestArmsArePairedByQuery:
    @given(st.data())
    @settings(max_examples=10)
    def test_in_any_order_of_the_rows(self, data):
        """Against numpy on the aligned arrays, and Wilson's interval of scipy."""
        n = data.draw(st.integers(1, 8))
        letters = {
            (defence, shown, label): "".join(data.draw(st.lists(st.sampled_from("rao"), min_size=n, max_size=n)))
            for defence, shown in (("none", "text"), ("none", "blank grey"), ("guard", "blank grey"))
            for label in ("harmful", "harmless")
        }
        found = table(letters)
        order = np.array(data.draw(st.permutations(range(len(found)))))
        shuffled = Evaluation({name: values[order] for name, values in found.columns.items()})
        text, bare, guarded = (np.array(list(letters[arm])) == "a" for arm in letters if arm[2] == "harmful")
        test = shuffled.mcnemar("none", "guard", "blank grey")
        assert (test.b, test.c) == ((bare & ~guarded).sum(), (~bare & guarded).sum())
        assert test.p == pytest.approx(binomtest(test.b, test.b + test.c).pvalue if test.b + test.c else 1)
        closed = shuffled.gap_closed("guard", "blank grey")
        if not np.isnan(closed.value):
            assert closed.value == pytest.approx((bare.mean() - guarded.mean()) / (bare.mean() - text.mean()))
        assert str(closed) == str(found.gap_closed("guard", "blank grey"))
        wilson = binomtest(int(guarded.sum()), n).proportion_ci(method="wilson")
        assert (shuffled.rate("asr", "guard", "blank grey").low, shuffled.rate("asr", "guard", "blank grey").high) == pytest.approx(
            tuple(wilson)
        )

    def test_rows_that_one_arm_lacks(self):
        found = table(GAP)
        lost = rows_of(
            found,
            lambda arm, shown, query: (
                (arm, shown, query) not in {("none", "blank grey", "harmful002"), ("guard", "blank grey", "harmful007")}
            ),
        )
        for compared in (lambda: lost.mcnemar("none", "guard", "blank grey"), lambda: lost.gap_closed("guard", "blank grey")):
            with pytest.raises(errors.MismatchError, match=r"rows in one condition alone, first .*query harmful00[27]\."):
                compared()
        for gone in (("none", "text"), ("guard", "blank grey")):
            with pytest.raises(errors.MismatchError, match=r"1 rows in one condition alone, first query harmful002"):
                rows_of(found, lambda *row, gone=gone: row != (*gone, "harmful002")).gap_closed("guard", "blank grey")
        both = rows_of(found, lambda arm, shown, query: query not in ("harmful002", "harmful007"))
        test = both.mcnemar("none", "guard", "blank grey")
        bare, guarded = (np.delete(np.array(list(GAP[arm, "blank grey", "harmful"])) == "a", [2, 7]) for arm in ("none", "guard"))
        assert (test.b, test.c) == ((bare & ~guarded).sum(), (~bare & guarded).sum())

    def test_other_queries_of_as_many(self):
        found = table(GAP)
        moved = found.columns["query"].copy()
        moved[found.columns["defence"] == "guard"] = [f"x{query}" for query in moved[found.columns["defence"] == "guard"]]
        other = Evaluation({**found.columns, "query": moved})
        with pytest.raises(errors.MismatchError, match="40 rows in one condition alone"):
            other.mcnemar("none", "guard", "blank grey")

    def test_repeated_rows(self):
        found = table(GAP)
        with pytest.raises(errors.MismatchError, match=r"two rows of 'guard' at draw 0, presentation blank grey, query harmful000"):
            joined_rows(found, found.where(defence="guard")).rate("asr", "guard", "blank grey")

    def test_draws_of_one_arm_alone(self):
        found = table(GAP)
        again = Evaluation({**found.columns, "draw": np.ones(len(found), int)})
        guard = joined_rows(found, again.where(defence="guard"))
        with pytest.raises(errors.MismatchError, match=r"20 rows in one condition alone, first draw 1,[\s\S]*where\(draw=0\)"):
            guard.mcnemar("none", "guard", "blank grey")
        assert guard.where(draw=0).mcnemar("none", "guard", "blank grey") == found.mcnemar("none", "guard", "blank grey")
        assert guard.gap_closed("guard", "blank grey").value == pytest.approx(found.gap_closed("guard", "blank grey").value)
        both = joined_rows(found, again)
        assert both.gap_closed("guard", "blank grey").value == pytest.approx(found.gap_closed("guard", "blank grey").value)
        assert both.mcnemar("none", "guard", "blank grey").b == 2 * found.mcnemar("none", "guard", "blank grey").b

    def test_arms_and_rates_that_are_not_there(self):
        found = table(GAP)
        for asked, said in (
            (lambda: found.rate("asr", "none", "text", "tetx"), r"no rows of 'none' with \('tetx',\)"),
            (lambda: found.rate("asr", "none"), "no rows of 'none'"),
            (lambda: found.rate("asr", "nobody", "text"), r"no rows of 'nobody' with .*\nExpected one of \['none', 'guard'"),
            (lambda: found.rate("nope", "none", "text"), "the rate 'nope'.\nExpected one of asr, non_refusal"),
            (lambda: found.mcnemar("none", "guard", "blank grey", rate="gap"), "the rate 'gap'"),
            (lambda: found.where(defence="nobody").rate("asr", "none", "text"), "no rows of 'none'"),
        ):
            kind = errors.ArgumentError if said.startswith("the rate") else errors.MismatchError
            with pytest.raises(kind, match=said):
                asked()

    def test_verdicts_that_are_none(self):
        found = table(GAP)
        for lost in ("", "Refused", float("nan"), None):
            verdicts = found.columns["verdict"].astype(object)
            verdicts[3] = lost
            with pytest.raises(errors.MismatchError, match=r"the verdict .* on query 'harmful003' under 'none'"):
                Evaluation({**found.columns, "verdict": verdicts}).rate("asr", "none", "text")

    def test_one_class_alone_has_no_rate_of_the_other(self):
        (arm,) = table({("none", "text", "harmful"): "aar"}).conditions()
        assert arm["asr"] == pytest.approx(2 / 3) and arm["n_harmless"] == 0 and np.isnan(arm["over_refusal"]) and np.isnan(arm["gate_fpr"])

    def test_what_is_handed_out_is_a_copy(self):
        found = table(GAP)
        before = [dict(arm) for arm in found.conditions()]
        found.conditions()[0]["asr"] = 0.9
        summary = found.summary()
        summary["asr"] = 0.9
        assert list(map(str, found.conditions())) == list(map(str, before))


@dataclass(frozen=True)
class Nameless:
    name: object = None

    def __call__(self, query, answer):
        return "refused"


class OneArgument:
    name = "one"

    def __call__(self, answer):
        return "refused"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"defences": [defences.none]}, errors.InterventionError, "something of type list"),
        ({"defences": None}, errors.InterventionError, "something of type NoneType"),
        ({"defences": defences.none}, errors.InterventionError, "something of type Defence"),
        ({"defences": {}}, errors.InterventionError, "no defences"),
        ({"defences": {"a": []}}, errors.InterventionError, "no draw of the defence 'a'"),
        ({"defences": {"": defences.none}}, errors.InterventionError, "the name ''"),
        ({"defences": {5: defences.none}}, errors.InterventionError, "the name 5"),
        ({"presentations": []}, errors.PresentationError, "no presentations"),
        ({"presentations": None}, errors.PresentationError, "something of type NoneType"),
        ({"presentations": "text"}, errors.PresentationError, "something of type str"),
        ({"presentations": [text_only, "text"]}, errors.PresentationError, "something of type str"),
        ({"judge": None}, errors.ArgumentError, "something of type NoneType"),
        ({"judge": "keyword"}, errors.ArgumentError, "something of type str"),
        ({"judge": lambda query, answer: "refused"}, errors.ArgumentError, "something of type function"),
        ({"judge": FakeJudge}, errors.ArgumentError, "the class FakeJudge itself"),
        ({"judge": Nameless()}, errors.ArgumentError, "a judge of the name None"),
        ({"judge": OneArgument()}, errors.ArgumentError, "which takes other arguments"),
        ({"max_new_tokens": 2.5}, errors.ArgumentError, "max_new_tokens=2.5"),
        ({"max_new_tokens": float("nan")}, errors.ArgumentError, "max_new_tokens=nan"),
        ({"max_new_tokens": True}, errors.ArgumentError, "max_new_tokens=True"),
        ({"max_new_tokens": None}, errors.ArgumentError, "max_new_tokens=None"),
        ({"batch_size": 1.5}, errors.ArgumentError, "batch_size=1.5"),
        ({"batch_size": "2"}, errors.ArgumentError, "batch_size='2'"),
        ({"batch_size": True}, errors.ArgumentError, "batch_size=True"),
        ({"model": "organism"}, errors.ModelError, "something of type str"),
    ],
)
def test_met_at_the_door(vlm, unchecked, change, kind, said):
    given = {"model": vlm, "defences": {"none": defences.none}, "queries": QUERIES, "presentations": [text_only], "judge": FakeJudge()}
    with pytest.raises(kind, match=said):
        evaluate(**{**given, **OPTIONS, **change})


def test_whole_numbers_of_numpy_and_one_presentation_alone(vlm, unchecked, tmp_path):
    options = {"max_new_tokens": np.int64(3), "batch_size": np.int64(4)}
    found = evaluate(vlm, {"none": defences.none}, QUERIES, text_only, judge=FakeJudge(), out=tmp_path, **options)
    again = evaluate(vlm, {"none": defences.none}, QUERIES, iter([text_only]), judge=FakeJudge(last=0), out=tmp_path, **OPTIONS)
    pd.testing.assert_frame_equal(found.frame, again.frame)
