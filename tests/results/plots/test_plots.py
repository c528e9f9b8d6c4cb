import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex

from guardlens import plots
from guardlens.errors import MismatchError, NumericsError
from guardlens.results.plots import style as figure_style


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    pyplot.close("all")


def curves(metrics=("auroc", "d_prime"), runs=("text only", "grey image"), layers=(0, 1, 2, 3), n=216):
    rows = [
        {"metric": m, "run": r, "layer": layer, "value": 0.5 + 0.1 * layer - 0.05 * j, "n": n}
        for m in metrics
        for j, r in enumerate(runs)
        for layer in layers
    ]
    return pd.DataFrame(rows).assign(low=lambda f: f["value"] - 0.03, high=lambda f: f["value"] + 0.04)


def effects(interventions=("guard", "placebo"), layers=(0, 1, 2), strengths=(0.5, 1.0)):
    rows = [
        {"intervention": p, "label": label, "layer": layer, "strength": s, "value": (2.0 * layer - 1) * s * (p == "guard"), "n": 54}
        for p in interventions
        for label in ("harmful", "harmless")
        for layer in layers
        for s in strengths
    ]
    return pd.DataFrame(rows)


def arm_rows():
    rows = [
        {"defence": d, "presentation": p, "rate": rate, "value": 0.1 * (i + 1) + 0.05 * j, "n": 54}
        for rate in ("ASR", "over-refusal")
        for i, d in enumerate(("none", "guard"))
        for j, p in enumerate(("text only", "grey image"))
    ]
    return pd.DataFrame(rows).assign(low=lambda f: f["value"] - 0.04, high=lambda f: f["value"] + 0.06)


def projections():
    rng = np.random.default_rng(0)
    rows = [
        {"run": run, "label": label, "coordinate": value, "threshold": 0.25}
        for run in ("text only", "grey image")
        for label, centre in (("harmful", 2.0), ("harmless", -1.0))
        for value in rng.normal(centre, 1, size=50)
    ]
    return pd.DataFrame(rows)


def shares(layers=3):
    rows = [{"layer": layer, "index": k, "share": 0.5**k} for layer in range(layers) for k in range(1, 9)]
    return pd.DataFrame(rows)


def legend_of(owner):
    return [text.get_text() for text in owner.legends[0].get_texts()]


def test_layer_curves_draw_each_run_with_its_band():
    axes = plots.layer_curves(curves())
    assert [ax.get_title("left") for ax in axes] == ["AUROC", "d′"]
    lines = {line.get_label(): line for line in axes[0].lines if not line.get_label().startswith("_")}
    assert lines["grey image"].get_xydata() == pytest.approx(np.array([[0, 0.45], [1, 0.55], [2, 0.65], [3, 0.75]]))
    assert len({line.get_color() for line in lines.values()}) == len({line.get_marker() for line in lines.values()}) == 2
    corners = axes[0].collections[1].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(0.42) and corners[:, 1].max() == pytest.approx(0.79)
    assert to_hex(axes[0].collections[1].get_facecolor()) == lines["grey image"].get_color().lower()


def test_layer_curves_say_chance_zero_layer_and_n():
    axes = plots.layer_curves(curves())
    assert list(axes[0].lines[0].get_ydata()) == [0.5, 0.5] and axes[0].texts[0].get_text() == "chance"
    assert list(axes[1].lines[0].get_ydata()) == [0.0, 0.0] and not axes[1].texts
    assert legend_of(axes[0].figure) == ["text only", "grey image", "95 % interval, n = 216"]
    assert [ax.get_xlabel() for ax in axes] == ["layer", "layer"]
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == ["0", "1", "2", "3"]


def test_many_layers_thin_ticks_and_markers_not_the_curve():
    (ax,) = plots.layer_curves(curves(metrics=("auroc",), layers=range(32)))
    assert [int(tick.get_text()) for tick in ax.get_xticklabels()] == list(range(0, 32, 4))
    assert len(ax.lines[1].get_xdata()) == 32 and ax.lines[1].get_markevery() == 4


def test_five_metrics_leave_no_empty_panel_and_no_column_without_layers():
    axes = plots.layer_curves(curves(metrics=("auroc", "d_prime", "probe", "transfer", "my_metric")))
    assert len(axes) == 5 and axes[-1].get_title("left") == "my metric"
    assert [ax.get_visible() for ax in axes[0].figure.axes] == [True] * 5 + [False]
    assert [bool(ax.get_xlabel()) for ax in axes] == [False, False, True, True, True]


def test_panels_of_one_unit_share_its_axis():
    frame = curves(metrics=("a", "b", "c", "d")).assign(value=lambda rows: rows["value"] + 10 * (rows["metric"] == "d"))
    axes = plots.layer_curves(frame, unit="change (nats)", columns=2)
    assert [ax.get_ylabel() for ax in axes] == ["change (nats)", "", "change (nats)", ""]
    assert len({ax.get_ylim() for ax in axes}) == 1 and axes[0].get_ylim()[1] > 10
    assert [bool(ax.get_xlabel()) for ax in axes] == [False, False, True, True]
    assert len({round(ax.get_position().x0, 3) for ax in axes}) == 2
    alone = plots.layer_curves(frame, columns=2)
    assert len({ax.get_ylim() for ax in alone}) > 1 and not any(ax.get_ylabel() for ax in alone)


