"""Every family of the zoo against raw PyTorch hooks: what the docs' table of families says is what is tested here.

What a family can't do is in its `unsupported`, and then the test is of the refusal, where guardlens has to refuse.
"""

from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.directions import Directions
from guardlens.hooks import Site
from tests.zoo import FAMILIES, REFUSED
from tests.zoo.family import TEXTS

BY_NAME = {family.name: family for family in FAMILIES}
VLMS = [family.name for family in FAMILIES if family.vision]


@cache
def loaded(name):
    family = BY_NAME[name]
    return gl.load(family.model(), processor=family.processor())


@pytest.fixture(params=list(BY_NAME), scope="module")
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return BY_NAME[name]


@pytest.fixture
def model(name):
    return loaded(name)


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def takes_text_alone(family):
    return not family.lacks("text alone")


def asked(family, images=1):
    """The test's queries, beside random pictures of the family's two sizes, and how they are shown."""
    pictures = [tuple(picture(10 * row + i, family.images[(row + i) % 2]) for i in range(images)) for row in range(len(TEXTS))]
    shown = [gl.Query(text, id=f"q{row}", images=pictures[row] if family.vision else ()) for row, text in enumerate(TEXTS)]
    return shown, presentations.own_images if family.vision else text_only


def batch_of(family, model, rows=range(len(TEXTS)), **options):
    shown, presentation = asked(family)
    return model.batch([shown[row] for row in rows], presentation, **options)


@cache
def whole_batch(family, model):
    """The test's queries as a batch, which tests share and must not change."""
    return batch_of(family, model)


def close(mine, expected, tolerance=1e-5):
    torch.testing.assert_close(mine, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)


