"""The family that the how-to adds as an example passes every test that the families of the zoo pass."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

import guardlens as gl
from guardlens.models.architectures import families as names
from tests.models.architectures import test_families
from tests.zoo import ALL

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "family.md").read_text()

PARTS = {"family", "model"}
TESTS = [fn for name, fn in vars(test_families).items() if name.startswith("test_") and set(inspect.signature(fn).parameters) == PARTS]


@pytest.fixture(scope="module")
def family():
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "COSMOS" in code)
    space = {}
    exec(compile(textwrap.dedent(block), "family.md", "exec"), space)
    return space["COSMOS"]


@pytest.fixture(scope="module")
def model(family):
    types = ("cosmos3_edge", "cosmos3_edge_text")
    assert all(f"`{name}`" in PAGE for name in types)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "PROVEN", names.PROVEN | set(types))
        loaded = gl.load(family.model(), processor=family.processor())
        assert loaded.cfg.proven
        return loaded


def test_it_is_not_in_the_zoo(family):
    assert family.name not in {known.name for known in ALL}


@pytest.mark.parametrize("test", TESTS, ids=lambda fn: fn.__name__)
def test_it_passes(test, family, model):
    test(family, model)


def test_edits_reads_and_generation(family, model):
    for positions in ("last", "image", "instruction"):
        test_families.test_reads_equal_raw_hooks(family, model, positions)
    for phase in ("prefill", "decode", "always"):
        test_families.test_generation_equals_raw_hooks(family, model, phase)
        test_families.test_generation_without_a_cache_gives_the_same_tokens(family, model, phase)
    test_families.test_edits_equal_raw_hooks(family, model, "image")
