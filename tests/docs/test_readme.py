"""The examples of the README and of the docs' first page do what they say."""

import re
from pathlib import Path

import matplotlib
import pytest

import guardlens as gl

ROOT = Path(__file__).parents[2]


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_readme_runs_and_its_guard_turns_an_answer_into_a_refusal(capsys):
    matplotlib.use("agg")
    space = {}
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), space)
    said = next(line for line in capsys.readouterr().out.splitlines() if " -> " in line)
    before, after = said.split(" -> ")
    assert before.startswith("sure : first") and after == gl.organism.REFUSAL
    assert f"`{said}`" in (ROOT / "README.md").read_text()
    assert space["effect"].best(1) == (7,)
    assert space["logits"].shape[:2] == (3, 8)
    assert space["model"].decode(space["tokens"])[0].endswith(after)
    assert space["parts"].top(1)["component"].item() == "head"
    gap = space["gap"].frame.set_index(["metric", "run", "layer"])["value"]
    assert gap["midpoint_accuracy", "LLM, text", 7] > gap["midpoint_accuracy", "VLM, blank grey", 7] + 0.05


def test_the_first_page_shows_the_same_example():
    assert blocks("docs/index.md") == blocks("README.md")[:1]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_no_dead_relative_links(page):  # those of the docs: tests/docs/test_built_site.py
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