def test_undefined_bounds_leave_a_gap_and_no_warning():
    frame = curves()
    frame.loc[frame["layer"] == 0, ["value", "low", "high"]] = np.nan
    (line,) = [line for line in plots.layer_curves(frame)[0].lines if line.get_label() == "text only"]
    line.figure.canvas.draw()
    assert np.isnan(line.get_ydata()[0]) and np.isfinite(line.get_ydata()[1:]).all()


def test_one_can_draw_into_ones_own_axes():
    figure, mine = pyplot.subplots(1, 2)
    axes = plots.layer_curves(curves(), axes=mine, titles={"auroc": "Area"})
    assert list(axes) == list(mine) and axes[0].get_title("left") == "Area" and not figure.legends
    assert axes[0].get_legend() is not None
    with pytest.raises(MismatchError, match=r"Found 1 axes for 2 panels\."):
        plots.layer_curves(curves(), axes=[mine[0]])


def test_effect_maps_share_one_scale_centred_at_zero():
    axes = plots.effect_maps(effects())
    assert axes.shape == (2, 2)
    assert [ax.get_title("left") for ax in axes.ravel()][:2] == ["guard · harmful (n = 54)", "guard · harmless (n = 54)"]
    assert {ax.collections[0].get_clim() for ax in axes.ravel()} == {(-3.0, 3.0)}
    cells = axes[0, 0].collections[0].get_array()
    assert np.asarray(cells) == pytest.approx(np.array([[-0.5, 0.5, 1.5], [-1, 1, 3]]))
    assert [tick.get_text() for tick in axes[0, 0].get_yticklabels()] == ["0.5", "1"]
    assert (axes[1, 0].get_xlabel(), axes[1, 0].get_ylabel()) == ("layer", "strength")


def test_effect_maps_say_their_unit_and_their_values():
    axes = plots.effect_maps(effects(), unit="Δ KL (nats)")
    bars = [ax for ax in axes[0, 0].figure.axes if ax not in list(axes.ravel())]
    assert [bar.get_ylabel() for bar in bars] == ["Δ KL (nats)"]
    assert [text.get_text() for text in axes[0, 0].texts] == ["−0.5", "0.5", "1.5", "−1.0", "1.0", "3.0"]
    assert not plots.effect_maps(effects(layers=range(32)))[0, 0].texts


def test_effect_maps_mark_the_cells_whose_interval_holds_zero():
    frame = effects(interventions=("guard",))
    frame = frame.assign(low=frame["value"] - 0.6, high=frame["value"] + 0.6)
    ((harmful, _),) = axes = plots.effect_maps(frame, unit="nats")
    (dots,) = [line for line in harmful.lines if line.get_marker() == "."]
    assert {(round(x), round(y)) for x, y in dots.get_xydata()} == {(0, 0), (1, 0)}  # -0.5 and 0.5 at strength 0.5
    assert axes[0, 0].figure.axes[-1].get_ylabel() == "nats\n· 95 % interval holds 0"


def test_effect_maps_leave_missing_cells_empty():
    axes = plots.effect_maps(effects().drop(index=0))
    assert np.ma.getmaskarray(axes[0, 0].collections[0].get_array())[0, 0]
    assert len(axes[0, 0].texts) == 5
    with pytest.raises(NumericsError, match=r"The largest effect is nan\."):
        plots.effect_maps(effects().assign(value=np.nan))


def test_arms_draw_points_and_whiskers_in_percent():
    axes = plots.arms(arm_rows())
    assert [ax.get_title("left") for ax in axes] == ["ASR", "over-refusal"]
    assert axes[0].get_xlabel() == "harmful requests answered (%), n = 54"
    assert axes[0].get_xlim() == (0, 100)
    grey = next(line for line in axes[0].lines if line.get_label() == "grey image")
    assert list(grey.get_xdata()) == pytest.approx([15, 25])
    whiskers = axes[0].collections[1].get_segments()
    assert [list(segment[:, 0]) for segment in whiskers] == [pytest.approx([11, 21]), pytest.approx([21, 31])]
    assert list(grey.get_ydata()) == pytest.approx([segment[0, 1] for segment in whiskers])


def test_arms_have_the_first_defence_on_top_and_one_legend():
    axes = plots.arms(arm_rows())
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["none", "guard"]
    assert axes[0].get_ylim() == (1.5, -0.5)
    assert legend_of(axes[0].figure) == ["text only", "grey image", "95 % interval"]


