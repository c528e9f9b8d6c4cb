"""What makes pages of the tutorials: a small one is executed, written, skipped and refused as it should be."""

import re
from base64 import b64decode
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
from nbclient.exceptions import CellExecutionError
from PIL import Image

from analyses.tutorials import notebooks
from analyses.tutorials.__main__ import SCRIPTS, found, main
from analyses.tutorials.notebooks import TutorialError, fingerprint
from analyses.tutorials.pages import OPENING, TITLE

ROOT = Path(__file__).parents[2]
OPENS = "# %% [markdown]\n# # Two figures\n#\n# ![what it ends in](1_two/end.png)\n"
DRAWS = """
# %%
from pathlib import Path

import pandas as pd

from guardlens import plots

with Path({log!r}).open("a") as log:
    log.write("ran ")
values = {{"layer": [0, 1], "value": [0.6, 0.9], "low": [0.5, 0.8], "high": [0.7, 1.0]}}
frame = pd.DataFrame({{"metric": "auroc", "run": "a", "n": 36, **values}})
print("<b>" + "first" * 2)
plots.layer_curves(frame)

# %% [markdown]
# ## The second

# %%
frame[["layer", "value"]]

# %%
axes = plots.layer_curves(frame[frame["layer"] == 1])
"""


def script(folder: Path, *parts: str) -> Path:
    path = folder / "1_two.py"
    path.write_text("".join(parts))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder of scripts, a folder of pages made of them, and a file that says how often the script ran."""
    folder = tmp_path_factory.mktemp("tutorials")
    log = folder / "log"
    script(folder, OPENS, DRAWS.format(log=str(log)))
    main(folder / "out", scripts=folder)
    return folder, folder / "out", log


def test_the_page_shows_code_outputs_and_figures(built):
    _, out, _ = built
    page = (out / "1_two.md").read_text()
    assert page.startswith('# Two figures\n\n[Download as a notebook](1_two.ipynb){ download="1_two.ipynb" }\n')
    assert "```python\nfrom pathlib import Path" in page and "{ .text .output .no-copy }\n<b>firstfirst\n```" in page
    assert '<div class="output">\n<div>\n<table>' in page and "<style" not in page and "<Axes" not in page
    pictures = re.findall(r"!\[(.*)\]\((.*)\)", page)
    assert [caption for caption, _ in pictures] == ["what it ends in", "Figure: Two figures", "what it ends in"]
    assert all((out / name).exists() for _, name in pictures)


def test_figures_are_sharp_and_the_last_one_opens_the_page(built):
    _, out, _ = built
    opening, *figures = (out / name for name in re.findall(r"!\[.*\]\((.*)\)", (out / "1_two.md").read_text()))
    assert opening.name == "end.png" and opening.read_bytes() == figures[-1].read_bytes() != figures[0].read_bytes()
    with Image.open(opening) as picture:
        assert picture.format == "PNG" and picture.width > 1000  # 6.4 inches at twice 100 dots, less the trimmed margin
        assert f'width="{picture.width // 2}"' in (out / "1_two.md").read_text()


def test_the_notebook_stands_alone(built):
    _, out, _ = built
    notebook = nbformat.read(out / "1_two.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert "(attachment:end.png)" in notebook.cells[0].source
    assert b64decode(notebook.cells[0].attachments["end.png"]["image/png"]) == (out / "1_two/end.png").read_bytes()
    assert notebook.metadata.kernelspec.name == "python3"


def test_what_has_not_changed_is_not_executed_again(built, capsys):
    folder, out, log = built
    runs = log.read_text()
    main(out, scripts=folder)
    assert capsys.readouterr().out == "1_two: unchanged\n" and log.read_text() == runs
    source = (folder / "1_two.py").read_text()
    script(folder, source, "\n# more\n")
    main(out, scripts=folder)
    assert log.read_text() == runs + "ran "


def test_a_changed_package_makes_every_tutorial_new(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "PACKAGE", tmp_path)
    module = tmp_path / "module.py"
    module.write_text("x = 1\n")
    before = fingerprint(SCRIPTS / "9_gallery.py")
    module.write_text("x = 2\n")
    assert fingerprint(SCRIPTS / "9_gallery.py") != before != fingerprint(SCRIPTS / "__main__.py")


@pytest.mark.parametrize(
    ("cell", "error", "says"),
    [
        ("1 / 0", CellExecutionError, "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('beware')", TutorialError, "UserWarning: beware"),
        ("print('no figure')", TutorialError, "draws no figure"),
    ],
)
def test_a_tutorial_that_fails_warns_or_draws_nothing_is_refused(tmp_path, cell, error, says):
    script(tmp_path, OPENS, "\n# %%\n", cell)
    with pytest.raises(error, match=says):
        main(tmp_path / "out", scripts=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_tutorial_without_its_opening_picture_is_refused(tmp_path):
    script(tmp_path, "# %% [markdown]\n# # Title only\n\n# %%\n1\n")
    with pytest.raises(TutorialError, match=r"write `# # Title` first, and then `# !\[caption\]\(1_two/end.png\)`"):
        main(tmp_path / "out", scripts=tmp_path)


@pytest.mark.parametrize("path", found(SCRIPTS, None), ids=lambda path: path.stem)
def test_every_tutorial_opens_with_its_figure_and_is_listed(path):
    first = jupytext.read(path, fmt="py:percent").cells[0]
    picture = OPENING.search(first.source)
    assert first.cell_type == "markdown" and TITLE.match(first.source)
    assert picture and picture["caption"] and picture["target"] == f"{path.stem}/end.png"
    assert f"({path.stem}.md)" in (ROOT / "docs/tutorials/index.md").read_text()
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert f"tutorials/{path.stem}.md" in str(nav)
