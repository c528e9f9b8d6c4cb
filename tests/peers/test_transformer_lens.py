"""guardlens against TransformerLens 4.3's bridge: the same tiny models, the same hook names, the same numbers. `make peers` runs it.

Every family of the zoo that the bridge has an adapter for is compared, in float32, at the tokens that are not padding, to 3e-6 of the
largest number: all that the language model has. (The eye is named otherwise there.) Where the bridge means something else by a name, the
tables `TRANSLATED`, `REGROUPED` and `UNSCALED` say what and why; what it can't do is in `UNKNOWN`, `FAILS` and `ABSENT`, what guardlens
can't do in `LACKING`. An entry that is no longer true is red.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

import guardlens as gl
from guardlens import presentations
from guardlens.data.presentations import text_only
from guardlens.hooks import HOOKS, VISION, Point
from guardlens.models.engine.batch import Batch
from guardlens.models.hooked_model import HookedModel
from tests.zoo import FAMILIES
from tests.zoo.family import TEXTS, Family

pytestmark = pytest.mark.peers

TOLERANCE = 3e-6
Translation = Callable[[HookedModel, Tensor], Tensor]


def times(setting: str) -> Translation:
    """Multiplied by a number of the config."""
    return lambda model, mine: mine * getattr(model.hf.config, setting)


def normed(model: HookedModel, mine: Tensor) -> Tensor:
    with torch.no_grad():
        return model.hf.transformer.word_embeddings_layernorm(mine)


LATENT = ("DeepSeek-V2 Lite", "DeepSeek-V3")
TURNED = "TransformerLens's is after the rotation, heads before tokens; compared is the part of each head that is not rotated"
SCALED = "TransformerLens counts residual_multiplier to what is added; guardlens has it as cfg.residual_scale"
TRANSLATED: dict[tuple[str, str], tuple[str, Translation]] = {
    ("Granite", "embed"): (
        "TransformerLens's is multiplied by embedding_multiplier, as the first block has it",
        times("embedding_multiplier"),
    ),
    ("Granite", "attn_out"): (SCALED, times("residual_multiplier")),
    ("Granite", "mlp_out"): (SCALED, times("residual_multiplier")),
    ("BLOOM", "embed"): ("TransformerLens's is after the norm of the embeddings", normed),
    **{(name, "q"): (TURNED, lambda model, mine: mine[..., :8]) for name in LATENT},
}
"""(family, hook) -> why the two differ, and guardlens's value in TransformerLens's terms."""

GATED = "TransformerLens's q has each query's output gate as a further head behind it"
WIDTH = "TransformerLens splits heads by the config's head_dim, which is not the width that this attention's have"
REGROUPED: dict[tuple[str, str], tuple[str, Callable[[Tensor], Tensor]]] = {
    ("Qwen3.5", "q"): (GATED, lambda theirs: theirs[:, :, ::2]),
    ("Qwen3.5 MoE", "q"): (GATED, lambda theirs: theirs[:, :, ::2]),
    **{(name, "q"): (TURNED, lambda theirs: theirs.transpose(1, 2)[..., :8]) for name in LATENT},
    **{
        key: (WIDTH, lambda theirs: theirs.flatten(2).unflatten(2, (-1, 8)))
        for key in (*(("GLM-4.1V", hook) for hook in "qkvz"), *((name, "z") for name in LATENT))
    },
}
"""(family, hook) -> how TransformerLens's heads are others, and its value in guardlens's heads."""

UNKNOWN = {
    *("LLaVA-NeXT-Video", "VipLLaVA", "InternVL", "Aya Vision", "Qwen2-VL", "GLM-4.5V", "GLM-4.6V", "GLM-OCR", "Kimi K2.5", "ERNIE 4.5 VL"),
    *("PaddleOCR-VL", "VideoLLaMA 3", "EXAONE 4.5", "MiniCPM-V 4.6", "MiniCPM-V 4.7", "Qwen2.5-Omni", "Qwen3-Omni", "Molmo 2", "Molmo 2-O"),
    *("PaliGemma 2", "SmolVLM", "Idefics2", "Llama 3.2 Vision", "Ovis2", "DeepSeek-VL", "DeepSeek-VL 7B", "Janus", "LightOnOCR"),
    *("Cohere 2 Vision", "FastVLM", "LFM2-VL", "Granite 4 Vision", "Granite Docling", "Qianfan-OCR", "Aria", "Perception LM"),
    *("HyperCLOVA X Vision V2", "HyperCLOVA X"),
}
"""Families that the bridge has no adapter for."""

FAILS: dict[str, tuple[str, type[Exception], str]] = {
    "Falcon 40B": ("the bridge splits fused projections as if every head had its own key and value", RuntimeError, "split_with_sizes"),
    "Pixtral": ("the bridge takes the eye of every LLaVA for CLIP or SigLIP", AttributeError, "PixtralVisionModel"),
}
"""Family -> why the bridge, which has an adapter for it, does not boot, and with what error."""

BARE = "the bridge wraps Gemma 4's final norm without a hook inside"
LINEAR = "the bridge has no such name in blocks of linear attention"
ABSENT: dict[tuple[str, str], str] = {
    ("Gemma 4", "ln_final_normalized"): BARE,
    ("Gemma 4 MoE", "ln_final_normalized"): BARE,
    ("Qwen3.5", "attn_out"): LINEAR,
    ("Qwen3.5 MoE", "attn_out"): LINEAR,
}
"""(family, hook) -> why the bridge lacks, in some block, a name that guardlens has."""

UNFOLDED = "one matrix unfolds keys and values together, and guardlens has no name for a part of it"
EXPERTS = "a mixture of experts has no one down projection"
OTHERWISE = "the last matrix of the MLP is not called down_proj"
LACKING: dict[tuple[str, str], str] = {
    **{(name, hook): UNFOLDED for name in LATENT for hook in "kv"},
    **{(name, "post"): EXPERTS for name in (*LATENT, "Qwen3-VL MoE", "Qwen3.5 MoE", "Llama 4")},
    **{(name, "post"): OTHERWISE for name in ("Phi", "GPT-2", "GPT-NeoX", "OPT", "Falcon", "GPT-J", "BLOOM", "StarCoder2")},
}
"""(family, hook) -> why guardlens lacks a name that the bridge has."""

UNSCALED = ("Granite Vision",)
"""Families whose multipliers the bridge overlooks, so that the terms of its `decompose_resid` do not add up."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One model in both libraries, and one batch."""

    family: Family
    model: HookedModel
    bridge: Any
    batch: Batch

    @property
    def mask(self) -> Tensor:
        return self.batch.mask

    @property
    def inputs(self) -> dict[str, Any]:
        """The batch as the bridge takes it."""
        return {"input" if name == "input_ids" else name: value for name, value in self.batch.inputs.items()}

    def both(self, hook: str, mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Both values in the same terms."""
        key = (self.family.name, hook)
        mine = TRANSLATED[key][1](self.model, mine) if key in TRANSLATED else mine
        return mine, REGROUPED[key][1](theirs) if key in REGROUPED else theirs


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def batch_of(family: Family, model: HookedModel) -> Batch:
    images = [(picture(row, family.images[row % 2]),) if family.vision else () for row in range(len(TEXTS))]
    shown = [gl.Query(text, images=images[row]) for row, text in enumerate(TEXTS)]
    return model.batch(shown, presentations.own_images if family.vision else text_only)


@pytest.fixture(scope="session")
def library():
    """TransformerLens, kept from installing torchvision by itself; the tests end with the packages they began with."""
    before = packages()
    try:
        version = metadata.version("transformer-lens")
    except metadata.PackageNotFoundError:
        pytest.exit("TransformerLens is not installed: run `make peers`, which installs the group `peers` of pyproject.toml", 1)
    assert version.startswith("4.3."), f"these tests are about TransformerLens 4.3, and {version} is installed"
    module = importlib.import_module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module("transformer_lens.model_bridge.sources.transformers.helpers"), "_ensure_torchvision", lambda: False)
        # Some adapters ask for torchvision or timm; it is the processor or the real vision tower that needs them, and the zoo has neither.
        adapter = module("transformer_lens.model_bridge.architecture_adapter").ArchitectureAdapter
        patch.setattr(adapter, "_check_required_libraries", lambda self: None)
        # In a VLM the bridge counts positions from the first real token, transformers from the first column. Rotary positions are the same
        # either way but for rounding, which Gemma 4 makes a hundredfold of; both sides take those of transformers.
        bridge = module("transformer_lens.model_bridge").TransformerBridge
        patch.setattr(bridge, "_accepts_derived_position_ids", lambda self: False)
        yield module("transformer_lens")
    assert packages() == before


def packages() -> dict[str, str]:
    return {found.name: found.version for found in metadata.distributions()}


def boot(library: Any, family: Family, model: HookedModel, folder: Any) -> Any:
    """The bridge, on its own copy of the model, which it rewrites in place."""
    hf = family.model()
    hf.config.architectures = [type(hf).__name__]
    model.tokenizer.save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    return library.model_bridge.TransformerBridge.boot_transformers("zoo", hf_model=hf, tokenizer=words, device="cpu")


def load(family: Family) -> HookedModel:
    return gl.load(family.model(), processor=family.processor())


def test_the_families_without_an_adapter_are_those_of_the_list(library):
    adapters = library.factories.architecture_adapter_factory.SUPPORTED_ARCHITECTURES
    assert {family.name for family in FAMILIES if type(family.model()).__name__ not in adapters} == UNKNOWN


COMPARED = [family for family in FAMILIES if family.name not in UNKNOWN | set(FAILS)]


@pytest.fixture(scope="module", params=COMPARED, ids=lambda family: family.name)
def pair(request, library, tmp_path_factory):
    model = load(request.param)
    batch = batch_of(request.param, model)
    return Pair(request.param, model, boot(library, request.param, model, tmp_path_factory.mktemp("tokenizer")), batch)


@pytest.fixture(scope="module")
def caches(pair):
    """Logits and cache of each side."""
    with torch.no_grad():
        theirs = pair.bridge.run_with_cache(**pair.inputs)
    return pair.model.run_with_cache(pair.batch), theirs


def close(mine: Tensor, theirs: Tensor, what: str = ""):
    atol = TOLERANCE * max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(mine, theirs, atol=atol, rtol=0, msg=lambda message: f"{what}: {message}")


def real(pair: Pair, hook: str, value: Tensor) -> Tensor:
    """The values at the tokens that are not padding."""
    return value.transpose(1, 2)[pair.mask] if hook == "pattern" else value[pair.mask]


@pytest.mark.parametrize("name", FAILS)
def test_what_does_not_boot(library, name, tmp_path):
    family = next(family for family in FAMILIES if family.name == name)
    model = load(family)
    with pytest.raises(FAILS[name][1], match=FAILS[name][2]):
        boot(library, family, model, tmp_path)


def test_logits(pair, caches):
    (mine, _), (theirs, _) = caches
    close(mine[pair.mask], theirs[pair.mask])


def test_every_hook_that_both_have(pair, caches):
    (_, mine), (_, theirs) = caches
    points = [point for point in pair.model.cfg.computed(pair.batch.beside_image) if HOOKS[point.hook].stage != VISION]
    for point in (point for point in points if point.name in theirs):
        value, other = pair.both(point.hook, mine[point.name], theirs[point.name])
        assert value.shape == other.shape, point.name
        close(real(pair, point.hook, value), real(pair, point.hook, other), point.name)


def test_neither_has_more_hooks_than_the_tables_say(pair, caches):
    (_, mine), (_, theirs) = caches
    layers = range(pair.model.cfg.n_layers)
    named = [(hook.name, Point(hook.name, i).name) for hook in HOOKS.values() for i in (layers if hook.layered else (None,))]
    absent = {hook for hook, name in named if name in mine and name not in theirs and HOOKS[hook].stage != VISION}
    assert absent == {hook for family, hook in ABSENT if family == pair.family.name}
    lacking = {hook for hook, name in named if name in theirs and name not in mine}
    assert lacking == {hook for family, hook in LACKING if family == pair.family.name}


def test_the_tables_are_needed(pair, caches):
    """What is translated really differs."""
    (_, mine), (_, theirs) = caches
    for family, hook in (*TRANSLATED, *REGROUPED):
        if family == pair.family.name:
            name = next(name for name in mine if name.endswith(f"hook_{hook}"))
            assert mine[name].shape != theirs[name].shape or not torch.allclose(mine[name], theirs[name], atol=1e-2), name


@pytest.mark.parametrize("hook", ["resid_pre", "q", "k", "v", "z", "attn_out", "post", "mlp_out", "resid_post"])
def test_the_same_edit_gives_the_same_logits(pair, caches, hook):
    """Gains, one for each number of a vector: such an edit means the same where one side has a multiple of the other's value."""
    ((plain, mine), (_, theirs)), name = caches, Point(hook, 1).name
    if name not in mine or mine[name][0, 0].numel() != theirs[name][0, 0].numel():
        assert name not in theirs or (pair.family.name, hook) in REGROUPED | LACKING
        return
    gains = 2 * torch.rand(mine[name][0, 0].numel(), generator=torch.Generator().manual_seed(4))
    edits = [(name, lambda value, hook: value * gains.view(value.shape[2:]))]
    edited = pair.model.run_with_hooks(pair.batch, fwd_hooks=edits)
    with torch.no_grad():
        expected = pair.bridge.run_with_hooks(**pair.inputs, fwd_hooks=edits)
    close(edited[pair.mask], expected[pair.mask], name)
    assert (edited - plain)[pair.mask].abs().max() > 1e-3


def test_accumulated_resid(pair, caches):
    (_, mine), (_, theirs) = caches
    whole = all(("resid_mid", layer) in mine for layer in range(pair.model.cfg.n_layers))
    for layer, incl_mid in ((None, False), (1, False), *([(None, True)] if whole else [])):
        states, names = mine.accumulated_resid(layer, incl_mid)
        expected, labels = theirs.accumulated_resid(layer, incl_mid, return_labels=True)
        assert names == labels
        for state, other, name in zip(states, expected, names, strict=True):
            close(state[pair.mask], other[pair.mask], name)


def test_decompose_resid(pair, caches):
    """What blocks add is the same; what enters the first block is compared where TransformerLens has it, which is not at images."""
    (_, mine), (_, theirs) = caches
    if (pair.family.name, "attn_out") in ABSENT:
        with pytest.raises(KeyError, match="hook_attn_out"):
            theirs.decompose_resid()
        return
    config = pair.model.hf.config.get_text_config()
    added, entering = (config.residual_multiplier, config.embedding_multiplier) if pair.family.name in UNSCALED else (1, 1)
    terms, expected = terms_of(*mine.decompose_resid()), terms_of(*theirs.decompose_resid(return_labels=True))
    for label in terms.keys() & expected.keys() - {"embed"}:
        close(terms[label][pair.mask], added * expected[label][pair.mask], label)
    assert expected.keys() - terms.keys() <= {"pos_embed"}
    first = entering * expected["embed"] + expected.get("pos_embed", 0)
    words = pair.mask & ~pair.batch.image
    close(terms["embed"][words], first[words], "embed")


def terms_of(stack: Tensor, names: list[str]) -> dict[str, Tensor]:
    return dict(zip(names, stack, strict=True))


def test_logit_lens(pair, caches):
    """TransformerLens looks before every block and at the end, guardlens after every block."""
    (_, mine), (_, theirs) = caches
    lens = theirs.logit_lens()
    assert lens.labels[-1] == "final_post"
    close(mine.logit_lens()[-1], lens.values[-1])
    if "between" not in pair.family.adds:
        close(mine.logit_lens(), lens.values[1:])
