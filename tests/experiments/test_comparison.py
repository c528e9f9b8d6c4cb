"""`compare` on states with a known structure, against scikit-learn and numpy."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

import guardlens as gl
from guardlens import directions, errors
from guardlens.data.activations import Activations
from guardlens.data.queries import Query
from guardlens.evaluation.table import Evaluation
from guardlens.experiments import separability
from guardlens.experiments.comparison import Comparison
from guardlens.results.provenance import Provenance

MADE_BY = Provenance(model="toy@aaa")
N, WIDTH, LAYERS, SHIFT = 80, 6, (0, 3), 4.0
VERBS, OBJECTS = ("mend", "wash", "push"), ("hat", "lamp", "fern", "drum")


def query(i, name="q"):
    """Harmful and harmless in turns; twins share a cluster, and words say nothing."""
    return Query(
        f"how to {VERBS[i // 2 % 3]} the {OBJECTS[i // 6 % 4]} ?",
        "harmful" if i % 2 == 0 else "harmless",
        f"{name}{i}",
        cluster=f"c{i // 2}",
    )


QUERIES = tuple(query(i) for i in range(N))
LABELS = np.array([q.label == "harmful" for q in QUERIES])


def activations(states, queries=QUERIES, layers=LAYERS, name="text", provenance=MADE_BY):
    return Activations(torch.as_tensor(states, dtype=torch.float32), layers, queries, presentation=name, provenance=provenance)


def planted(seed=0, gap=(1.0, 3.0)):
    """Noise of variance 1; the classes lie `gap` apart along axis 0, at each layer another gap."""
    states = np.random.default_rng(seed).normal(size=(N, 2, WIDTH))
    states[..., 0] += np.where(LABELS[:, None], 0.5, -0.5) * np.array(gap)
    states[..., 2] += 10
    return states


def shown(name, hook="resid_post"):
    return dataclasses.replace(activations(planted(), name=name), hook=hook)


@pytest.mark.parametrize("name", ["blank grey", "border", "text"])
def test_the_first_run_is_the_one_without_an_image(basis, name):
    """As the runs recorded it, whatever the presentation is called."""
    beside = dataclasses.replace(shown(name), shows_images=True)
    with pytest.raises(errors.MismatchError, match=r"in the LLM's place\.\nExpected the run without an image first\.\nNext: compare\("):
        gl.compare(beside, shown("text"), basis)
    gl.compare(shown(name), beside, basis, draws=2)


def test_an_edited_run_is_not_the_llms_but_may_be_a_vlms(basis):
    plain, edited = shown("text"), dataclasses.replace(shown("blank grey"), intervention="add(ssd)")
    with pytest.raises(errors.MismatchError, match=r"the run 'blank grey' with the intervention add\(ssd\) in the LLM's place"):
        gl.compare(edited, plain, basis, draws=2)
    gap = gl.compare(plain, [shown("blank grey"), edited], basis, draws=2)
    assert gap.facts["runs"] == ["LLM, text", "VLM, blank grey", "VLM, blank grey, add(ssd)"]


def test_two_runs_of_one_name_are_not_averaged(basis):
    with pytest.raises(errors.MismatchError, match=r"two runs of the name 'VLM, blank grey'"):
        gl.compare(shown("text"), [shown("blank grey")] * 2, basis, draws=2)
    same = shown("text")
    assert gl.compare(same, same, basis, draws=2).where(metric="auroc", run="VLM, text").columns["change"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda query: dataclasses.replace(query, text="how to wash the hat ?"), "queries"),
        (lambda query: dataclasses.replace(query, label="harmless" if query.label == "harmful" else "harmful"), "queries"),
        (lambda query: dataclasses.replace(query, cluster="one"), "queries"),
    ],
)
def test_other_queries_under_the_same_ids(basis, change, what):
    other = dataclasses.replace(shown("blank grey"), queries=(*QUERIES[:7], *map(change, QUERIES[7:])))
    with pytest.raises(errors.MismatchError, match=rf"other {what} in the run 'blank grey'[\s\S]*they differ first at query 'q7'"):
        gl.compare(shown("text"), other, basis, draws=2)
    with_images = tuple(dataclasses.replace(query, images=("x.png",), source="a file") for query in QUERIES)
    gl.compare(shown("text"), dataclasses.replace(shown("own"), queries=with_images), basis, draws=2)


def test_other_positions(basis):
    with pytest.raises(errors.MismatchError, match="other positions in the run 'blank grey'"):
        gl.compare(shown("text"), dataclasses.replace(shown("blank grey"), positions=(-3, -2)), basis, draws=2)


def test_the_queries_that_made_the_directions(basis, states):
    run, other = activations(states[0]), activations(states[0], tuple(dataclasses.replace(q, text=q.text + " please") for q in QUERIES))
    made = directions.diff_in_means(run)
    with pytest.warns(UserWarning, match=r"^80 of the 80 queries made the directions 'diff_in_means\(\)'"):
        gl.compare(run, activations(states[1], name="blank grey"), made, draws=2)
    gl.compare(other, other, made, draws=2)
    gl.compare(run, run, directions.random(made), draws=2)


class TestModels:
    """A VLM of `vlm@2` with the LLM `llm@1` beside it."""

    LLM, VLM = Provenance("llm@1"), Provenance("vlm@2", llm="llm@1")

    @pytest.mark.parametrize("made_by", ["llm@1", "vlm@2"])
    def test_a_vlm_and_its_llm_belong_together(self, basis, made_by):
        runs = dataclasses.replace(shown("text"), provenance=self.LLM), dataclasses.replace(shown("blank grey"), provenance=self.VLM)
        gl.compare(*runs, dataclasses.replace(basis, provenance=Provenance(made_by)), draws=2)
        with pytest.raises(errors.MismatchError, match="of the model other@3"):
            gl.compare(*runs, dataclasses.replace(basis, provenance=Provenance("other@3")), draws=2)

    def test_runs_of_unrelated_models(self, basis):
        of_llm = dataclasses.replace(basis, provenance=self.LLM)
        runs = (dataclasses.replace(shown(name), provenance=whose) for name, whose in (("text", self.LLM), ("own", Provenance("vlm@4"))))
        with pytest.raises(errors.MismatchError, match=r"the run 'own' of the model vlm@4\.\nExpected those of llm@1"):
            gl.compare(*runs, of_llm, draws=2)


class TestDegenerate:
    @pytest.fixture
    def compared(self, basis):
        def of(text, image, reason):
            runs = activations(text), activations(image, name="blank grey")
            if reason is None:
                return gl.compare(*runs, basis, draws=100)
            with pytest.warns(UserWarning, match=r"^undefined \(nan\): ") as caught:
                found = gl.compare(*runs, basis, draws=100)
            assert len(caught) == 1 and reason in str(caught[0].message)
            return found

        return of

    def test_constant_states_are_at_chance_and_have_no_distance(self, compared):
        still = np.ones((N, 2, WIDTH))
        gap = compared(still, still, "d_prime of 'LLM, text' at the layers [0, 3], as a class has a single query, or neither class spreads")
        for run in (LLM, VLM):
            assert value(gap, "auroc", run, 0) == value(gap, "midpoint_accuracy", run, 0) == 0.5
            assert np.isnan(value(gap, "d_prime", run, 0))
        assert np.isnan(value(gap, "centroid_cosine", VLM, 0)) and value(gap, "drift_along", VLM, 0) == value(gap, "drift_off", VLM, 0) == 0

    def test_classes_without_spread_lie_infinitely_far_apart(self, compared):
        apart = np.ones((N, 2, WIDTH))
        apart[..., 0] = np.where(LABELS[:, None], 1, -1)
        gap = compared(apart, apart, "neither class spreads along v1")
        assert np.isnan(value(gap, "d_prime", LLM, 0))
        for metric in ("auroc", "midpoint_accuracy", "probe", "transfer", "centroid_cosine"):
            assert value(gap, metric, VLM, 3) == pytest.approx(1)

    def test_states_of_zero_have_no_norm_to_drift_by(self, compared):
        gap = compared(
            np.zeros((N, 2, WIDTH)), planted(), "drift_off of 'VLM, blank grey' at the layers [0, 3], as the LLM's states are all"
        )
        assert np.isnan(value(gap, "drift_along", VLM, 3)) and value(gap, "auroc", LLM, 3) == 0.5

    def test_ties_count_half(self, compared):
        rounded = planted().round()
        gap = compared(rounded, rounded, None)
        assert value(gap, "auroc", LLM, 3) == pytest.approx(roc_auc_score(LABELS, rounded[:, 1, 0]))

    def test_a_direction_that_is_not_there(self, basis):
        vectors = basis.vectors.clone()
        vectors[1] = 0
        with pytest.raises(errors.NumericsError, match=r"'planted', which are zero at the layers \[3\]"):
            gl.compare(shown("text"), shown("blank grey"), dataclasses.replace(basis, vectors=vectors), draws=2)

    def test_texts_without_words(self, basis):
        silent = tuple(dataclasses.replace(query, text="?!" + "." * i) for i, query in enumerate(QUERIES))
        run = activations(planted(), silent)
        assert gl.compare(run, run, basis, draws=20).facts["bag_of_words"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("draws", [0, -1, 1.5, True, None, "9"])
def test_draws_that_are_none(basis, draws, unchecked):
    with pytest.raises(errors.ArgumentError, match=r"Found draws=.*\nExpected a whole number, 1 or more"):
        gl.compare(shown("text"), shown("blank grey"), basis, draws=draws)
    assert len(gl.compare(shown("text"), shown("blank grey"), basis, draws=np.int64(2))) == 2 * (5 + 8)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("odd", [None, 5, "text", QUERIES])
def test_what_is_no_run_and_no_direction(basis, position, odd, unchecked):
    given = [shown("text"), shown("blank grey"), basis]
    given[position] = odd
    with pytest.raises(errors.MismatchError, match="something of type"):
        gl.compare(*given)


def test_directions_and_runs_of_different_hooks(basis):
    of_z = dataclasses.replace(basis, hook="z")
    with pytest.raises(errors.MismatchError, match=r"the directions 'planted' of the hook z, at resid_post"):
        gl.compare(shown("text"), shown("blank grey"), of_z)
    with pytest.raises(errors.MismatchError, match=r"other hook in the run 'blank grey'"):
        gl.compare(shown("text"), shown("blank grey", "attn_out"), basis)
    gl.compare(shown("text", "z"), shown("blank grey", "z"), of_z, draws=2)
    with pytest.raises(errors.MismatchError, match="hook z, at resid_post"):
        of_z.coordinates(shown("text"))
    with pytest.raises(errors.MismatchError, match="hook z, at resid_post"):
        gl.gates.threshold_at_fpr(of_z, shown("text"))


@pytest.fixture(scope="module")
def basis():
    """v1 is axis 0, and the midpoint of the classes is 0."""
    vectors = torch.eye(WIDTH)[:2].expand(2, 2, WIDTH).contiguous()
    means = torch.zeros(2, WIDTH)
    return directions.Directions(
        vectors, LAYERS, means + vectors[:, 0], means - vectors[:, 0], torch.zeros(2, 0), "planted", provenance=MADE_BY
    )


@pytest.fixture(scope="module")
def states():
    text = planted()
    image = text.copy()
    image[..., 0] += SHIFT  # harm stays separable, but all of it looks harmful to the LLM's threshold
    image[..., 1] += 3.0
    return text, image


@pytest.fixture(scope="module")
def gap(states, basis):
    return gl.compare(activations(states[0]), activations(states[1], name="blank grey"), basis, draws=300)


def value(gap, metric, run, layer, column="value"):
    frame = gap.frame
    (found,) = frame[(frame["metric"] == metric) & (frame["run"] == run) & (frame["layer"] == layer)][column]
    return found


LLM, VLM = "LLM, text", "VLM, blank grey"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("run", "which"), [(LLM, 0), (VLM, 1)])
def test_coordinates_are_measured_as_scikit_learn_and_numpy_do(gap, states, run, which, layer):
    scores = states[which][:, LAYERS.index(layer), 0].astype(np.float32)
    assert value(gap, "auroc", run, layer) == pytest.approx(roc_auc_score(LABELS, scores), abs=1e-9)
    harmful, harmless = scores[LABELS].astype(float), scores[~LABELS].astype(float)
    pooled = np.sqrt((harmful.var(ddof=1) + harmless.var(ddof=1)) / 2)
    assert value(gap, "d_prime", run, layer) == pytest.approx((harmful.mean() - harmless.mean()) / pooled, rel=1e-6)
    assert value(gap, "midpoint_accuracy", run, layer) == pytest.approx(np.mean((scores > 0) == LABELS))
    assert value(gap, "auroc", run, layer) == pytest.approx(norm.cdf((1.0, 3.0)[LAYERS.index(layer)] / np.sqrt(2)), abs=0.1)


def test_threshold_is_the_midpoint_of_the_directions(states, basis):
    moved = dataclasses.replace(basis, harmful_mean=basis.harmful_mean + 2 * basis.vectors[:, 0])
    found = gl.compare(activations(states[0]), activations(states[1], name="blank grey"), moved, draws=50)
    assert value(found, "midpoint_accuracy", LLM, 3) == pytest.approx(np.mean((states[0][:, 1, 0] > 1.0) == LABELS))


def test_change_is_the_difference_to_the_llm(gap):
    for metric in ("auroc", "d_prime", "midpoint_accuracy", "probe", "transfer"):
        for layer in LAYERS:
            assert np.isnan(value(gap, metric, LLM, layer, "change"))
            here, there = value(gap, metric, VLM, layer), value(gap, metric, LLM, layer)
            assert value(gap, metric, VLM, layer, "change") == pytest.approx(here - there)
            low, high = (value(gap, metric, VLM, layer, end) for end in ("change_low", "change_high"))
            assert low <= here - there <= high
    assert np.isnan(value(gap, "drift_along", VLM, 0, "change"))


def test_change_is_paired(gap):
    """The same shift of every query leaves the AUROC of each resample as it was: the change has no width, though the values have."""
    assert value(gap, "auroc", VLM, 0, "high") - value(gap, "auroc", VLM, 0, "low") > 0.05
    assert abs(value(gap, "auroc", VLM, 0, "change_low")) < 1e-6 > abs(value(gap, "auroc", VLM, 0, "change_high"))


def test_drift_along_and_off_in_closed_form(gap, states):
    for index, layer in enumerate(LAYERS):
        size = np.linalg.norm(states[0][:, index], axis=1).mean()
        assert value(gap, "drift_along", VLM, layer) == pytest.approx(SHIFT / size, rel=1e-5)
        assert value(gap, "drift_off", VLM, layer) == pytest.approx(3.0 / size, rel=1e-5)
        assert value(gap, "centroid_cosine", VLM, layer) == pytest.approx(1.0, abs=1e-5)
    assert set(gap.where(run=LLM).columns["metric"]) == {"auroc", "d_prime", "midpoint_accuracy", "probe", "transfer"}


def test_a_shift_fools_the_llms_threshold_and_probe_but_not_auroc(gap):
    assert value(gap, "auroc", VLM, 3) == pytest.approx(value(gap, "auroc", LLM, 3), abs=1e-6)
    assert value(gap, "probe", VLM, 3) > 0.85
    for metric in ("transfer", "midpoint_accuracy"):
        assert value(gap, metric, LLM, 3) > 0.85
        assert value(gap, metric, VLM, 3) < 0.6
        assert value(gap, metric, VLM, 3, "change_high") < -0.2


def test_several_runs_and_names(states, basis):
    llm, grey = activations(states[0]), activations(states[1], name="blank grey")
    gap = gl.compare(llm, [grey, activations(states[0], name="noise")], basis, draws=50)
    assert gap.facts["runs"] == [LLM, VLM, "VLM, noise"]
    assert value(gap, "drift_along", "VLM, noise", 0) == 0
    assert value(gap, "auroc", "VLM, noise", 3, "change") == 0
    assert gap.summary().loc[3, ("auroc", LLM)] == value(gap, "auroc", LLM, 3)


def test_probes_are_those_of_each_run_and_of_the_llm(states, basis, monkeypatch):
    """Against `probe_accuracy` run by run; the LLM's probe is trained once per layer, and has the folds of the others."""
    names = ("text", "blank grey", "noise")
    shifted = [states[0], states[1], np.random.default_rng(1).permuted(states[1], axis=0)]
    runs = [activations(each, name=name) for each, name in zip(shifted, names, strict=True)]
    probe, trained = separability._probe, []
    monkeypatch.setattr(separability, "_probe", lambda *given: trained.append(1) or probe(*given))
    gap = gl.compare(runs[0], runs[1:], basis, draws=20)
    assert len(trained) == len(LAYERS) * len(runs) * 5
    groups = np.array([q.cluster for q in QUERIES])
    for run in runs:
        for layer in LAYERS:
            text, own = runs[0].at(layer).double().numpy(), run.at(layer).double().numpy()
            name = f"{'LLM' if run is runs[0] else 'VLM'}, {run.presentation}"
            assert value(gap, "probe", name, layer) == separability.probe_accuracy(own, LABELS, groups)[0].mean()
            assert value(gap, "transfer", name, layer) == separability.probe_accuracy(text, LABELS, groups, own)[1].mean()


