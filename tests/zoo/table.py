"""The docs' table of families: what `tests/models/architectures/test_families.py` checks of each.

`python -m tests.zoo.table` writes docs/families.md.
"""

from pathlib import Path

import transformers

from tests.zoo import ALL
from tests.zoo.family import Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

CAPABILITIES = {
    "text alone": "prompts without an image work, so the model has a text twin of its own",
    "several images": "a prompt may show several images",
    "system prompt": "system prompts work, if the chat template has a place for them",
    "prefill": "the beginning of the answer can be prescribed",
    "attention heads": "`hook_q`, `hook_z` and `hook_pattern` of every layer with softmax attention",
    "keys and values": "`hook_k` and `hook_v`",
    "values as mixed": "`hook_pattern` times `hook_v` is `hook_z`, so attribution can split heads by source token",
    "generation without a cache": "the same tokens with `use_cache=False`",
    "branches": "interventions on the ends of the prompts share one forward pass (`Run.layout`), exact to 1e-5; otherwise as tiles",
    "forks": "several interventions continue from one unedited run, at the first layer that they touch, exact to 1e-5",
    "answers": "answers are generated from the KV cache of the prompts",
    "forced answers": "a given answer can be scored token by token (`Prefill.answering`)",
    "projector": "the output of one module enters the language model, at `projector.hook_out`",
    "processor": "`gl.load` of a saved directory finds the processor without torchvision",
}
"""Capabilities that a family may lack. Everything else that `test_families.py` checks holds for every family that is not refused."""

INTRODUCTION = """\
# Families

`gl.load` takes any transformers model. One generic rule finds its parts, and everything that is specific to a family is data in
`guardlens/models/architectures/families.py`. The tests cover the families below, each as a tiny random model that is built from its config
and has the family's own processor class. (In some processors and vision encoders, other modules stand in for parts that need torchvision or
timm; `tests/zoo` says where.) [Another table](tried-on.md) lists what was tried at real sizes and with real weights, and `guardlens check
MODEL` tries your model.

A family that is not in the table is checked when it is loaded. `gl.load` refuses the model, and says which check failed, unless

- the residual stream that was found gives the model's own logits through final norm and unembedding,
- hidden states are the same alone and in a padded batch,
- edits do what PyTorch hooks do, and
- another image changes the image positions, and no others.

For every family in the table the tests check that

- a plain run is bit-identical to transformers, and reads and edits equal raw PyTorch hooks on the Hugging Face modules;
- generation under edits gives the tokens that raw hooks give: in the prefill, in the decode steps and in both, greedy and sampled;
- embedding, attention and MLPs add up to the residual stream, and the logit lens ends in the logits;
- the states of a query are the same alone and in any batch, in any order, with either padding side (float32, 1e-4); in families with
  cross-attention (Llama 3.2 Vision) all prompts of a batch must show the same number of images, and `collect`, `keep`, `sweep` and
  `evaluate` form their batches accordingly;
- image positions are those, and only those, that another image changes, and instruction positions decode to the query's text;
- the text twin is the prompt without its image;
- a guard that `gl.attach` puts on the Hugging Face model gives the same tokens as `HookedModel`;
- the terms of `gl.attribute` sum to the values that raw hooks read;
- a saved model loads again with the same numbers.

The image positions are the tokens of the prompt that the image's features replace, including separators between rows and tiles. Families
with cross-attention (Llama 3.2 Vision) replace no token. There, `image` means the token that marks the image's place, and the image enters
the residual stream in the cross-attention layers, at every token after it. Without an image these layers do not run; their `resid_post` is
the residual stream, which passes them unchanged.

A dash means that the family lacks the capability; the last column says why.
"""


def render() -> str:
    """The page."""
    kept = [family for family in ALL if not family.refused]
    parts = [INTRODUCTION, "## Vision-language models\n", *_rows([family for family in kept if family.vision], list(CAPABILITIES))]
    of_text = [name for name in CAPABILITIES if name not in ("text alone", "several images", "projector")]
    parts += ["\n## Language models\n", *_rows([family for family in kept if not family.vision], of_text)]
    parts += ["\n## Refused\n", *(f"- {family.name}: {family.refused}." for family in ALL if family.refused)]
    parts += ["\n## The columns\n", *(f"- *{name}*: {meaning}." for name, meaning in CAPABILITIES.items())]
    return "\n".join([*parts, "", f"Written by `python -m tests.zoo.table` with transformers {transformers.__version__}.", ""])


def _rows(families: list[Family], columns: list[str]) -> list[str]:
    head = ["family", "model type", *columns, "what differs"]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *(_row(family, columns) for family in families))]


def _row(family: Family, columns: list[str]) -> list[str]:
    config = family.model().config
    types = dict.fromkeys((config.model_type, config.get_text_config(decoder=True).model_type))
    added = {"rest": "blocks add more than attention and MLP (`rest`)", "between": "something is added between blocks (`between`)"}
    remarks = [*(f"{name}: {why}" for name, why in family.unsupported), *(added[name] for name in family.adds)]
    lacking = (
        {name for name, _ in family.unsupported}
        | ({"processor"} if not family.reloads else set())
        | ({"projector"} if not family.projector else set())
    )
    signs = ["–" if name in lacking else "✓" for name in columns]
    return [family.name, ", ".join(f"`{name}`" for name in types), *signs, "; ".join(remarks)]


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
