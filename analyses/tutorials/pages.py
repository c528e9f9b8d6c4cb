"""From an executed notebook to a page of the docs: `N_slug.md`, figures in `N_slug/`, and `N_slug.ipynb` to download."""

import re
import shutil
from base64 import b64decode
from copy import deepcopy
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

from analyses.tutorials.notebooks import TutorialError, outputs

TEMPLATE = Path(__file__).with_name("page.md.j2")
OPENING = re.compile(r"!\[(?P<caption>[^\]]*)\]\((?P<target>[^)]*/end\.png)\)")
TITLE = re.compile(r"\A# .*\n")


def write(notebook: NotebookNode, out: Path, slug: str, mark: str) -> None:
    """Write the page, its figures and the notebook, and remove what an earlier run left.

    Args:
        notebook: Executed.
        out: Folder of the pages.
        slug: Name of the page, such as `1_modality_gap`.
        mark: Hash that the notebook keeps, for `up_to_date`.

    Raises:
        TutorialError: No figure, or no opening picture, title first.
    """
    caption, end = opening(notebook, slug), last_figure(notebook, slug)
    described(notebook, caption)
    shutil.rmtree(out / slug, ignore_errors=True)
    (out / slug).mkdir(parents=True)
    exporter = MarkdownExporter(raw_template=TEMPLATE.read_text(), filters={"plain_table": plain_table})
    page, resources = exporter.from_notebook_node(deepcopy(notebook), {"unique_key": "figure", "output_files_dir": slug})
    for name, data in resources["outputs"].items():
        (out / name).write_bytes(data)
    (out / slug / "end.png").write_bytes(b64decode(end))
    (out / f"{slug}.md").write_text(TITLE.sub(rf"\g<0>\n{download(slug)}\n", page, count=1), encoding="utf-8")
    nbformat.write(downloadable(notebook, end, mark), out / f"{slug}.ipynb")


def up_to_date(out: Path, slug: str, mark: str) -> bool:
    """Whether the page is there and was made from what `mark` is the hash of."""
    notebook, page = out / f"{slug}.ipynb", out / f"{slug}.md"
    return page.exists() and notebook.exists() and nbformat.read(notebook, as_version=4).metadata.get("made_from") == mark


def download(slug: str) -> str:
    return f'[Download as a notebook]({slug}.ipynb){{ download="{slug}.ipynb" }}'


def opening(notebook: NotebookNode, slug: str) -> str:
    """Caption of the picture in the first cell.

    Raises:
        TutorialError: The first cell is not Markdown with a title and the picture `N_slug/end.png`.
    """
    first = notebook.cells[0]
    picture = OPENING.search(first.source)
    if first.cell_type != "markdown" or not TITLE.match(first.source) or not picture or picture["target"] != f"{slug}/end.png":
        raise TutorialError(
            f"{slug} opens with {first.source[:80]!r}",
            "a Markdown cell with a title and the figure that the tutorial ends in",
            f"write `# # Title` first, and then `# ![caption]({slug}/end.png)`",
        )
    return " ".join(picture["caption"].split())


def last_figure(notebook: NotebookNode, slug: str) -> str:
    """The last figure, PNG in base 64.

    Raises:
        TutorialError: There is none.
    """
    figures = [output.data["image/png"] for _, output in outputs(notebook) if "image/png" in output.get("data", {})]
    if not figures:
        raise TutorialError(
            f"{slug} draws no figure", "one, which the page opens with", "call a result's `plot()` as the last thing in a cell"
        )
    return figures[-1]


def described(notebook: NotebookNode, caption: str) -> None:
    """Give every figure an alternative text: the heading that it stands under, and the last one its caption."""
    heading, last = "", None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.*)$", cell.source, flags=re.MULTILINE) or [heading])[-1]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata["alt"], last = f"Figure: {heading}", output
    if last:
        last.metadata["alt"] = caption


def downloadable(notebook: NotebookNode, end: str, mark: str) -> NotebookNode:
    """The notebook by itself: its opening picture is attached to the first cell."""
    alone = deepcopy(notebook)
    first = alone.cells[0]
    first.source = OPENING.sub(r"![\g<caption>](attachment:end.png)", first.source)
    first["attachments"] = {"end.png": {"image/png": end}}
    alone.metadata["made_from"] = mark
    del alone.metadata["seconds"]
    return alone


def plain_table(markup: str) -> str:
    """A frame of pandas as a bare table, which the site's theme dresses."""
    return re.sub(r"<style.*?</style>\n?", "", markup, flags=re.DOTALL).replace('<table border="1" class="dataframe">', "<table>")
