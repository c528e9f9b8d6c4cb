"""`.plot(ax=None)` means the same on every result."""

import inspect

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes

import guardlens as gl
from guardlens import directions, judges, presentations
from guardlens import interventions as iv
from guardlens.errors import NumericsError

WORDS = {"harmful": "forge pry swipe trace crack", "harmless": "mend wash move open glue"}
QUERIES = tuple(gl.Query(f"how to {verb} the hat ?", label) for label, verbs in WORDS.items() for verb in verbs.split())
GREY = presentations.blank("grey", size=32)
PANELS = {"Comparison": 3, "Sweep": 4, "Evaluation": 2, "Attribution": 6, "Patching": 2, "heads of Patching": 2, "Directions": 1}


@pytest.fixture(scope="module")
def results(vlm, basis):
    one = basis.truncate(1)
    text, grey = gl.collect(vlm, QUERIES), gl.collect(vlm, QUERIES, GREY)
    found = (
        gl.compare(text, grey, one, draws=100),
        gl.sweep(vlm, iv.add(one), QUERIES, GREY, strengths=[0.5, 1.0], layers=[2, 5]),
        gl.evaluate(vlm, {"none": iv.nothing}, QUERIES, GREY, judge=judges.keyword, max_new_tokens=2),
        gl.attribute(vlm, one, QUERIES, GREY, layer=3),
        gl.activation_patching(vlm, QUERIES, GREY, layers=[2, 5]),
        gl.activation_patching(vlm, QUERIES, GREY, hooks="z", layers=[2, 5]),
        directions.diff_in_means(text),
    )
    return dict(zip(PANELS, found, strict=True))


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", PANELS)
def test_a_plot_is_an_array_of_axes_in_a_figure_of_its_own(name, results):
    before = set(pyplot.get_fignums())
    axes = results[name].plot()
    assert isinstance(axes, np.ndarray) and axes.size == PANELS[name] and all(isinstance(ax, Axes) for ax in axes.ravel())
    assert set(pyplot.get_fignums()) - before == {axes.ravel()[0].figure.number}


@pytest.mark.parametrize("name", PANELS)
def test_a_plot_goes_into_the_axes_that_it_is_given(name, results):
    _, mine = pyplot.subplots(1, PANELS[name], squeeze=False)
    before = set(pyplot.get_fignums())
    axes = results[name].plot(ax=mine)
    assert list(axes.ravel()) == list(mine.ravel()) and set(pyplot.get_fignums()) == before


@pytest.mark.parametrize("name", PANELS)
def test_every_axis_is_named_and_n_is_said(name, results):
    axes = results[name].plot()
    figure = axes.ravel()[0].figure
    said = [*(text.get_text() for legend in figure.legends for text in legend.get_texts()), *(ax.get_title("left") for ax in figure.axes)]
    said += [name for ax in figure.axes for name in (ax.get_xlabel(), ax.get_ylabel())]
    assert any(ax.get_xlabel() for ax in axes.ravel())
    if name != "Directions":  # one basis; its spectrum and cosines are of no items
        assert any("n = " in text for text in said), said


def test_no_result_calls_it_otherwise(results):
    for result in results.values():
        parameters = inspect.signature(result.plot).parameters
        assert list(parameters)[-1] == "ax" and parameters["ax"].default is None


def test_a_single_axes_will_do_for_a_single_panel(results):
    _, mine = pyplot.subplots()
    assert list(results["Directions"].plot(ax=mine)) == [mine]


def test_directions_show_a_spectrum_and_cosines_where_there_are(results, vlm):
    pairs = gl.QueryPairs(QUERIES[:5], QUERIES[5:])
    ssd = directions.ssd(gl.collect(vlm, pairs), rank=2)
    spectrum, cosines = ssd.plot()
    assert [bar.get_height() for bar in spectrum.containers[0]] == pytest.approx((100 * ssd.shares[:, 0]).tolist(), abs=1e-4)
    drawn = np.asarray(cosines.collections[0].get_array())
    assert drawn[2, 6] == pytest.approx(float(ssd.at(2)[0] @ ssd.at(6)[0]), abs=1e-5) and np.diag(drawn) == pytest.approx(
        np.ones(8), abs=1e-5
    )
    (only,) = ssd[3].plot()
    assert only.get_ylabel().startswith("share of squared")
    with pytest.raises(NumericsError, match="of a single layer and without a spectrum"):
        directions.diff_in_means(gl.collect(vlm, pairs))[3].plot()


def test_shares_are_those_of_the_squared_singular_values(vlm):
    collected = gl.collect(vlm, gl.QueryPairs(QUERIES[:5], QUERIES[5:]))
    shares = directions.ssd(collected).shares.numpy()
    values = np.linalg.svd((collected.at(4)[:5] - collected.at(4)[5:]).numpy().astype(float), compute_uv=False) ** 2
    assert shares[4] == pytest.approx(values / values.sum(), abs=1e-5) and shares.sum(axis=1) == pytest.approx(np.ones(8), abs=1e-5)
