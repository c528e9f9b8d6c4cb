"""Check which capabilities of guardlens work on a model, by comparison with raw PyTorch if there is something to compare."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from guardlens import interventions as iv
from guardlens.data import presentations
from guardlens.data.presentations import text_only
from guardlens.directions import from_vectors
from guardlens.errors import GuardlensError, ModelError, warn
from guardlens.hooks import Site
from guardlens.models.architectures.families import BESIDES
from guardlens.models.engine.batch import Batch
from guardlens.models.hooked_model import HookedModel
from guardlens.models.readiness import require_ready

TEXTS = ("How to fold a paper boat?", "Please explain how to plant a tulip in a pot.")


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        name: The capability.
        works: Whether it works; None if it does not apply to the model.
        detail: What was measured, or what went wrong and how to mend it.
    """

    name: str
    works: bool | None
    detail: str


def check(model: HookedModel) -> list[CheckResult]:
    """Run all checks. This takes a few forward passes and a short generation."""
    return [_run(name, model) for name in CHECKS]


def require_sound(model: HookedModel) -> None:
    """Reject a model of a family that guardlens's tests do not cover if it fails one of the essential checks.

    Warns:
        UserWarning: The model's blocks add more than attention and MLP to the residual stream.

    Raises:
        ModelError: An essential check failed; the error says what was measured, or what is missing.
    """
    if _needs_no_check(model):
        return
    require_ready(model.hf)
    for name in ESSENTIAL:
        result = _run(name, model)
        if result.works is False:
            raise ModelError(
                f"{_new_family(model)} failing at {name!r}: {result.detail}",
                "parts that compute the model's own logits, alone and in a batch",
                "run `guardlens check` on it; if a part was mistaken, gl.load(..., names={part: path}) names the right one",
            )
    warn_of_other_residual_terms(model)


def warn_of_other_residual_terms(model: HookedModel) -> None:
    """Warn if a model of a family that guardlens's tests do not cover adds more than attention and MLP to the residual stream.

    Warns:
        UserWarning: Its `attn_out` and `mlp_out` are not all that its blocks add, so they do not measure its attention and MLPs.
    """
    if _needs_no_check(model):
        return
    result = _run("residual stream adds up", model)
    if result.works is False:
        warn(f"{_new_family(model)} has attn_out or mlp_out that are not what its blocks add ({result.detail})")


def _needs_no_check(model: HookedModel) -> bool:
    """Whether the tests cover the family, or the model has no weights to compute with."""
    return model.cfg.proven or any(parameter.is_meta for parameter in model.hf.parameters())


def _new_family(model: HookedModel) -> str:
    return f"{type(model.hf).__name__}, a family that is new to guardlens,"


def _run(name: str, model: HookedModel) -> CheckResult:
    try:
        return CheckResult(name, *CHECKS[name](model))
    except GuardlensError as error:
        return CheckResult(name, False, str(error).replace("\n", " "))
    except Exception as error:  # an unknown model may fail in any way, and the table must show it
        return CheckResult(name, False, f"{type(error).__name__}: {error}".splitlines()[0])


def _prompts(model: HookedModel, texts: Sequence[str] = TEXTS) -> Batch:
    """The texts alone, or with a blank image if the model requires one."""
    try:
        return model.batch(texts)
    except ModelError:
        if not model.sees_images:
            raise
        return _beside_image(model, texts)


def _beside_image(model: HookedModel, texts: Sequence[str] = TEXTS) -> Batch:
    return model.batch(texts, presentations.blank("grey", model.cfg.image_size or 336))


def _parts(model: HookedModel) -> tuple[bool, str]:
    cfg = model.cfg
    return True, f"{cfg.decoder}: {cfg.n_layers} layers, d_model {cfg.d_model}, {len(model.hook_names)} hooks"


