"""The residual stream as the sum that it is: what embedding, heads, MLPs and the rest add to its coordinates, and from which tokens.

Every function here looks at the last token of the prompt alone. Heads are linear in z, up to the norm that some families put between the
output projection and the stream; see `guardlens.experiments.attribution` for the formula.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guardlens.errors import ModelError, NumericsError
from guardlens.hooks import Point, Site
from guardlens.models.architectures import Architecture, families
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.kv_cache import Prefix
from guardlens.models.hooked_model import HookedModel

NONE = -1
"""In the columns `block` and `head`: it has none."""

TERMS = ("resid_pre", "z", "attn_out", "mlp_out", "resid_post")
"""What is read of every block."""


class Component(NamedTuple):
    """One term of the sum.

    Attributes:
        component: `"embed"`, `"head"`, `"attn_rest"`, `"mlp"`, `"rest"` or `"between"`.
        block: The block; -1 for the embedding.
        head: The head; -1 for all else.
        source: Of the values that a head mixes: those of `"image"` tokens, of `"text"` tokens, or of `"all"`.
    """

    component: str
    block: int = NONE
    head: int = NONE
    source: str = "all"


Terms = dict[Component, Float[Tensor, "query rank"]]


def split(
    model: HookedModel, batch: Batch, layer: int, vectors: Float[Tensor, "rank d_model"], by_source: bool, prefix: Prefix | None = None
) -> Terms:
    """The coordinate of each query along each vector, term by term; checked against the sum.

    Args:
        model: The model.
        batch: The prompts.
        layer: After whose block.
        vectors: What to take coordinates along.
        by_source: Split each head by the tokens whose values it mixes.
        prefix: What the prompts begin with alike, computed.
    """
    sites = {Point(hook, block): Site(hook, (block,)) for block in range(layer + 1) for hook in TERMS}
    computed = set(model.cfg.computed(batch.beside_image))
    sites = {point: site for point, site in sites.items() if point in computed or point.hook.startswith("resid")}
    reads = model.run(batch, read=list(sites.values()), logits=None, prefix=prefix).reads
    states = {point: reads[site][0, :, 0] for point, site in sites.items()}
    images = _image_shares(model, batch, states) if by_source else {}

    def along(state: Tensor) -> Tensor:
        return state.double() @ vectors.to(state.device).T

    terms: Terms = {Component("embed"): along(states[Point("resid_pre", 0)])}
    for block in range(layer + 1):
        terms |= _block_terms(model, block, states, images, along)
    coordinate = along(states[Point("resid_post", layer)])
    error = (sum(terms.values()) - coordinate).abs().amax() / coordinate.abs().amax().clamp_min(1e-12)
    if not error < 1e-4:
        raise NumericsError(
            f"parts that miss the coordinate by {float(error):.0e} of the largest", "their exact sum", "report this: it is a bug"
        )
    return dict(zip(terms, torch.stack([*terms.values()]).cpu(), strict=True))  # one copy from a GPU, not one per term


def _block_terms(
    model: HookedModel,
    block: int,
    states: Mapping[Point, Tensor],
    images: Mapping[int, Float[Tensor, "query head d"]],
    along: Callable[[Tensor], Tensor],
) -> Terms:
    """What one block adds, and what is added after it."""
    at = lambda hook, number=block: states.get(Point(hook, number))  # noqa: E731
    terms: Terms = {}
    if (attention := at("attn_out")) is not None:
        if (z := at("z")) is not None:
            terms |= _head_terms(model, block, z, images.get(block), along)
        terms[Component("attn_rest", block)] = _factor(model, block, "attn_out") * along(attention) - sum(terms.values())
    if (mlp := at("mlp_out")) is not None:
        terms[Component("mlp", block)] = _factor(model, block, "mlp_out") * along(mlp)
    before, after, following = states[Point("resid_pre", block)], states[Point("resid_post", block)], at("resid_pre", block + 1)
    terms[Component("rest", block)] = along(after) - along(before) - sum(terms.values())
    if following is not None:
        terms[Component("between", block)] = along(following) - along(after)
    return terms


def _head_terms(
    model: HookedModel,
    block: int,
    z: Float[Tensor, "query width"],
    image: Float[Tensor, "query head d"] | None,
    along: Callable[[Tensor], Tensor],
) -> Terms:
    part = model.cfg.parts[Point("z", block)]
    heads, out = part.split(z), model.hf.get_submodule(part.path)
    shares = {"all": heads} if image is None else {"image": image, "text": heads - image}
    gain = _factor(model, block, "attn_out") * _frozen_norm(model, block, _applied(out, z))
    terms: Terms = {}
    for source, share in shares.items():
        written = along(_written(out, share) * gain[:, None])
        terms |= {Component("head", block, head, source): written[:, head] for head in range(written.shape[1])}
    return terms


def _factor(model: HookedModel, block: int, hook: str) -> float:
    """What the model multiplies attention or MLP by before it adds them: a number of the family's, a gate of the block's."""
    gate = getattr(model.hf.get_submodule(model.cfg.blocks[block]), families.GATES[hook], None)
    return model.cfg.residual_scale * (1.0 if gate is None else float(gate.detach().tanh()))


def _written(out: nn.Module, z: Float[Tensor, "query head d"]) -> Float[Tensor, "query head d_model"]:
    """What each head adds through the output projection: its answer to this head alone, less its answer to none (the bias).

    Whatever the module is (linear, GPT-2's, quantised, adapted), its matrix is never touched.
    """
    alone = torch.einsum("qhd,hk->qhkd", z, torch.eye(z.shape[1], dtype=z.dtype, device=z.device)).flatten(2)
    return _applied(out, alone) - _applied(out, torch.zeros_like(alone[:1, :1]))


def _frozen_norm(model: HookedModel, block: int, joined: Float[Tensor, "query d_model"]) -> Float[Tensor, "query d_model"]:
    """What the norm between attention and stream multiplies each number by, given the state that it meets; ones where there is no norm."""
    attention, heads = (f"{model.cfg.parts[Point(hook, block)].path}." for hook in ("attn_out", "z"))
    if heads.startswith(attention):
        return torch.ones_like(joined)
    norm = model.hf.get_submodule(attention[:-1])
    gain = _applied(norm, torch.full_like(joined[:1], 100.0))  # large, so that the norm's epsilon does not show
    normed, gained = _applied(norm, joined), joined * gain
    return gain * (normed * gained).sum(-1, keepdim=True) / gained.square().sum(-1, keepdim=True).clamp_min(1e-30)


def _applied(module: nn.Module, states: Tensor) -> Tensor:
    """A module's answer, on the states' own device: the blocks of a large model may lie on several."""
    home = next((parameter.device for parameter in module.parameters()), states.device)
    with torch.no_grad():
        return module(states.to(home)).to(states.device)


def _image_shares(model: HookedModel, batch: Batch, states: Mapping[Point, Tensor]) -> dict[int, Float[Tensor, "query head d"]]:
    """The part of each head's z that comes from image tokens, by block: the last query's pattern times their values.

    Raises:
        SiteError: The model computes no patterns.
        ModelError: Pattern times values is not z.
    """
    cfg, kept = model.cfg, _Weighing(batch)
    blocks = {point.layer: z for point, z in states.items() if point.hook == "z" and point.layer is not None}
    weighed = [block for block in blocks if block not in cfg.image_layers]
    lacking = next((block for block in weighed if not {Point("v", block), Point("pattern", block)} <= set(cfg.parts)), None)
    if lacking is not None:
        raise ModelError(f"block {lacking} without values and pattern of its own", *_UNSPLIT)
    names = {Point(hook, block).name for hook in ("v", "pattern") for block in weighed}
    if names:
        model.run_with_hooks(batch, fwd_hooks=[(lambda name: name in names, kept)])
    return {block: _checked(cfg, block, z, kept) for block, z in blocks.items()}


class _Weighing:
    """A hook function that weighs the values of a block with its pattern as soon as it has both, for the last token alone."""

    def __init__(self, batch: Batch) -> None:
        self.last, self.image = batch.select("last").long().argmax(1), batch.image
        self.values: dict[int, Tensor] = {}
        self.whole: dict[int, Tensor] = {}
        self.of_image: dict[int, Tensor] = {}

    def __call__(self, value: Tensor, hook: Any) -> None:
        block = hook.layer()
        if hook.name.endswith("hook_v"):
            self.values[block] = value
            return
        row = value[torch.arange(len(value), device=value.device), :, self.last.to(value.device)]
        values = self.values.pop(block)
        values = values.repeat_interleave(row.shape[1] // values.shape[2], dim=2)
        for kept, weights in ((self.whole, row), (self.of_image, row * self.image[:, None].to(row))):
            kept[block] = torch.einsum("qhk,qkhd->qhd", weights.to(values), values).to(self.image.device)


def _checked(cfg: Architecture, block: int, z: Float[Tensor, "query width"], kept: _Weighing) -> Float[Tensor, "query head d"]:
    heads = cfg.parts[Point("z", block)].split(z)
    if block in cfg.image_layers:
        return heads  # cross-attention: there is nothing but the image to look at
    whole = kept.whole[block]
    error = (whole - heads).abs().amax() / heads.abs().amax() if whole.shape == heads.shape else torch.tensor(torch.inf)
    if not error < max(1e-4, 8 * torch.finfo(z.dtype).eps):
        raise ModelError(f"heads in block {block} that differ from pattern times values by {float(error):.0e} of the largest", *_UNSPLIT)
    return kept.of_image[block]


_UNSPLIT = (
    "heads that mix the values at the hook v, so that their parts can be told apart by source",
    "leave by_source out: this family shares, norms, clips or gates the values after that hook",
)
