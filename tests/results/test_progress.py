"""Bars, read from what the streams and a notebook got."""

import sys
from types import SimpleNamespace

import pytest

from guardlens.results import progress


class Display:
    """What a notebook would show: the newest object of each cell output."""

    def __init__(self):
        self.shown, self.updates = [], 0

    def __call__(self, value, display_id=False):
        self.shown.append(value)
        return SimpleNamespace(update=self._update)

    def _update(self, value):
        self.shown[-1], self.updates = value, self.updates + 1


@pytest.fixture
def notebook(monkeypatch):
    display = Display()
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return display


@pytest.fixture
def bars():
    with progress.progress_bars(True):
        yield


def test_without_a_bar_nothing_is_written_anywhere(notebook, capsys):
    parts = [[1, 2], [3]]
    assert list(progress.track(parts, 3, "sweep")) == parts
    assert capsys.readouterr() == ("", "") and not notebook.shown


def test_there_is_no_bar_where_nothing_is_left_to_do(notebook, capsys, bars):
    assert list(progress.track(iter(()), 0, "collect")) == []
    assert capsys.readouterr() == ("", "") and not notebook.shown


def test_a_terminal_gets_its_bar_on_stderr(capsys, monkeypatch, bars):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert list(progress.track([[1, 2], [3]], 3, "sweep [bold]")) == [[1, 2], [3]]
    out, err = capsys.readouterr()
    assert out == "" and "sweep [bold]" in err and "3/3" in err


def test_bars_are_as_before_behind_a_with(capsys):
    with progress.progress_bars(True), progress.progress_bars(False):
        assert list(progress.track([[1]], 1, "sweep")) == [[1]]
    assert capsys.readouterr() == ("", "")
    with progress.progress_bars(True):
        with pytest.raises(ValueError), progress.progress_bars(False):
            raise ValueError
        assert list(progress.track([[1]], 1, "sweep")) == [[1]]
    assert "1/1" in capsys.readouterr().err


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not progress._in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not progress._in_notebook()


def test_a_notebook_gets_one_bar_that_moves(notebook, capsys, bars):
    seen = []
    for _ in progress.track([[1, 2], [3], [4]], 4, "keep <grey>"):
        seen.append(notebook.shown[-1].done)
    assert seen == [0, 2, 3] and notebook.updates == 3 and len(notebook.shown) == 1
    (bar,) = notebook.shown
    assert repr(bar) == "keep <grey> 4/4"
    assert bar._repr_html_() == ('<div><progress value="4" max="4" style="vertical-align: middle"></progress> keep &lt;grey&gt; 4/4</div>')
    assert capsys.readouterr() == ("", "")


def test_a_moment_of_the_bar_says_what_is_left():
    assert repr(progress.Bar("sweep", 1, 4, left=7.6)) == "sweep 1/4, 8 s left"
    assert repr(progress.Bar("sweep", 0, 4)) == "sweep 0/4"


def test_a_real_kernel_shows_bars_and_writes_nothing_else():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = (
        "import sys; sys.modules['ipywidgets'] = None  # a kernel without widgets",
        "import guardlens as gl\nmodel, pairs = gl.load('organism'), gl.organism.pairs()",
        "shown = gl.collect(model, pairs)",
        "with gl.progress_bars(False):\n    silent = gl.collect(model, pairs)",
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    outputs = [cell["outputs"] for cell in book.cells]
    assert outputs[0] == outputs[1] == outputs[3] == []
    (bar,) = outputs[2]
    assert bar["output_type"] == "display_data" and bar["data"]["text/plain"] == "collect, text 200/200"
    assert '<progress value="200" max="200"' in bar["data"]["text/html"]