def _calls(model: HookedModel, batch: Batch) -> Counter[str]:
    """How often each part of the language model runs in one forward pass."""
    running = [point for point in model.cfg.computed(False) if point.layer not in model.cfg.image_layers]
    paths = {model.cfg.parts[point].path for point in running} - {""}
    calls = Counter(dict.fromkeys(sorted(paths), 0))
    handles = [model.hf.get_submodule(path).register_forward_hook(partial(_count, calls, path)) for path in paths]
    try:
        with torch.no_grad():
            model.hf(**batch.inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _count(calls: Counter[str], path: str, *called: object) -> None:
    calls[path] += 1


def _logits(model: HookedModel) -> tuple[bool, str]:
    batch = _prompts(model)
    try:
        calls = _calls(model, batch)
    except Exception as error:  # this is the model's own forward, so whatever it raises is no fault of the parts that were found
        return False, f"the model's own forward fails, without guardlens: {type(error).__name__}: {error}".splitlines()[0]
    for path, times in calls.items():
        if times != 1:
            return False, f"{path} runs {times} times in a forward pass, so a state there has no single value"
    logits, cache = model.run_with_cache(batch, names_filter=f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
    mine, expected = model.to_logits(cache["resid_post", -1])[batch.mask], logits[batch.mask]
    works, detail = _near(mine, expected, "the last residual stream through norm and unembed")
    return works, detail if works else detail + _cause(mine, expected)


def _cause(mine: torch.Tensor, expected: torch.Tensor) -> str:
    """A likely reason for different logits: tokens that the model rules out, a scale, or a soft cap; empty if none of these fits."""
    masked = (expected <= torch.finfo(expected.dtype).min / 2).all(0)
    mine, expected = mine[:, ~masked], expected[:, ~masked]
    times = float((mine * expected).sum() / mine.square().sum())
    if masked.any() and _near(mine, expected, "")[0]:
        return f"; they are the same but for {int(masked.sum())} tokens, which the model rules out after its unembedding"
    if _near(times * mine, expected, "")[0]:
        return f"; the model's own are {times:.3g} times these, a scale that guardlens/models/architectures/families.py does not know"
    if torch.equal(mine.argsort(-1), expected.argsort(-1)):
        return "; the tokens keep their order: something is done to the logits after the unembedding, as by a soft cap"
    return ""


def _residual(model: HookedModel) -> tuple[bool | None, str]:
    blocks = [model.hf.get_submodule(path) for path in model.cfg.blocks]
    if more := next((what for mark, what in BESIDES.items() if any(hasattr(block, mark) for block in blocks)), None):
        return None, f"blocks add more than attention and MLP: {more}; decompose_resid calls it rest"
    found = {(point.hook, point.layer) for point in model.cfg.parts}
    if lacking := [layer for layer in range(model.cfg.n_layers) if not {("attn_out", layer), ("mlp_out", layer)} <= found]:
        return None, f"no attention or no MLP was found in {len(lacking)} blocks; decompose_resid calls what they add rest"
    batch = _prompts(model)
    _, cache = model.run_with_cache(batch)
    terms, names = cache.decompose_resid()
    rest = [name for name in names if name.endswith("rest")]
    if rest:
        worst = max(float(term[batch.mask].abs().max()) for name, term in zip(names, terms, strict=True) if name in rest)
        worst /= float(cache["resid_post", -1][batch.mask].abs().max())
        return worst < 1e-2, f"resid_pre + attn_out + mlp_out = resid_post up to {worst:.0e} of its size, in {len(rest)} blocks"
    return _near(terms.sum(0)[batch.mask], cache["resid_post", -1][batch.mask], "the sum of all that blocks add, and the residual stream")


def _heads(model: HookedModel) -> tuple[bool | None, str]:
    layers = [p.layer for p in model.cfg.computed(False) if p.hook == "z" and p.layer is not None]
    if not layers:
        return None, "no attention heads were found"
    _, cache = model.run_with_cache(_prompts(model), names_filter=[f"blocks.{layers[0]}.attn.hook_{x}" for x in "qz"])
    q, z = (cache[x, layers[0]] for x in "qz")
    heads = model.cfg.n_heads
    return q.shape[2] == z.shape[2] == heads, f"{heads} heads of width {z.shape[-1]} in {len(layers)} layers"


def _padding(model: HookedModel) -> tuple[bool, str]:
    return _near(_states(model, [TEXTS]), _states(model, [[text] for text in TEXTS]), "states alone and in a padded batch")


def _states(model: HookedModel, batches: Sequence[Sequence[str]]) -> torch.Tensor:
    """The last token's states of the prompts in these batches, without an image and, for a VLM, with an image."""
    site = Site()
    makers = [_prompts, _beside_image] if model.sees_images else [_prompts]
    reads = [model.run(prompts(model, texts), read=[site], logits=None).reads[site] for prompts in makers for texts in batches]
    return torch.cat(reads, dim=1)


def _edit(model: HookedModel) -> tuple[bool, str]:
    batch = _prompts(model)
    running = sorted(set(range(model.cfg.n_layers)) - model.cfg.image_layers)
    layer = running[len(running) // 2]
    push = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0)).to(batch.mask.device)

    def raw(module: torch.nn.Module, args: object, out: Any) -> Any:
        states = (out[0] if isinstance(out, tuple) else out).clone()
        states[:, -1] += push.to(states.dtype)
        return (states, *out[1:]) if isinstance(out, tuple) else states

    handle = model.hf.get_submodule(model.cfg.blocks[layer]).register_forward_hook(raw)
    try:
        with torch.no_grad():
            expected = model.hf(**batch.inputs, use_cache=False).logits[:, -1]
    finally:
        handle.remove()
    intervention = iv.custom(lambda states, context: states + push.to(states.dtype)).at(layers=[layer])
    mine = model.run(batch, intervention).logits
    assert mine is not None
    return _near(mine[0], expected, f"an edit at layer {layer} against a PyTorch hook")


def _generate(model: HookedModel) -> tuple[bool, str]:
    steps: list[int] = []

    def note(states: torch.Tensor, context: iv.Context) -> torch.Tensor:
        steps.append(context.decode_step)
        return states

    model.generate(_prompts(model), intervention=iv.custom(note).at(layers=[0]).during("always"), max_new_tokens=4)
    return steps == list(range(len(steps))) and len(steps) > 0, f"an edit reached the prefill and {len(steps) - 1} decode steps"


def _image(model: HookedModel) -> tuple[bool | None, str]:
    if not model.sees_images:
        return None, "a text-only model"
    size = model.cfg.image_size or 336
    hook = "blocks.0.hook_resid_pre"
    batches = [model.batch(TEXTS, presentations.noise(seed, size)) for seed in (0, 1)]
    tokens = batches[0].image.sum(1).tolist()
    if model.cfg.image_layers:
        one, other = (model.run(batch).logits for batch in batches)
        return bool((one != other).any()), f"{tokens[0]} image token, seen through cross-attention in {sorted(model.cfg.image_layers)}"
    caches = [model.run_with_cache(batch, names_filter=[hook, *_projector(model)])[1] for batch in batches]
    one, other = (cache[hook] for cache in caches)
    changed = (one != other).any(-1) & batches[0].mask
    image = batches[0].image
    seen = int((changed & image)[0].sum())  # some families end rows of patches with a learned token, which no image changes
    works = bool((image | ~changed).all()) and 2 * seen > tokens[0]
    detail = f"{tokens[0]} image tokens: another image changes the embeddings of {seen} of them, and of no other token"
    return works, detail + _entering(one[changed & image], *(caches[0][name] for name in _projector(model)))


def _projector(model: HookedModel) -> list[str]:
    return [point.name for point in model.cfg.parts if point.hook == "projector"]


def _entering(embeddings: torch.Tensor, projected: torch.Tensor | None = None) -> str:
    """Whether the projector's output matches the image embeddings entering block 0, up to order and scale.

    Returns:
        An empty string if it does; otherwise a remark, since then the wrong module was found, or something is added to its output.
    """
    if projected is None:
        return "; no projector was found whose output they are"
    if projected.shape[-1] != embeddings.shape[-1]:
        return "; projector.hook_out has another width"
    rows = torch.nn.functional.normalize(projected.flatten(0, -2).float(), dim=-1).to(embeddings.device)
    nearest = (torch.nn.functional.normalize(embeddings.float(), dim=-1) @ rows.T).amax(1)
    if bool((nearest > 0.99).all()):
        return ""
    return "; projector.hook_out is not what they are made of: another module, or something is added"


def _twin(model: HookedModel) -> tuple[bool | None, str]:
    if not model.sees_images:
        return None, "a text-only model is its own twin"
    layer = max(set(range(model.cfg.n_layers)) - model.cfg.image_layers)
    site = Site(layers=(layer,))
    beside = _beside_image(model)
    text = model.run(model.batch(TEXTS, text_only), read=[site]).reads[site]
    change = model.run(beside, read=[site]).reads[site] - text
    if not change[0, 0, 0].any():
        return None, f"an image changes nothing at the last token of layer {layer}"
    intervention = iv.patch(from_vectors(change[0, 0, 0].float()), iv.text_twin).at(layers=[layer])
    left = model.run(beside, intervention, read=[site]).reads[site] - text
    direction = torch.nn.functional.normalize(change[0, 0, 0].float(), dim=0)
    share = float((left.float() @ direction).abs().max() / (change.float() @ direction).abs().max())
    detail = f"a patch with the text twin's state leaves {share:.0e} of the change that an image makes at layer {layer}, in its direction"
    return share <= _tolerance(left.dtype), detail


def _positions(model: HookedModel) -> tuple[bool | None, str]:
    if getattr(model.processor, "chat_template", None) is None:
        return None, "no chat template, so nothing follows the instruction"
    chosen, tail = (_prompts(model).select(positions).sum(1).tolist() for positions in ("instruction", "post_instruction"))
    return tail[0] == tail[1], f"instruction {chosen[0]} and {chosen[1]} tokens, template tail {tail[0]}"


def _near(mine: torch.Tensor, expected: torch.Tensor, what: str) -> tuple[bool, str]:
    difference = float((mine - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
    return difference <= _tolerance(expected.dtype), f"{what}: differ by {difference:.0e} of the largest"


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 5e-2


CHECKS: dict[str, Callable[[HookedModel], tuple[bool | None, str]]] = {
    "parts found": _parts,
    "logits reproduced": _logits,
    "residual stream adds up": _residual,
    "batches and padding": _padding,
    "instruction positions": _positions,
    "attention heads": _heads,
    "edits": _edit,
    "generation under edits": _generate,
    "images": _image,
    "text twin": _twin,
}

ESSENTIAL = ("logits reproduced", "batches and padding", "edits", "images")
"""The checks that a model of an unknown family must pass for `load` to return it."""
