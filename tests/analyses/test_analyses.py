"""The analyses of the paper in their quick form on the organism: what the tables hold, what the figures show, and the published pages."""

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from typer.testing import CliRunner

import guardlens as gl
from analyses import attribution, defences, layer_sweep, publication, separability
from guardlens import plots
from guardlens.errors import QueryError
from guardlens.experiments.comparison import Comparison
from guardlens.results.significance import holm, mcnemar
from guardlens.results.tables import Table

ALL = {
    "layer_sweep": layer_sweep.LAYER_SWEEP,
    "separability": separability.SEPARABILITY,
    "defences": defences.DEFENCES,
    "attribution": attribution.ATTRIBUTION,
}
FIGURES = {
    "layer_sweep": ["layer_sweep", "layer_sweep_curves"],
    "separability": ["separability"],
    "defences": ["defences"],
    "attribution": ["attribution", "attribution_patching", "attribution_agreement"],
}
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(autouse=True, scope="module")
def _figures_are_closed():
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each quick run, through its command line, once: name -> (folder, table)."""
    root, done = tmp_path_factory.mktemp("analyses"), {}

    def run(name):
        if name not in done:
            analysis, out = ALL[name], root / name
            result = CliRunner().invoke(publication.application(analysis), ["--quick", "--out", str(out), "--seed", "1"])
            assert result.exit_code == 0, result.output
            kind = Comparison if name == "separability" else Table
            done[name] = out, kind.load(out / f"{name}.csv")
        return done[name]

    return run


@pytest.mark.parametrize("name", ALL)
def test_a_run_writes_table_figures_page_and_provenance(made, name):
    out, table = made(name)
    for figure in FIGURES[name]:
        assert (out / f"{figure}.png").read_bytes().endswith(b"IEND\xaeB`\x82")
        assert (out / f"{figure}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    page, meta = (out / f"{name}.md").read_text(encoding="utf-8"), json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    assert page.count("\n# ") == 0 and page.startswith("# ") and "**A quick run" in page and "nan" not in page
    assert sorted(re.findall(r"\]\((\w+)\.png\)", page)) == sorted(FIGURES[name])
    assert meta["facts"]["command"] == f"python -m analyses.{name} --model organism --out {out.as_posix()} --quick --seed 1"
    assert meta["provenance"]["model"].startswith("organism@") and meta["provenance"]["versions"]["torch"] and meta["provenance"]["date"]
    assert f"`{meta['facts']['command']}`" in page and meta["provenance"]["model"] in page
    assert page == publication.page(ALL[name], table)


@pytest.mark.parametrize("name", ["layer_sweep", "separability", "attribution"])
def test_the_same_seed_gives_the_same_table(made, name, tmp_path):
    out, _ = made(name)
    settings = publication.Settings(out=tmp_path, quick=True, seed=1)
    again = ALL[name].measure(publication.subject(settings, **ALL[name].options), settings)
    again.save(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (out / f"{name}.csv").read_bytes()


def ordered(frame, *columns):
    """Rows in which all of the columns are there; low <= value <= high in them."""
    value, low, high = columns
    rows = frame[frame[list(columns)].notna().all(axis=1)]
    assert len(rows) and (rows[low] <= rows[value] + 1e-9).all() and (rows[value] <= rows[high] + 1e-9).all()
    return rows


class TestLayerSweep:
    def test_every_cell_is_there_with_an_interval(self, made):
        frame = made("layer_sweep")[1].frame
        assert list(frame["presentation"].unique()) == ["text", "blank grey", "blank white", "noise 1"]
        cells = frame.groupby(["presentation", "intervention", "variant", "label", "strength"])["layer"].agg(list)
        assert len(cells) == 4 * 2 * 2 * 2 * 2 and all(layers == list(range(8)) for layers in cells)
        assert len(ordered(frame, "change", "low", "high")) == len(frame) and set(frame["n"]) == {publication.QUICK_QUERIES}

    def test_what_must_hold_does(self, made):
        """In text the guard puts back what is there; beside an image it brings refusals of harmful requests back, at some layer."""
        frame = made("layer_sweep")[1].frame.query("strength == 1.0 and intervention == 'vlm_guard[replace]'")
        assert frame.query("presentation == 'text' and variant == 'edit'")["change"].abs().max() < 1e-3
        frame = frame.query("presentation == 'blank grey' and label == 'harmful'")
        guard, placebo = (frame[frame["variant"] == variant] for variant in ("edit", "placebo"))
        assert guard["low"].max() > 1 > placebo["high"].max()

    def test_the_best_layer_follows_from_the_scores_of_each_query(self, made):
        out, table = made("layer_sweep")
        for name, found in table.facts["best"].items():
            queries = pd.read_csv(out / "queries" / f"{name.replace(' ', '_')}.csv")
            queries = queries.query("variant == 'edit' and intervention == 'vlm_guard[replace]'")
            change = (queries["value"] - queries["base"]).groupby([queries["layer"], queries["label"]]).mean().unstack()
            merit = (change["harmful"] - change["harmless"].clip(lower=0)).sort_values()
            assert [found["layer"], found["next"]] == list(merit.index[:-3:-1])
            assert found["ahead"] == pytest.approx(change["harmful"][found["layer"]] - change["harmful"][found["next"]], abs=1e-6)
            assert found["low"] <= found["ahead"] <= found["high"]

    def test_facts_say_which_layout_ran(self, made):
        _, table = made("layer_sweep")
        assert set(table.facts["layouts"]) == set(table.frame["presentation"])
        assert all(layout and re.match("branch|tile", layout[0]) for layout in table.facts["layouts"].values())

    def test_figures_show_units_n_and_intervals(self, made):
        drawn = layer_sweep.draw(made("layer_sweep")[1])
        maps = [ax for ax in drawn["layer_sweep"].axes if ax.get_title("left")]
        assert len(maps) == 8 and all("(n = 24)" in ax.get_title("left") for ax in maps)
        assert drawn["layer_sweep"].axes[-1].get_ylabel() == "Δ refusal log-odds (nats)\n· 95 % interval holds 0"
        curves = drawn["layer_sweep_curves"].axes
        assert [ax.get_title("left") for ax in curves[:2]] == ["text · harmful", "text · harmless"]
        assert all(ax.get_ylabel() == "Δ refusal\nlog-odds (nats)" for ax in curves[::2]) and all(len(ax.collections) == 3 for ax in curves)
        legend = [text.get_text() for text in drawn["layer_sweep_curves"].legends[0].get_texts()]
        assert legend == ["vlm_guard[replace]", "placebo of vlm_guard[replace]", "project-out", "95 % interval, n = 24"]


class TestSeparability:
    def test_metrics_lie_in_their_ranges(self, made):
        frame = made("separability")[1].frame
        assert list(frame["run"].unique()) == ["LLM, text", "VLM, blank grey", "VLM, blank white", "VLM, noise 1"]
        ordered(frame, "value", "low", "high")
        shares = frame[frame["metric"].isin(["auroc", "midpoint_accuracy", "probe", "transfer"])]
        assert shares[["value", "low", "high"]].stack().between(0, 1).all()
        assert set(separability.METRICS) <= set(frame["metric"]) and set(frame["n"]) == {48}

    def test_the_shift_is_seen(self, made):
        """The LLM's threshold is right in text, wrong beside an image, though the order of the requests stays."""
        frame = made("separability")[1].frame.query("layer == 7").set_index(["metric", "run"])["value"]
        assert frame["midpoint_accuracy", "LLM, text"] > 0.95 > frame["midpoint_accuracy", "VLM, blank grey"] + 0.1
        assert frame["auroc", "VLM, blank grey"] > 0.95 and frame["drift_along", "VLM, blank grey"] < -0.1

    def test_a_panel_per_metric_with_bands_and_n(self, made):
        figure = separability.draw(made("separability")[1])["separability"]
        assert [ax.get_title("left") for ax in figure.axes] == [plots.TITLES[metric] for metric in separability.METRICS]
        bands = [sum(bool(band.get_paths()) for band in ax.collections) for ax in figure.axes]
        assert bands == [4, 4, 4, 4, 4, 3], "the LLM drifts from nothing"
        assert figure.legends[0].get_texts()[-1].get_text() == "95 % interval, n = 48"
        assert [ax.get_xlabel() for ax in figure.axes[-3:]] == ["layer"] * 3


