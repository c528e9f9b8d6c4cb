"""Every family of transformers that guardlens is proven on: a tiny random model and a real processor, both built from configs.

To add one, write a `Family` in the module that it is most like; every test in `test_families.py` then runs on it.
"""

from itertools import chain

from tests.zoo import gemma, glm, idefics, llava, molmo, native, omni, others, qwen, readers, text
from tests.zoo.family import Family

ALL: tuple[Family, ...] = tuple(
    chain.from_iterable(module.FAMILIES for module in (llava, qwen, glm, native, omni, molmo, gemma, idefics, others, readers, text))
)
FAMILIES = tuple(family for family in ALL if not family.refused)
REFUSED = tuple(family for family in ALL if family.refused)
