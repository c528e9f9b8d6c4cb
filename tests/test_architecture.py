"""The picture of the floors shows the modules that there are, where the import contract has them."""

import re
from xml.etree import ElementTree

import pytest

from analyses.architecture import FIGURE, FLOORS, ROOT, draw, rows

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def texts():
    """Of each class of text in the picture: (height, words), from the top."""
    found = {}
    for element in ElementTree.parse(FIGURE).iter(f"{SVG}text"):
        found.setdefault(element.get("class"), []).append((float(element.get("y")), element.text))
    return {name: sorted(items) for name, items in found.items()}


def test_it_shows_every_module_of_the_package_once(texts):
    package = ROOT / "guardlens"
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    names = [name for _, name in texts["module"]]
    assert len(names) == len(set(names)) and set(names) == there - {"__init__", "__main__"}


def test_its_rows_are_those_of_the_contract(texts):
    lines = (ROOT / ".importlinter").read_text().split("layers =")[1].split("\n\n")[0].splitlines()
    expected = [set(re.findall(r"\w+", line)) for line in lines if line.strip()]
    heights = sorted({height for height, _ in texts["module"]})
    assert [{name for at, name in texts["module"] if at == height} for height in heights] == expected[1:]  # without __main__


def test_it_is_up_to_date():
    assert FIGURE.read_text() == draw(rows()), "the contract has changed: run `python -m analyses.architecture`"


def test_the_page_has_a_paragraph_for_each_floor(texts):
    page = (ROOT / "docs/explanation/architecture.md").read_text()
    assert re.findall(r"^\*\*([A-Z][a-z ]+)\.\*\*", page, flags=re.MULTILINE) == [floor.name for floor in FLOORS]
    assert [name for _, name in texts["floor"]] == [floor.name for floor in FLOORS]