def test_clusters_are_resampled_together(states, basis):
    """Twins in one cluster: a resample holds as many harmful as harmless queries, so a threshold below all of them is right for half."""
    low = dataclasses.replace(basis, harmful_mean=basis.harmful_mean - 1000)
    runs = [activations(states[i], name=("text", "blank grey")[i]) for i in range(2)]
    together = gl.compare(*runs, low, draws=100)
    assert value(together, "midpoint_accuracy", LLM, 0, "low") == value(together, "midpoint_accuracy", LLM, 0, "high") == 0.5
    alone = tuple(dataclasses.replace(query, cluster="") for query in QUERIES)
    apart = gl.compare(*(dataclasses.replace(run, queries=alone) for run in runs), low, draws=100)
    assert value(apart, "midpoint_accuracy", LLM, 0, "low") < 0.5 < value(apart, "midpoint_accuracy", LLM, 0, "high")
    assert (together.facts["n_groups"], apart.facts["n_groups"]) == (N // 2, N)


def test_words_alone_stand_beside(states, basis, gap):
    groups = np.array([q.cluster for q in QUERIES])
    expected = roc_auc_score(LABELS, separability.bag_of_words_scores([q.text for q in QUERIES], LABELS, groups))
    surface, low, high = gap.facts["bag_of_words"]
    assert surface == pytest.approx(expected) and low <= surface <= high < 0.75
    telling = tuple(dataclasses.replace(q, text=q.text + (" bad" if q.label == "harmful" else " good")) for q in QUERIES)
    runs = [activations(states[i], telling, name=("text", "blank grey")[i]) for i in range(2)]
    assert gl.compare(*runs, basis, draws=50).facts["bag_of_words"][0] == 1.0


class TestErrors:
    def test_other_queries(self, states, basis):
        other = tuple(query(i, "other") for i in range(N))
        with pytest.raises(
            errors.MismatchError, match=r"Found other queries in the run 'blank grey'.\nExpected the same queries as in the LLM's run"
        ):
            gl.compare(activations(states[0]), activations(states[1], other, name="blank grey"), basis)

    def test_queries_in_another_order(self, states, basis):
        with pytest.raises(errors.MismatchError, match="other queries in the run 'blank grey'"):
            gl.compare(activations(states[0]), activations(states[1][::-1].copy(), QUERIES[::-1], name="blank grey"), basis)

    def test_other_layers(self, states, basis):
        with pytest.raises(errors.MismatchError, match="Found other layers in the run 'blank grey'"):
            gl.compare(activations(states[0]), activations(states[1], layers=(0, 2), name="blank grey"), basis)

    def test_other_width(self, states, basis):
        with pytest.raises(errors.MismatchError, match="Found other width in the run 'text'"):
            gl.compare(activations(states[0][..., :5]), activations(states[1][..., :5]), basis)

    def test_directions_of_another_model(self, states, basis):
        other = dataclasses.replace(basis, provenance=Provenance(model="foreign@bbb"))
        with pytest.raises(errors.MismatchError, match=r"directions 'planted' of the model foreign@bbb.\nExpected those of toy@aaa"):
            gl.compare(activations(states[0]), activations(states[1]), other)

    def test_unlabelled(self, states, basis):
        unlabelled = (dataclasses.replace(QUERIES[0], label=None), *QUERIES[1:])
        with pytest.raises(errors.QueryError, match="Found query 'q0' without a label"):
            gl.compare(activations(states[0], unlabelled), activations(states[1], unlabelled), basis)

    def test_one_class(self, states, basis):
        harmful = tuple(q for q in QUERIES if q.label == "harmful")
        runs = [activations(run[LABELS], harmful) for run in states]
        with pytest.raises(errors.QueryError, match=r"Found 40 queries that are all harmful.\nExpected both"):
            gl.compare(*runs, basis)

    def test_too_few_groups(self, states, basis):
        few = tuple(dataclasses.replace(query, cluster=str(i // 20)) for i, query in enumerate(QUERIES))
        with pytest.raises(errors.NumericsError, match="a label that occurs in 4 groups"):
            gl.compare(activations(states[0], few), activations(states[1], few), basis)


def test_saved_and_loaded(gap, tmp_path):
    gap.save(tmp_path / "gap.csv")
    loaded = Comparison.load(tmp_path / "gap.csv")
    assert list(loaded.columns) == list(gap.columns)
    for name, values in gap.columns.items():
        np.testing.assert_array_equal(loaded.columns[name], values)
    assert loaded.facts == gap.facts and loaded.provenance == gap.provenance
    with pytest.raises(errors.StorageError, match=r"Found a table of the kind 'comparison'.\nExpected the kind 'evaluation'"):
        Evaluation.load(tmp_path / "gap.csv")


def test_plot_has_a_panel_per_metric_and_a_line_per_run(gap):
    import matplotlib.pyplot as plt

    axes = gap.plot(["midpoint_accuracy", "drift_along"])
    assert len(axes) == 2
    drawn = [[line for line in ax.lines if len(line.get_xdata()) == len(LAYERS) and set(line.get_xdata()) == set(LAYERS)] for ax in axes]
    assert [len(lines) for lines in drawn] == [2, 1]
    assert [list(line.get_ydata()) for line in drawn[0]] == [
        [value(gap, "midpoint_accuracy", run, layer) for layer in LAYERS] for run in (LLM, VLM)
    ]
    plt.close(axes[0].figure)