@contextmanager
def hooked(hf, path, fn, side="output"):
    """A raw hook that maps the first tensor that a module takes or gives (`fn` may return None)."""
    module = hf.get_submodule(path)

    def after(module, args, out):
        new = fn(out[0] if isinstance(out, tuple) else out)
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    def before(module, args, kwargs):
        if args:
            new = fn(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = fn(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    handle = module.register_forward_hook(after) if side == "output" else module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def raw(model, batch, **options):
    with torch.no_grad():
        return model.hf(**batch.inputs, use_cache=False, **options).logits


def kept(model, batch, path, side="output"):
    """What a module takes or gives in a plain forward."""
    values = []

    def keep(value):
        whole = torch.cat(value) if isinstance(value, list) else getattr(value, "last_hidden_state", value)
        values.append(whole.detach().clone())

    with hooked(model.hf, path, keep, side):
        raw(model, batch)
    return values[0]


@cache
def stream(family, model, layer, side):
    """The residual stream on one side of a block, in a plain forward of the test's queries."""
    return kept(model, whole_batch(family, model), f"{family.blocks}.{layer}", side)


def options_of_answers(model):
    return {"max_new_tokens": 5, "pad_token_id": model.tokenizer.pad_token_id}


@cache
def plain_answers(family, model):
    """What transformers' own `generate` says, and what guardlens says without an intervention."""
    batch = whole_batch(family, model)
    theirs = model.hf.generate(**batch.inputs, **options_of_answers(model), do_sample=False)
    return theirs, model.run(batch, new_tokens=5).tokens[0]


@cache
def alone(family, model, row, presentation):
    """A run of one of the test's queries alone, which reads at all positions that it has."""
    image = ("image",) if presentation is presentations.own_images else ()
    sites = [Site(positions=where) for where in ("last", "instruction", "all", "post_instruction", *image)]
    return model.run(model.batch(asked(family)[0][row], presentation), read=sites)


def at(mask, push):
    """Adds `push` where the mask is set, in a tensor as wide as the mask."""

    def fn(value):
        return torch.where(mask[..., None], value + push.to(value), value) if value.shape[1] == mask.shape[1] else None

    return fn


def last(batch):
    return batch.mask.flip(1).cumsum(1).flip(1) == 1


def a_push(model, size=3.0):
    return size * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(5))


def pushing(push):
    return iv.custom(lambda states, context: states + push.to(states))


def test_a_plain_run_is_bit_identical_to_transformers(family, model):
    batch = whole_batch(family, model)
    expected = raw(model, batch)
    assert torch.equal(model.run(batch, logits="all").logits[0], expected)
    close(model.run(batch).logits[0], expected[:, -1])


def test_the_parts_are_those_that_the_source_names(family, model):
    assert model.cfg.blocks == tuple(f"{family.blocks}.{layer}" for layer in range(model.cfg.n_layers))
    assert len(model.hf.get_submodule(family.blocks)) == model.cfg.n_layers
    assert model.sees_images == (family.vision is not None)
    paths = {point.name: part.path for point, part in model.cfg.parts.items()}
    if family.vision:
        assert paths["vision.blocks.1.hook_resid_post"] == f"{family.vision}.1"
        assert paths.get("projector.hook_out") == family.projector
    assert model.cfg.proven


@pytest.mark.parametrize("positions", ["last", "all", "image", "instruction", (1, 4)])
def test_reads_equal_raw_hooks(family, model, positions):
    batch = whole_batch(family, model)
    if positions == "image" and not family.vision:
        with pytest.raises(errors.SiteError, match="no token at positions 'image'"):
            batch.select("image")
        return
    chosen = batch.select(positions)
    for hook, side in (("resid_post", "output"), ("resid_pre", "input")):
        site = Site(hook, positions=positions)
        mine = model.run(batch, read=[site], logits=None).reads[site][0]
        for layer in range(model.cfg.n_layers):
            if layer in model.cfg.image_layers and hook == "resid_pre":
                continue
            states = stream(family, model, layer, side)
            close(mine[:, layer], torch.stack([row[mask].mean(0) for row, mask in zip(states, chosen, strict=True)]))


def test_the_cache_has_transformerlens_names_and_shapes(family, model):
    batch = whole_batch(family, model)
    logits, cache = model.run_with_cache(batch)
    close(logits, raw(model, batch), 1e-6)
    cfg, (n, seq) = model.cfg, batch.mask.shape
    assert list(cache) == [name for name in model.hook_names if name in cache]
    for layer in range(cfg.n_layers):
        for hook in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
            if (hook, layer) in cache:
                assert cache[hook, layer].shape == (n, seq, cfg.d_model), (hook, layer)
        if ("z", layer) in cache:
            heads = cache["z", layer]
            assert heads.shape[:3] == (n, seq, cfg.n_heads)
            assert cache["q", layer].shape[:3] == (n, seq, cfg.n_heads)
            assert not cfg.d_head or cache["q", layer].shape[3] == heads.shape[3] == cfg.d_head
    close(cache["unembed.hook_out"][last(batch)], cfg_free_logits(model, batch))
    if family.vision:
        assert torch.equal(cache["vision.blocks.1.hook_resid_post"], kept(model, batch, f"{family.vision}.1"))
    if family.projector:
        assert torch.equal(cache["projector.hook_out"], kept(model, batch, family.projector))


def cfg_free_logits(model, batch):
    """The unembedding's own output at the last token."""
    unembed = model.hf.get_output_embeddings() or model.hf.get_decoder().get_output_embeddings()
    path = next(path for path, module in model.hf.named_modules() if module is unembed)
    return kept(model, batch, path)[last(batch)]


def test_the_residual_stream_is_the_sum_of_its_parts(family, model):
    batch = whole_batch(family, model)
    _, cache = model.run_with_cache(batch)
    for layer in range(model.cfg.n_layers + 1):
        terms, names = cache.decompose_resid(layer if layer < model.cfg.n_layers else None)
        expected = cache["resid_pre", layer] if layer < model.cfg.n_layers else cache["resid_post", -1]
        close(terms.sum(0)[batch.mask], expected[batch.mask])
    assert {name.partition("_")[2] for name in names if name != "embed"} <= {"attn_out", "mlp_out", *family.adds}
    states, _ = cache.accumulated_resid()
    assert len(states) == model.cfg.n_layers + 1 and torch.equal(states[-1], cache["resid_post", -1])


def test_the_logit_lens_ends_in_the_logits(family, model):
    batch = whole_batch(family, model)
    logits, cache = model.run_with_cache(batch)
    close(cache.logit_lens()[-1], logits[:, -1])
    assert len(cache.logit_lens()) == model.cfg.n_layers


def test_patterns_mix_the_values_into_z(family, model):
    batch = whole_batch(family, model)
    _, cache = model.run_with_cache(batch)
    layers = [layer for layer in range(model.cfg.n_layers) if ("pattern", layer) in cache and ("v", layer) in cache]
    assert bool(layers) != bool(family.lacks("attention heads") or family.lacks("keys and values"))
    for layer in layers:
        pattern, values = cache["pattern", layer], cache["v", layer]
        rows = pattern.transpose(1, 2)[batch.mask]
        close(rows.sum(-1), torch.ones_like(rows[..., 0]))
        values = values.repeat_interleave(model.cfg.n_heads // values.shape[2], dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
        if not family.lacks("values as mixed"):
            close(mixed[batch.mask], cache["z", layer][batch.mask])


def test_z_is_what_the_attention_output_is_made_of(family, model):
    """Without it, nothing but a constant is left of the attention."""
    batch = whole_batch(family, model)
    layers = [part.layer for part in model.cfg.parts if part.hook == "z"]
    if family.lacks("attention heads"):
        assert not layers
        return
    found = {}
    model.run_with_hooks(
        batch,
        fwd_hooks=[
            (f"blocks.{layers[-1]}.attn.hook_z", lambda value, hook: torch.zeros_like(value)),
            (f"blocks.{layers[-1]}.hook_attn_out", lambda value, hook: found.update(out=value)),
        ],
    )
    states = found["out"][batch.mask]
    close(states, states[:1].expand_as(states), 1e-6)


def down_projections(family, model):
    """Layer -> path of the `down_proj` that is the MLP's own, not an expert's."""
    blocks = enumerate(model.hf.get_submodule(family.blocks))
    found = {i: [path for path, _ in block.named_modules() if path.endswith(".down_proj") and path.count(".") == 1] for i, block in blocks}
    return {layer: f"{family.blocks}.{layer}.{path}" for layer, paths in found.items() for path in paths}


def test_neurons_are_what_the_down_projection_takes(family, model):
    batch, paths = batch_of(family, model), down_projections(family, model)
    logits, cache = model.run_with_cache(batch)
    assert [layer for layer in range(model.cfg.n_layers) if ("post", layer) in cache] == list(paths)
    for layer, path in paths.items():
        name = f"blocks.{layer}.mlp.hook_post"
        assert torch.equal(cache[name], kept(model, batch, path, "input"))
        assert not model.cfg.d_mlp or cache[name].shape[2] == model.cfg.d_mlp
    if not paths:
        return
    layer, path = max(paths.items())
    gains = 4 * torch.rand(cache["post", layer].shape[2], generator=torch.Generator().manual_seed(4))
    with hooked(model.hf, path, lambda value: value * gains, "input"):
        expected = raw(model, batch)
    close(model.run_with_hooks(batch, fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", lambda value, hook: value * gains)]), expected)
    intervention = iv.custom(lambda states, context: states * gains).at(hook="post", layers=[layer], positions="all")
    close(model.run(batch, intervention).logits[0], expected[:, -1])
    assert (expected - logits)[batch.mask].abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["last", "all", "image"])
def test_edits_equal_raw_hooks(family, model, positions):
    if positions == "image" and not family.vision:
        return
    batch, push = whole_batch(family, model), a_push(model)
    chosen = batch.select(positions)
    plain = raw(model, batch)[:, -1]
    # What windows and recurrences pass on of an image is little, and less from a late layer.
    layer = 0 if positions == "image" else 1
    for hook, side in (("resid_post", "output"), ("resid_pre", "input")):
        with hooked(model.hf, f"{family.blocks}.{layer}", at(chosen, push), side):
            expected = raw(model, batch)[:, -1]
        close(model.run(batch, pushing(push).at(hook=hook, layers=[layer], positions=positions)).logits[0], expected)
        assert (expected - plain).abs().max() > 1e-3
    close(model.run(batch).logits[0], plain)


def test_edits_of_what_is_added_equal_edits_of_the_stream(family, model):
    batch, push, final = whole_batch(family, model), a_push(model), model.cfg.n_layers - 1
    if "rest" in family.adds:
        return
    there = model.run(batch, pushing(push).at(hook="mlp_out", layers=[final])).logits
    here = model.run(batch, pushing(push * model.cfg.residual_scale).at(layers=[final])).logits
    close(there, here)
    attention = model.run(batch, pushing(push).at(hook="attn_out", layers=[final])).logits
    assert (attention - model.run(batch).logits).abs().max() > 1e-3


@settings(max_examples=6)
@given(data=st.data())
def test_states_are_the_same_in_any_batch_in_any_order_with_any_padding(name, data):
    family, model = BY_NAME[name], loaded(name)
    rows = data.draw(st.permutations(range(len(TEXTS))).flatmap(lambda order: st.integers(1, 4).map(lambda n: order[:n])))
    side = data.draw(st.sampled_from(["left", "right"]))
    shown, own = asked(family)
    presentation = own if not family.vision or not takes_text_alone(family) or data.draw(st.booleans()) else text_only
    names = ["last", "instruction", "all", "post_instruction"] + (["image"] if presentation is presentations.own_images else [])
    site = Site(positions=data.draw(st.sampled_from(names)))
    together = model.run(model.batch([shown[row] for row in rows], presentation, padding_side=side), read=[site])
    for index, row in enumerate(rows):
        expected = alone(family, model, row, presentation)
        close(together.reads[site][0, index], expected.reads[site][0, 0], 1e-4)
        close(together.logits[0, index], expected.logits[0, 0], 1e-4)


def test_image_positions_are_what_the_image_changes(family, model):
    if not family.vision:
        return
    shown, own = asked(family)
    batch = model.batch(shown, own)
    others = [gl.Query(query.text, id=query.id, images=(picture(99 + i, query.images[0].size),)) for i, query in enumerate(shown)]
    other = model.batch(others, own)
    assert torch.equal(batch.image, other.image)
    if model.cfg.image_layers:
        site = Site(positions="last")
        assert (model.run(batch, read=[site]).reads[site] != model.run(other, read=[site]).reads[site]).any()
        return
    path = f"{family.blocks}.0"
    mine = kept(model, batch, path, "input")
    assert_image_positions(batch, mine, (mine != kept(model, other, path, "input")).any(-1))


def assert_image_positions(batch, states, changed):
    """Another image changes the states at image positions alone, and at all of them but the learned vectors that end a row or a tile."""
    assert changed.any(1).all() and not (changed & batch.mask & ~batch.image).any()
    ends = states[batch.image & ~changed]
    assert len(ends.unique(dim=0)) <= 1 and len(ends) < batch.image.sum() / 2


def test_several_images_in_a_prompt(family, model):
    if not family.vision:
        return
    shown, own = asked(family, images=2)
    if family.lacks("several images"):
        with pytest.raises((errors.GuardlensError, ValueError)):
            model.run(model.batch(shown, own))
        return
    batch = model.batch(shown, own)
    site = Site(positions="last")
    together = model.run(batch, read=[site]).reads[site]
    if not model.cfg.image_layers:
        path, changed = f"{family.blocks}.0", torch.zeros_like(batch.image)
        mine = kept(model, batch, path, "input")
        for which in (0, 1):
            others = [
                gl.Query(q.text, id=q.id, images=tuple(picture(7, image.size) if i == which else image for i, image in enumerate(q.images)))
                for q in shown
            ]
            differs = (mine != kept(model, model.batch(others, own), path, "input")).any(-1)
            assert differs.any(dim=1).all() and not (changed & differs & batch.mask).any()
            changed |= differs
        assert_image_positions(batch, mine, changed)
    alone = model.run(model.batch(shown[1], own), read=[site]).reads[site]
    close(together[0, 1], alone[0, 0], 1e-4)
    assert torch.equal(batch.select("instruction").sum(1), batch_of(family, model).select("instruction").sum(1))


def test_instruction_positions_are_the_querys_text(family, model):
    batch = whole_batch(family, model)
    ids, text = batch.inputs["input_ids"], batch.select("instruction")
    for row, words in enumerate(TEXTS):
        assert model.tokenizer.decode(ids[row][text[row]]).strip() == words
    after = batch.select("post_instruction")
    tails = {tuple(ids[row][after[row]].tolist()) for row in range(len(TEXTS))}
    assert len(tails) == 1 and after[:, -1].all()
    assert torch.equal(batch.select("last").nonzero()[:, 1], torch.full((len(TEXTS),), ids.shape[1] - 1))


def test_system_prompt_and_prefill(family, model):
    shown, own = asked(family)
    framed = presentations.chat(own, system="You are a careful helper.", prefill="Sure, here")
    if family.lacks("system prompt"):
        with pytest.raises(errors.PresentationError, match="does not take"):
            model.batch(shown, framed)
        framed = presentations.chat(own, prefill="Sure, here")
    if family.lacks("prefill"):
        with pytest.raises(errors.PresentationError, match="the prefill"):
            model.batch(shown, framed)
        framed = presentations.chat(own, system="You are a careful helper.")
    batch, plain = model.batch(shown, framed), model.batch(shown, own)
    for row, words in enumerate(TEXTS):
        prompt = model.tokenizer.decode(batch.inputs["input_ids"][row])
        assert prompt.endswith("Sure, here") == (not family.lacks("prefill"))
        assert ("You are a careful helper." in prompt) == (not family.lacks("system prompt"))
        assert model.tokenizer.decode(batch.inputs["input_ids"][row][batch.instruction[row]]).strip() == words
    assert torch.equal(batch.image.sum(1), plain.image.sum(1))


@pytest.mark.parametrize("phase", ["prefill", "decode", "always"])
def test_generation_equals_raw_hooks(family, model, phase):
    batch, push = whole_batch(family, model), a_push(model, 6.0)

    def fn(value):
        if phase != "always" and (value.shape[1] > 1) != (phase == "prefill"):
            return None
        value = value.clone()
        value[:, -1] += push.to(value)
        return value

    options = options_of_answers(model)
    plain, mine = plain_answers(family, model)
    with hooked(model.hf, f"{family.blocks}.1", fn):
        greedy = model.hf.generate(**batch.inputs, **options, do_sample=False)
        if phase == "always":
            torch.manual_seed(11)
            sampled = model.hf.generate(**batch.inputs, **options, do_sample=True, temperature=1.5)
    intervention, width = pushing(push).at(layers=[1]).during(phase), batch.mask.shape[1]
    assert torch.equal(model.run(batch, intervention, new_tokens=5).tokens[0], greedy[:, width:])
    if phase == "always":
        sampling = {"do_sample": True, "temperature": 1.5}
        assert torch.equal(model.run(batch, intervention, new_tokens=5, seed=11, generation=sampling).tokens[0], sampled[:, width:])
    assert torch.equal(mine, plain[:, width:])
    assert greedy.shape != plain.shape or not torch.equal(greedy, plain)


@pytest.mark.parametrize("phase", ["decode", "always"])
def test_generation_without_a_cache_gives_the_same_tokens(family, model, phase):
    if family.lacks("generation without a cache"):
        return
    batch = whole_batch(family, model)
    intervention = pushing(a_push(model, 6.0)).at(layers=[1]).during(phase)
    # A random model may say the image token, and then it would be asked for an image.
    plain_words = {"suppress_tokens": list(range(340, model.cfg.d_vocab))}
    cached = model.run(batch, intervention, new_tokens=4, generation=plain_words).tokens
    assert torch.equal(model.run(batch, intervention, new_tokens=4, generation=plain_words | {"use_cache": False}).tokens, cached)


def test_lanes_and_generation_of_lanes_equal_separate_runs(family, model):
    batch = whole_batch(family, model)
    interventions = [
        iv.nothing,
        pushing(a_push(model)).at(layers=[1]),
        pushing(-a_push(model)).at(layers=[0], positions="all").during("always"),
    ]
    together = model.run(batch, interventions).logits
    tokens = model.run(batch, interventions, new_tokens=3).tokens
    for lane, intervention in enumerate(interventions):
        close(together[lane], model.run(batch, intervention).logits[0], 1e-4)
        assert torch.equal(tokens[lane], model.run(batch, intervention, new_tokens=3).tokens[0])


def test_the_text_twin_is_the_prompt_without_its_image(family, model):
    if not family.vision:
        return
    shown, own = asked(family)
    if not takes_text_alone(family):
        with pytest.raises(errors.ModelError, match="takes no prompt without an image"):
            model.batch(shown)
        return
    texts = []
    for query in shown:
        message = [{"role": "user", "content": [{"type": "text", "text": query.text}]}]
        texts.append(model.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    special = not texts[0].startswith("<s>")
    tokens = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special)
    twin = model.batch(shown)
    assert torch.equal(twin.inputs["input_ids"][twin.mask], tokens["input_ids"][tokens["attention_mask"].bool()])
    batch, path = model.batch(shown, own), f"{family.blocks}.1"
    states = kept(model, twin, f"{family.blocks}.2", "input")[:, -1]  # what block 1 hands on, even where it only runs beside an image
    V = torch.linalg.qr(torch.randn(model.cfg.d_model, 2, generator=torch.Generator().manual_seed(2))).Q.T
    zero = torch.zeros(1, model.cfg.d_model)
    basis = Directions(V[None], None, zero, zero, torch.zeros(1, 0), "test", provenance=model.provenance)

    def patch(value):
        value = value.clone()
        value[:, -1] += (states - value[:, -1]) @ V.T @ V
        return value

    with hooked(model.hf, path, patch):
        expected = raw(model, batch)[:, -1]
    close(model.run(batch, iv.patch(basis, iv.text_twin).at(layers=[1])).logits[0], expected)
    assert (expected - raw(model, batch)[:, -1]).abs().max() > 1e-3


def test_save_and_load(family, model, tmp_path):
    model.hf.save_pretrained(tmp_path)
    if family.reloads:
        model.processor.save_pretrained(tmp_path)
    again = gl.load(tmp_path, processor=None if family.reloads else model.processor, attn_implementation="eager")
    assert again.id.rpartition("@")[2] == model.id.rpartition("@")[2]
    mine, expected = batch_of(family, again), batch_of(family, model)
    assert {key: value.shape for key, value in mine.inputs.items()} == {key: value.shape for key, value in expected.inputs.items()}
    assert all(torch.equal(value, mine.inputs[key]) for key, value in expected.inputs.items())
    close(again.run(mine).logits, model.run(expected).logits, 1e-6)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_refused_families_say_why(family):
    with pytest.raises(errors.ModelError, match=family.refused):
        gl.load(family.model(), processor=family.processor())


def test_without_an_image_the_stream_passes_blocks_that_only_run_beside_one():
    model = loaded("Llama 3.2 Vision")
    batch, push, after = model.batch(TEXTS), a_push(model), "model.language_model.layers.2"
    _, cache = model.run_with_cache(batch)
    handed_on = kept(model, batch, after, "input")
    assert all(torch.equal(cache[hook, 1], handed_on) for hook in ("resid_pre", "resid_mid", "resid_post"))
    assert ("attn_out", 1) not in cache
    terms, names = cache.decompose_resid()
    close(terms.sum(0)[batch.mask], cache["resid_post", -1][batch.mask])
    assert [name for name in names if name.startswith("1_") or "rest" in name] == []
    with hooked(model.hf, after, at(last(batch), push), "input"):
        expected = raw(model, batch)[:, -1]
    close(model.run(batch, pushing(push).at(layers=[1])).logits[0], expected)
    with pytest.raises(errors.SiteError, match="this layer does not run"):
        model.run(batch, read=[Site("attn_out", layers=(1,))])
