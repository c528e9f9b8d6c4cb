"""From a percent script to an executed notebook: nothing in it may fail or warn."""

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

import guardlens
from guardlens.errors import GuardlensError

PACKAGE = Path(guardlens.__file__).parent
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
SHARP = ["--InlineBackend.figure_formats=retina"]  # two pixels per point, so that figures stay sharp on fine screens
WIDGET = "application/vnd.jupyter.widget-view+json"
AXES = re.compile(r"^(<Axes|<Figure|array\(\[+<Axes|\[<matplotlib)")


class TutorialError(GuardlensError):
    """A tutorial does not do what a page needs."""


def executed(script: Path, seconds: int = 600) -> NotebookNode:
    """The notebook of a script, with its outputs, from a fresh kernel of this interpreter in an empty folder.

    Args:
        script: In jupytext's percent format.
        seconds: How long one cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed; the message has its traceback.
        TutorialError: Something was written to stderr, as warnings are.
    """
    notebook = jupytext.read(script, fmt="py:percent")
    own = KernelSpecManager(kernel_dirs=[])  # knows no kernel but that of this interpreter
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets:
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own, transport="ipc", ip=f"{sockets}/kernel")
        client = NotebookClient(notebook, km=manager, timeout=seconds, coalesce_streams=True, record_timing=False, extra_arguments=SHARP)
        client.execute(env=os.environ | ENVIRONMENT | {"IPYTHONDIR": sockets}, cwd=folder, cleanup_kc=True)
    for cell, output in outputs(notebook):
        if output.output_type == "stream" and output.name == "stderr":
            raise TutorialError(
                f"{script.name} wrote to stderr: {output.text.strip()!r}, from the cell\n{cell.source}",
                "no warnings",
                "mend the cause; a reader would see it too",
            )
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not empty_on_paper(output)]
    notebook.metadata = NotebookNode(
        kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"},
        language_info={"name": "python"},
        seconds=time.monotonic() - began,
    )
    return notebook


def outputs(notebook: NotebookNode) -> Iterator[tuple[Any, Any]]:
    """Every output of every cell, with its cell."""
    return ((cell, output) for cell in notebook.cells for output in cell.get("outputs", []))


def empty_on_paper(output: Any) -> bool:
    """Whether an output says nothing on a page: a widget (tqdm's bar), or the name of matplotlib's object beside the figure."""
    data = output.get("data", {})
    return WIDGET in data or (list(data) == ["text/plain"] and bool(AXES.match(data["text/plain"])))


def fingerprint(script: Path) -> str:
    """Hash of all that an output depends on: the script, the package with its organism, this folder, and the pinned versions."""
    own = Path(__file__).parent
    sources = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    makers = [own / "notebooks.py", own / "pages.py", own / "page.md.j2", own.parents[1] / "constraints.txt"]
    digest = hashlib.sha256()
    for path in [script, *sorted(sources), *makers]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
