"""Every family of transformers that guardlens is proven on: a tiny random model and a real processor, both built from configs.

To add one, write a `Family` in the module that it is most like; every test in `test_families.py` then runs on it.
"""

from tests.zoo import gemma, llava, qwen, text
from tests.zoo.family import Family

FAMILIES: tuple[Family, ...] = (*llava.FAMILIES, *qwen.FAMILIES, *gemma.FAMILIES, *text.FAMILIES)
