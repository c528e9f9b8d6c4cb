"""The picture of the packages shows the modules that there are, in the order of the import contract."""

import re
from xml.etree import ElementTree

import pytest

from analyses.architecture import FIGURE, LOOKS, ROOT, draw, packages

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def texts():
    """The words of each class of text in the picture, from the top."""
    found = {}
    for element in ElementTree.parse(FIGURE).iter(f"{SVG}text"):
        found.setdefault(element.get("class"), []).append((float(element.get("y")), element.text))
    return {name: [text for _, text in sorted(items)] for name, items in found.items()}


def test_it_shows_every_module(texts):
    package = ROOT / "guardlens"
    there = sorted(path.stem.lstrip("_") for path in package.rglob("*.py") if path.stem not in ("__init__", "__main__"))
    assert sorted(texts["module"]) == there


def test_its_packages_are_those_of_the_contract(texts):
    assert texts["package"] == packages() == list(LOOKS)


def test_it_is_up_to_date():
    assert FIGURE.read_text() == draw(), "a module has moved: run `python -m analyses.architecture`"


def test_the_page_has_a_paragraph_for_each_package():
    page = (ROOT / "docs/explanation/architecture.md").read_text()
    told = [name for heading in re.findall(r"^\*\*(.+?)\.\*\*", page, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", heading)]
    assert told == packages()
