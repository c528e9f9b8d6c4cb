"""The docs' table of families: what `tests/models/architectures/test_families.py` checks of each.

`python -m tests.zoo.table` writes docs/families.md anew.
"""

from pathlib import Path

import transformers

from tests.zoo import ALL
from tests.zoo.family import Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

CAPABILITIES = {
    "text alone": "prompts without an image, so that the model has a text twin of its own",
    "several images": "several images in a prompt",
    "system prompt": "a system prompt, as far as the chat template has a place for it",
    "prefill": "words that the answer begins with",
    "attention heads": "`hook_q`, `hook_z` and `hook_pattern` of every layer with softmax attention",
    "keys and values": "`hook_k` and `hook_v`",
    "values as mixed": "`hook_pattern` times `hook_v` is `hook_z`, so that attribution can split heads by source",
    "generation without a cache": "the same tokens with `use_cache=False`",
    "branches": "interventions for the ends of the prompts ride in one forward (`Run.layout`), exact to 1e-5; elsewhere as tiles",
    "forks": "interventions that can't go on from the unedited run at the first block that they touch, exact to 1e-5",
    "answers": "answers are generated behind kept prompts",
    "forced answers": "an answer of yours can be scored token by token (`Prefill.answering`)",
    "projector": "one module whose output enters the language model, at `projector.hook_out`",
    "processor": "`gl.load` of a saved directory finds the processor without torchvision",
}
"""What a family may lack. Everything else in `tests/models/architectures/test_families.py` holds for every family that is not refused."""

INTRODUCTION = """\
# Families

`gl.load` takes any model of transformers: one generic rule finds the parts, and what is particular to a family is data, in
`guardlens/architectures/names.py`. The families below are those of the tests, each a tiny random model built from its config with the
family's own processor class. (Parts of some processors and vision encoders stand in for what needs torchvision or timm; `tests/zoo` says
where.) What was tried at real sizes and on real weights is [another table](tried-on.md), and `guardlens check MODEL` says what holds for
yours.

A family that is not in the table is checked when it is loaded. `gl.load` refuses, and says what failed, unless the residual stream that
was found gives the model's own logits through final norm and unembedding, states are the same alone and in a padded batch, edits do what
PyTorch hooks do, and image positions are those that another image changes.

Of every family in the table the tests check that

- a plain run is bit-identical to transformers, and reads and edits equal raw PyTorch hooks on the Hugging Face modules;
- generation under edits gives the tokens that raw hooks give: in the prefill, in the decode steps and in both, greedy and sampled;
- embedding, attention and MLPs add up to the residual stream, and the logit lens ends in the logits;
- the states of a query are the same alone and in any batch, in any order, with either padding (float32, 1e-4); in families with
  cross-attention (Llama 3.2 Vision) a batch holds prompts of one number of images, others are refused, and `collect`, `keep`, `sweep` and
  `evaluate` part them;
- image positions are those, and only those, that another image changes, and instruction positions decode to the query's text;
- the text twin is the prompt without its image;
- a guard that `gl.attach` puts on the bare model gives `HookedModel`'s tokens;
- what `gl.attribute` splits sums to what raw hooks see;
- a saved model loads again with the same numbers.

What "image" means: the tokens of the prompt that the image's features replace, separators between rows and tiles included. In families with
cross-attention (Llama 3.2 Vision) nothing is replaced. There the image token only marks a place, `image` means that token, and what the
image does enters the residual stream in the cross-attention blocks, at every token after it. Without an image these blocks don't run, and
their `resid_post` is the stream that passes them unchanged.

A dash says that the family lacks something; the last column says why.
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