class TestDefences:
    def test_every_defence_in_every_presentation(self, made):
        frame = made("defences")[1].frame
        shown = ["text", "blank grey", "blank white", "noise 1", defences.BLANKS]
        readings = [f"vlm_guard[{reading}]" for reading in ("replace", "add", "amplify", "project")]
        assert list(frame["defence"].unique()) == ["none", "self_reminder", *readings, "placebo"]
        assert frame.groupby("defence")["presentation"].agg(set).map(lambda found: found == set(shown)).all()
        for rate in ("asr", "non_refusal", "over_refusal", "helpful"):
            assert ordered(frame, rate, f"{rate}_low", f"{rate}_high")[[f"{rate}_low", f"{rate}_high"]].stack().between(0, 1).all()
            if rate in defences.TESTED:
                ordered(frame, f"{rate}_change", f"{rate}_change_low", f"{rate}_change_high")

    def test_rates_and_tests_follow_from_the_answers(self, made):
        out, table = made("defences")
        records = [json.loads(line) for line in (out / "records" / "records.jsonl").read_text(encoding="utf-8").splitlines()]
        answers, rows = pd.DataFrame(records), table.frame.set_index(["defence", "presentation"])
        harmful = answers[answers["label"] == "harmful"]
        answered = (harmful["verdict"] == "answered").groupby([harmful["defence"], harmful["presentation"], harmful["query"]]).mean()
        blanks = table.facts["blanks"]
        for (defence, presentation), row in rows.iterrows():
            names = blanks if presentation == defences.BLANKS else [presentation]
            mine, bare = (pd.concat([answered[which, name] for name in names]) for which in (defence, "none"))
            assert row["asr"] == pytest.approx(mine.mean()) and row["asr_change"] == pytest.approx(mine.mean() - bare.mean())
            if np.isfinite(row["asr_p"]):
                test = mcnemar(bare.to_numpy() == 1, mine.loc[bare.index].to_numpy() == 1)
                assert (row["asr_only_none"], row["asr_only_defended"], row["asr_p"]) == (test.b, test.c, pytest.approx(test.p))
        p = rows[[f"{rate}_p" for rate in defences.TESTED]].to_numpy().ravel()
        adjusted = rows[[f"{rate}_p_holm" for rate in defences.TESTED]].to_numpy().ravel()
        np.testing.assert_allclose(adjusted[np.isfinite(p)], holm(p[np.isfinite(p)]))
        assert np.isnan(rows.loc["placebo", "asr_p"]).all() and np.isfinite(rows.loc[("self_reminder", "blank grey"), "asr_p"])

    def test_the_guard_closes_the_gap_and_the_placebo_does_not(self, made):
        _, table = made("defences")
        rows = table.frame[table.frame["presentation"] == defences.BLANKS].set_index("defence")
        assert rows.loc[table.facts["chosen"], "gap_closed_low"] > 0.5 > rows.loc["placebo", "gap_closed"]
        assert rows.loc["none", "n"] == 2 * publication.QUICK_QUERIES and rows.loc["placebo", "n"] == 4 * publication.QUICK_QUERIES

    def test_a_finished_run_generates_nothing(self, made, monkeypatch, tmp_path):
        out, _ = made("defences")
        run = gl.HookedModel.run

        def no_generation(self, *args, **options):
            assert not options.get("new_tokens"), "a finished run asked for new tokens"
            return run(self, *args, **options)

        monkeypatch.setattr(gl.HookedModel, "run", no_generation)
        settings = publication.Settings(out=out, quick=True, seed=1)
        again = defences.measure(publication.subject(settings), settings)
        again.save(tmp_path / "again.csv")
        assert (tmp_path / "again.csv").read_bytes() == (out / "defences.csv").read_bytes()

    def test_points_have_whiskers_units_and_n(self, made):
        figure = defences.draw(made("defences")[1])["defences"]
        labels = ["harmful requests answered (%), n = 24", "harmless requests refused (%), n = 24"]
        assert [ax.get_xlabel() for ax in figure.axes] == labels
        names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        assert names[0] == "none" and names[-1] == "placebo (2 draws)"
        segments = sum(len(found.get_segments()) for found in figure.axes[0].collections if hasattr(found, "get_segments"))
        assert segments == 7 * 4