def test_coordinates_show_shares_means_and_threshold():
    frame = projections()
    axes = plots.coordinates(frame)
    assert [ax.get_title("left") for ax in axes] == ["text only", "grey image"]
    filled = [patch for patch in axes[0].patches if patch.get_fill()]
    assert [to_hex(patch.get_facecolor()) for patch in filled] == ["#d55e00", "#0072b2"]
    assert [patch.get_data().values.sum() for patch in filled] == pytest.approx([100, 100])
    triangles = [line.get_xdata()[0] for line in axes[1].lines if line.get_marker() == "^"]
    assert triangles == pytest.approx(frame[frame["run"] == "grey image"].groupby("label", sort=False)["coordinate"].mean().to_list())
    assert all(any(list(line.get_xdata()) == [0.25, 0.25] for line in ax.lines) for ax in axes)
    assert axes[-1].get_xlabel() == "projection on $v_1$"
    assert legend_of(axes[0].figure) == ["harmful, n = 50", "harmless, n = 50", "mean"]


def test_coordinates_need_no_threshold_but_finite_numbers():
    axes = plots.coordinates(projections().drop(columns="threshold"))
    assert all(line.get_marker() == "^" for line in axes[0].lines)
    with pytest.raises(NumericsError, match="coordinates that are not finite"):
        plots.coordinates(projections().assign(coordinate=np.inf))


def test_spectrum_stacks_to_a_hundred():
    ax = plots.spectrum(shares(), top=3)
    heights = np.array([[bar.get_height() for bar in group] for group in ax.containers])
    assert heights[:, 0] == pytest.approx([50, 25, 12.5, 12.5])
    assert heights.sum(axis=0) == pytest.approx([100, 100, 100])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rest", "$v_{3}$", "$v_{2}$", "$v_{1}$"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "share of squared singular values (%)")


def alike(layers=3):
    rows = [{"layer": i, "other": j, "value": 1 - 0.3 * abs(i - j)} for i in range(layers) for j in range(layers)]
    return pd.DataFrame(rows)


def test_cosines_are_a_square_from_minus_one_to_one():
    ax = plots.cosines(alike())
    assert np.asarray(ax.collections[0].get_array()) == pytest.approx(np.array([[1, 0.7, 0.4], [0.7, 1, 0.7], [0.4, 0.7, 1]]))
    assert ax.collections[0].get_clim() == (-1, 1) and ax.texts[1].get_text() == "0.70"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "layer")
    assert ax.figure.axes[-1].get_ylabel() == "cosine of $v_1$ of two layers"


def test_a_basis_shows_what_there_is():
    first, second = plots.basis(shares(), alike())
    assert first.get_ylabel().startswith("share of squared") and second.get_ylabel() == "layer" and first.figure is second.figure
    (only,) = plots.basis(shares().iloc[:0], alike())
    assert only.get_ylabel() == "layer"
    _, mine = pyplot.subplots(1, 2)
    assert list(plots.basis(shares(), alike(), axes=mine)) == list(mine)
    with pytest.raises(NumericsError, match="of a single layer and without a spectrum"):
        plots.basis(shares().iloc[:0], alike().iloc[:0])


def test_frames_that_do_not_fit_are_refused_with_what_is_missing():
    with pytest.raises(MismatchError) as caught:
        plots.layer_curves(curves().drop(columns=["low", "n"]))
    expected = "the columns metric, run, layer, value, low, high, n"
    assert str(caught.value).startswith(f"Found a frame without low, n (it has metric, run, layer, value, high).\nExpected {expected}.\n")
    with pytest.raises(NumericsError, match="a frame without rows"):
        plots.arms(arm_rows().iloc[:0])


def test_save_writes_the_same_bytes_twice_and_closes(tmp_path):
    open_before = pyplot.get_fignums()
    first, second = (plots.save(plots.spectrum(shares()).figure, tmp_path / name / "fig.v1") for name in ("a", "b"))
    assert [path.name for path in first] == ["fig.v1.png", "fig.v1.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["fig.v1.png", "fig.v1.svg"]
    assert b"<dc:date>" not in first[1].read_bytes()
    assert pyplot.get_fignums() == open_before


def test_the_users_settings_stay_as_they_were():
    before = dict(matplotlib.rcParams)
    plots.arms(arm_rows())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("colours", [figure_style.RUNS, list(figure_style.LABELS.values())])
def test_colours_are_of_okabe_and_ito(colours):
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(colours) - {figure_style.INK} <= okabe_ito


@pytest.mark.parametrize("metrics", [("auroc",), ("auroc", "d_prime")])
def test_a_long_legend_stays_on_the_figure(metrics):
    figure = plots.layer_curves(curves(metrics=metrics, runs=[f"presentation number {i}" for i in range(7)]))[0].figure
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("name", [r"$\frac$", "a$b", "$x_$"])
def test_names_are_no_mathematics(name, tmp_path):
    rows = [
        {"defence": name, "presentation": name, "rate": "ASR", "value": 0.5, "low": 0.4, "high": 0.6, "n": 3},
        {"defence": name, "presentation": f"{name} {name}", "rate": "ASR", "value": 0.5, "low": 0.4, "high": 0.6, "n": 3},
    ]
    panels = plots.arms(pd.DataFrame(rows))
    plots.save(panels[0].figure, tmp_path / "figure")
    shown = {text.get_text() for text in panels[0].figure.findobj(matplotlib.text.Text)}
    assert any(name.replace("$", r"\$") in text for text in shown)
