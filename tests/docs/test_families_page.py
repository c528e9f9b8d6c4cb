"""The docs' table of families says what the tests check, and nothing else."""

from pathlib import Path

from guardlens.models.architectures import families as names
from tests.zoo import ALL, FAMILIES
from tests.zoo.table import CAPABILITIES, PAGE, render


def test_the_page_is_the_one_that_the_zoo_makes():
    assert PAGE.read_text(encoding="utf-8") == render(), "run `python -m tests.zoo.table` and commit docs/families.md"


def test_what_a_family_lacks_is_a_column_with_a_reason():
    for family in ALL:
        assert {name for name, _ in family.unsupported} <= set(CAPABILITIES), family.name
        assert all(why for _, why in family.unsupported)


def test_names_are_unique_and_every_proven_type_has_a_model():
    assert len({family.name for family in ALL}) == len(ALL)
    configs = [family.model().config for family in ALL if not family.refused]
    types = {config.model_type for config in configs} | {config.get_text_config(decoder=True).model_type for config in configs}
    assert types == names.PROVEN


def test_the_readme_counts_them():
    vlms = sum(family.vision is not None for family in FAMILIES)
    assert f"[{vlms} families of VLMs and {len(FAMILIES) - vlms} of LLMs]" in (Path(__file__).parents[2] / "README.md").read_text()