class TestAttribution:
    def test_parts_are_written_and_patched(self, made):
        frame = made("attribution")[1].frame
        assert list(frame["presentation"].unique()) == ["blank grey", "noise 1"]
        for columns in (("value", "low", "high"), ("change", "change_low", "change_high"), ("patched", "patched_low", "patched_high")):
            ordered(frame, *columns)
        harmful = frame.query("label == 'harmful' and presentation == 'blank grey'")
        sizes = harmful.groupby("component").size()
        assert (sizes["head"], sizes["mlp"], sizes["resid_post"], sizes["attn_out"]) == (32, 8, 8, 8)
        heads = harmful[harmful["component"] == "head"]
        assert heads[["text_value", "value", "patched"]].notna().all().all()
        np.testing.assert_allclose(heads["value"] - heads["text_value"], heads["change"], atol=1e-6)

    def test_the_whole_last_state_recovers_all(self, made):
        frame = made("attribution")[1].frame.query("label == 'harmful' and component == 'resid_post' and block == 7")
        np.testing.assert_allclose(frame["recovered"], 1.0, atol=1e-3)

    def test_agreement_is_a_rank_correlation_of_the_table(self, made):
        _, table = made("attribution")
        parts = table.frame[table.frame["component"].isin(["head", "mlp"]) & (table.frame["label"] == "harmful")]
        for name, found in table.facts["agreement"].items():
            here = parts[(parts["presentation"] == name) & (parts["block"] <= table.facts["layer"])]
            assert found["correlation"] == pytest.approx((-here["change"]).corr(here["patched"], method="spearman"), abs=1e-6)
            assert -1 <= found["low"] <= found["correlation"] <= found["high"] <= 1 and found["parts"] == len(here)

    def test_sources_sum_to_the_change(self, made):
        _, table = made("attribution")
        written = table.frame.query("label == 'harmful'").groupby("presentation")["change"].sum()
        found = pd.DataFrame(table.facts["sources"]).groupby("presentation")["change"].sum()
        np.testing.assert_allclose(found[written.index], written, atol=1e-3)

    def test_figures_show_units_n_and_intervals(self, made):
        drawn = attribution.draw(made("attribution")[1])
        top = [ax.get_title("left") for ax in drawn["attribution"].axes[:3]]
        assert top == ["text", "blank grey", "blank grey − text"] and "harmful (n = 24)" in drawn["attribution"].axes[-2].get_ylabel()
        (ax,) = drawn["attribution_agreement"].axes
        assert "n = 24" in ax.get_xlabel() and "refusal log-odds (nats)" in ax.get_ylabel()
        assert sorted(len(found.get_segments()) for found in ax.collections) == [8, 8, 32, 32]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["head (32)", "MLP (8)", "95 % interval"]
        curves = drawn["attribution_patching"]
        assert curves.axes[0].get_ylabel() == "lost refusal log-odds\nrecovered (share)"
        assert curves.legends[0].get_texts()[-1].get_text() == "95 % interval, n = 24"


