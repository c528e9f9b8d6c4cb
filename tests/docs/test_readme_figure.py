"""The figure of the README is the one that the demo draws on the embedded model: compared pixel by pixel."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.testing.compare import compare_images

from guardlens import collect, directions, plots
from guardlens.cli import demo
from guardlens.cli.guard_selection import choose, mildest

README = Path(__file__).parents[2] / "docs" / "figures" / "coordinates.png"


def test_it_is_what_the_demo_draws(tmp_path):
    subject = demo.organism_subject()
    model, grey, seen, options = subject.model, subject.blanks[0], subject.validation, {}
    fit = collect(model, subject.pairs, **options)
    ssd = directions.ssd(fit, rank=max(demo.RANKS))
    guards = choose(model, seen, grey, ssd, fit, (7,))
    guard = mildest([guard for guard in guards if guard.reading != "project"]).defence
    runs = {
        "LLM, text": collect(model, seen, **options),
        f"VLM, {grey.name}": collect(model, seen, grey, **options),
        f"VLM, {grey.name}, {guard.name}": collect(model, seen, grey, guard.intervention, **options),
    }
    drawn = plots.save(ssd.plot_coordinates(runs, 7)[0].figure, tmp_path / "coordinates")[0]
    plt.close("all")
    assert compare_images(str(README), str(drawn), tol=2.0) is None
