"""The residual stream as a sum: what embedding, heads, MLPs and the rest add to its coordinates, and from which tokens.

Every function here looks at the last token of the prompt alone. Heads are linear in z, up to the norm that some families put between the
output projection and the stream; `guardlens.experiments.attribution` has the formula.
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
from guardlens.models.hooked_model import HookedModel

NONE = -1
"""In the columns `block` and `head`: the component belongs to no block, or is no head."""

TERMS = ("resid_pre", "z", "attn_out", "mlp_out", "resid_post")
"""The hooks that are read at every block."""


class Component(NamedTuple):
    """One term of the sum.

    Attributes:
        component: `"embed"`, `"head"`, `"attn_rest"`, `"mlp"`, `"rest"` or `"between"`.
        block: The number of the transformer block; -1 for the embedding.
        head: The number of the head; -1 for everything else.
        token_source: The tokens whose values a head mixes: `"image"`, `"text"`, or `"all"` of them.
    """

    component: str
    block: int = NONE
    head: int = NONE
    token_source: str = "all"


Terms = dict[Component, Float[Tensor, "query rank"]]


def split(
    model: HookedModel,
    batch: Batch,
    layer: int,
    vectors: Float[Tensor, "rank d_model"],
    by_token_source: bool,
) -> Terms:
    """The coordinate of each query along each vector, term by term.

    Args:
        model: The model.
        batch: The prompts.
        layer: The layer after whose block the coordinate is taken.
        vectors: The vectors to take coordinates along.
        by_token_source: Split each head by the tokens whose values it mixes.

    Raises:
        NumericsError: The terms do not sum to the coordinate.
    """
    computed = set(model.cfg.computed(batch.beside_image))
    sites = {Point(hook, block): Site(hook, (block,)) for block in range(layer + 1) for hook in TERMS}
    sites = {point: site for point, site in sites.items() if point in computed or point.hook.startswith("resid")}
    reads = model.run(batch, read=list(sites.values()), logits=None).reads
    states = {point: reads[site][0, :, 0] for point, site in sites.items()}
    images = _image_shares(model, batch, states) if by_token_source else {}

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
    """The terms that one block adds, and the term that is added behind it."""
    terms: Terms = {}
    attention = states.get(Point("attn_out", block))
    if attention is not None:
        z = states.get(Point("z", block))
        if z is not None:
            terms |= _head_terms(model, block, z, images.get(block), along)
        terms[Component("attn_rest", block)] = _factor(model, block, "attn_out") * along(attention) - sum(terms.values())
    mlp = states.get(Point("mlp_out", block))
    if mlp is not None:
        terms[Component("mlp", block)] = _factor(model, block, "mlp_out") * along(mlp)
    before = states[Point("resid_pre", block)]
    after = states[Point("resid_post", block)]
    following = states.get(Point("resid_pre", block + 1))
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
    """What each head adds, from all tokens or from image and text tokens apart."""
    part = model.cfg.parts[Point("z", block)]
    heads = part.split(z)
    projection = model.hf.get_submodule(part.path)
    shares = {"all": heads} if image is None else {"image": image, "text": heads - image}
    gain = _factor(model, block, "attn_out") * _frozen_norm(model, block, _applied(projection, z))
    terms: Terms = {}
    for token_source, share in shares.items():
        written = along(_written(projection, share) * gain[:, None])
        terms |= {Component("head", block, head, token_source): written[:, head] for head in range(written.shape[1])}
    return terms


def _factor(model: HookedModel, block: int, hook: str) -> float:
    """The factor that attention or MLP is multiplied by before it is added: the family's residual scale, and the block's gate if any."""
    gate = getattr(model.hf.get_submodule(model.cfg.blocks[block]), families.GATES[hook], None)
    return model.cfg.residual_scale * (1.0 if gate is None else float(gate.detach().tanh()))


def _written(projection: nn.Module, z: Float[Tensor, "query head d"]) -> Float[Tensor, "query head d_model"]:
    """What each head adds through the output projection: its output for this head alone, minus its output for no head (the bias).

    The module is called and its matrix never read, so it may be linear, GPT-2's, quantised or adapted.
    """
    alone = torch.einsum("qhd,hk->qhkd", z, torch.eye(z.shape[1], dtype=z.dtype, device=z.device)).flatten(2)
    return _applied(projection, alone) - _applied(projection, torch.zeros_like(alone[:1, :1]))


def _frozen_norm(model: HookedModel, block: int, attended: Float[Tensor, "query d_model"]) -> Float[Tensor, "query d_model"]:
    """The factors that the norm between attention and stream applies to this very state; ones if there is no such norm."""
    attention = model.cfg.parts[Point("attn_out", block)].path
    heads = model.cfg.parts[Point("z", block)].path
    if heads.startswith(f"{attention}."):
        return torch.ones_like(attended)
    norm = model.hf.get_submodule(attention)
    gain = _applied(norm, torch.full_like(attended[:1], 100.0))  # large, so that the norm's epsilon does not show
    normed = _applied(norm, attended)
    gained = attended * gain
    return gain * (normed * gained).sum(-1, keepdim=True) / gained.square().sum(-1, keepdim=True).clamp_min(1e-30)


def _applied(module: nn.Module, states: Tensor) -> Tensor:
    """The output of a module, on the device of the states. The blocks of a large model may lie on several devices."""
    home = next((parameter.device for parameter in module.parameters()), states.device)
    with torch.no_grad():
        return module(states.to(home)).to(states.device)


def _image_shares(model: HookedModel, batch: Batch, states: Mapping[Point, Tensor]) -> dict[int, Float[Tensor, "query head d"]]:
    """The part of each head's z that comes from image tokens, by block: the last token's attention pattern times their values.

    Raises:
        SiteError: The model computes no attention patterns.
        ModelError: The pattern times the values of all tokens is not z.
    """
    cfg = model.cfg
    weighing = _Weighing(batch)
    blocks = {point.layer: z for point, z in states.items() if point.hook == "z" and point.layer is not None}
    weighed = [block for block in blocks if block not in cfg.image_layers]
    lacking = next((block for block in weighed if not {Point("v", block), Point("pattern", block)} <= set(cfg.parts)), None)
    if lacking is not None:
        raise ModelError(f"block {lacking} without values and pattern of its own", *_UNSPLIT)
    names = {Point(hook, block).name for hook in ("v", "pattern") for block in weighed}
    if names:
        model.run_with_hooks(batch, fwd_hooks=[(lambda name: name in names, weighing)])
    return {block: _checked(cfg, block, z, weighing) for block, z in blocks.items()}


class _Weighing:
    """A hook function that weighs the values of a block with its pattern as soon as it has both, for the last token alone."""

    def __init__(self, batch: Batch) -> None:
        self.last = batch.select("last").long().argmax(1)
        self.image = batch.image
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
        self.whole[block] = self._mixed(row, values)
        self.of_image[block] = self._mixed(row * self.image[:, None].to(row), values)

    def _mixed(
        self, weights: Float[Tensor, "query head token"], values: Float[Tensor, "query token head d"]
    ) -> Float[Tensor, "query head d"]:
        return torch.einsum("qhk,qkhd->qhd", weights.to(values), values).to(self.image.device)


def _checked(cfg: Architecture, block: int, z: Float[Tensor, "query width"], weighing: _Weighing) -> Float[Tensor, "query head d"]:
    """The image's part of z in a block, once the whole was found to be the pattern times the values."""
    heads = cfg.parts[Point("z", block)].split(z)
    if block in cfg.image_layers:
        return heads  # cross-attention: there is nothing but the image to attend to
    whole = weighing.whole[block]
    error = (whole - heads).abs().amax() / heads.abs().amax() if whole.shape == heads.shape else torch.tensor(torch.inf)
    if not error < max(1e-4, 8 * torch.finfo(z.dtype).eps):
        raise ModelError(f"heads in block {block} that differ from pattern times values by {float(error):.0e} of the largest", *_UNSPLIT)
    return weighing.of_image[block]


_UNSPLIT = (
    "heads that mix the values at the hook v, so that their parts can be told apart by token source",
    "leave by_token_source out: this family shares, norms, clips or gates the values behind that hook",
)