class TestSubject:
    @pytest.mark.parametrize("given", [{"model": "some/model"}, {"queries": Path("mine.jsonl")}])
    def test_a_model_and_its_queries_go_together(self, given):
        with pytest.raises(QueryError, match=r"Expected --queries with every model but the organism\."):
            publication.subject(publication.Settings(**given))

    def test_errors_are_sentences(self, tmp_path):
        result = CliRunner().invoke(layer_sweep.app, ["--model", "nowhere", "--out", str(tmp_path)])
        assert result.exit_code == 1 and result.output.startswith("guardlens: Found the model nowhere without queries.")
        assert "Traceback" not in result.output and not list(tmp_path.iterdir())

    def test_ones_own_model_and_queries(self, hf_vlm, processor, tmp_path):
        hf_vlm.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        twins = gl.organism.pairs()
        rows = [
            {"text": query.text, "label": query.label, "pair": query.pair, "id": query.id}
            for pair in zip(twins.harmful[:32], twins.harmless[:32], strict=True)
            for query in pair
        ]
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = publication.Settings(str(tmp_path / "model"), tmp_path / "mine.jsonl", tmp_path / "out", quick=True)
        table = publication.run(separability.SEPARABILITY, settings)
        assert table.facts["n_harmful"] == table.facts["n_harmless"] == 8 and table.provenance.model.startswith("model@")
        other = publication.subject(publication.Settings(settings.model, settings.queries, quick=True, seed=5))
        assert other.test != publication.subject(settings).test and other.images[-1].name == "noise 5"


@pytest.mark.parametrize("name", ALL)
def test_the_published_page_is_what_its_table_makes(name):
    table = (Comparison if name == "separability" else Table).load(RESULTS / f"{name}.csv")
    assert table.facts["quick"] is False and table.provenance.model.startswith("organism@")
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == publication.page(ALL[name], table)
    assert all((RESULTS / f"{figure}.png").is_file() for figure in FIGURES[name])
