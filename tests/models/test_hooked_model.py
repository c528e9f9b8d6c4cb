"""The engine against raw PyTorch hooks: reads, edits, gates, phases, padding, batches, lanes, and nnsight's silent traps."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import guardlens as gl
from guardlens import directions, errors, gates, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.hooks import Site
from guardlens.models.architectures import find
from tests import reference

TEXTS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)
LAYERS = 8


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(TEXTS, GREY)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


def test_plain_run_is_bit_identical_to_transformers(vlm, batch):
    with torch.no_grad():
        expected = vlm.hf(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, 0]
    assert torch.equal(vlm.run(batch, read=[Site()]).logits[0], expected)


@pytest.mark.parametrize("positions", ["last", "image", "instruction", "post_instruction", "all", (1, 4), (-3, None)])
def test_reads_equal_raw_hooks(vlm, batch, positions):
    kept = {}
    reference.with_hooks(vlm.hf, batch.inputs, keep=kept)
    chosen = batch.select(positions)
    mine = vlm.run(batch, read=[Site(positions=positions)], logits=None).reads[Site(positions=positions)][0]
    for layer, states in kept.items():
        expected = torch.stack([row[mask].mean(0) for row, mask in zip(states, chosen, strict=True)])
        close(mine[:, layer], expected)


def test_cache_equals_hooks_and_adds_up(vlm, batch):
    kept = {}
    logits = reference.with_hooks(vlm.hf, batch.inputs, keep=kept)
    mine, cache = vlm.run_with_cache(batch)
    assert torch.equal(mine, logits)
    for layer in range(LAYERS):
        assert torch.equal(cache["resid_post", layer], kept[layer])
        close(cache["resid_mid", layer], cache["resid_pre", layer] + cache["attn_out", layer])
        close(cache["resid_post", layer], cache["resid_mid", layer] + cache["mlp_out", layer])
    close(vlm.hf.lm_head(cache["ln_final.hook_out"]), logits)


def test_cache_is_a_copy(vlm, batch):
    """Trap: a saved tensor is aliased, and a later edit in place would change it."""

    def in_place(value, hook):
        value[:] = 0
        return value

    _, before = vlm.run_with_cache(batch, names_filter="resid_post")
    taps_seen = {}
    vlm.run_with_hooks(
        batch,
        fwd_hooks=[("blocks.2.hook_resid_post", lambda v, hook: taps_seen.update(a=v.clone())), ("blocks.2.hook_resid_post", in_place)],
    )
    assert torch.equal(taps_seen["a"], before["resid_post", 2])
    _, after = vlm.run_with_cache(batch, names_filter="resid_post")
    assert torch.equal(after["resid_post", 2], before["resid_post", 2])


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("name", ["project_out", "amplify", "replace", "add_component", "add", "add_relative", "linear", "custom"])
def test_every_edit_equals_a_raw_hook(vlm, batch, basis, name, layer):
    basis_at, one = basis.at(layer), basis.truncate(1)
    matrix, vector = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) / 12, basis.harmful_mean
    interventions = {
        "project_out": (iv.project_out(basis), lambda h: h - h @ basis_at.T @ basis_at),
        "amplify": (iv.amplify(basis, 3.0), lambda h: h + 3 * h @ basis_at.T @ basis_at),
        "replace": (iv.replace(basis, vector, 2.0), lambda h: h + (2 * vector[layer] - h) @ basis_at.T @ basis_at),
        "add_component": (iv.add_component(basis, vector, 2.0), lambda h: h + 2 * vector[layer] @ basis_at.T @ basis_at),
        "add": (iv.add(one, 4.0), lambda h: h + 4 * basis_at[0]),
        "add_relative": (iv.add_relative(one, 0.5), lambda h: h + 0.5 * h.norm(dim=-1, keepdim=True) * basis_at[0]),
        "linear": (iv.linear(matrix, 0.5), lambda h: h + 0.5 * h @ matrix),
        "custom": (iv.custom(lambda states, context: states.tanh()), torch.tanh),
    }
    intervention, edit = interventions[name]
    expected = reference.with_hooks(vlm.hf, batch.inputs, edits={layer: reference.at_last(edit)})[:, -1]
    plain = reference.with_hooks(vlm.hf, batch.inputs)[:, -1]
    mine = vlm.run(batch, intervention.at(layers=[layer])).logits[0]
    close(mine, expected)
    assert (expected - plain).abs().max() > 1e-3


def test_the_unembedding_is_read_and_edited_where_its_other_tokens_could_be_left_out(vlm, batch):
    site, ban = Site("unembed"), torch.zeros(vlm.cfg.d_vocab)
    plain = vlm.run(batch, read=[site])
    close(plain.reads[site][0, :, 0], plain.logits[0])
    tokens = vlm.run(batch, new_tokens=4).tokens[0]
    ban[tokens[:, 0].unique()] = -1e4
    intervention = iv.custom(lambda states, context: states + ban).at(hook="unembed")
    assert torch.equal(vlm.run(batch, intervention).logits[0], plain.logits[0] + ban)
    first = vlm.run(batch, intervention, new_tokens=4).tokens[0]
    assert torch.equal(first[:, 0], (plain.logits[0] + ban).argmax(1))
    assert not torch.isin(vlm.run(batch, intervention.during("always"), new_tokens=4).tokens[0], tokens[:, 0].unique()).any()


def test_edits_at_other_hooks_and_positions(vlm, batch, basis):
    shift = 3 * basis.at(2)[0]
    everywhere = vlm.run(batch, iv.add(basis.truncate(1), 3.0).at(hook="resid_pre", layers=[2], positions="all"), logits="last").logits[0]

    def pre(hidden):
        return torch.where(batch.mask[..., None], hidden + shift, hidden)

    close(everywhere, reference.with_hooks(vlm.hf, batch.inputs, pre_edits={2: pre})[:, -1])
    only_image = vlm.run(batch, iv.add(basis.truncate(1), 3.0).at(layers=[2], positions="image")).logits[0]

    def on_image(out):
        return torch.where(batch.image[..., None], out + shift, out)

    close(only_image, reference.with_hooks(vlm.hf, batch.inputs, edits={2: on_image})[:, -1])


def test_text_twin_is_read_from_the_image_free_run(vlm, batch, basis):
    """VLM-Guard's replace, against two raw forwards."""
    twin = vlm.batch(TEXTS, text_only)
    kept = {}
    reference.with_hooks(vlm.hf, twin.inputs, keep=kept)
    V = basis.at(4)

    def edit(h):
        return h + (1.5 * kept[4][:, -1] - h) @ V.T @ V

    expected = reference.with_hooks(vlm.hf, batch.inputs, edits={4: reference.at_last(edit)})[:, -1]
    close(vlm.run(batch, iv.replace(basis, iv.text_twin, gain=1.5).at(layers=[4])).logits[0], expected)


def test_two_states_read_at_the_same_place(vlm, batch, basis):
    """A state of the asking layer and one of a fixed layer may coincide."""
    fixed = iv.State(presentation=text_only, layer=4)
    intervention = iv.patch(basis, iv.text_twin).at(layers=[4]) >> iv.patch(basis, fixed).at(layers=[5])
    assert intervention.requires(LAYERS) == {iv.State(text_only, "resid_post"): {4}, replace(fixed, hook="resid_post"): {4}}
    twin = vlm.run(vlm.batch(TEXTS), read=[Site()], logits=None).reads[Site()][0, :, 4]
    edits = {layer: reference.at_last(lambda h, V=basis.at(layer): h + (twin - h) @ V.T @ V) for layer in (4, 5)}
    close(vlm.run(batch, intervention).logits[0], reference.with_hooks(vlm.hf, batch.inputs, edits=edits)[:, -1])


def test_gate_decides_per_row(vlm, batch, basis):
    """Mixed decisions in one batch: closed rows are bit-identical to no edit, open ones to the ungated edit."""
    states = vlm.run(vlm.batch(TEXTS), read=[Site()], logits=None).reads[Site()][0, :, 3] @ basis.at(3)[0]
    threshold = float(states.median()) + 1e-4
    intervention = iv.amplify(basis, 5.0).when(gates.harmful(basis, threshold)).at(layers=[3])
    run = vlm.run(batch, intervention)
    opened = run.decisions[0, 0, 3]
    assert torch.equal(opened, states > threshold)
    assert 0 < opened.sum() < len(TEXTS)
    plain, edited = vlm.run(batch).logits[0], vlm.run(batch, iv.amplify(basis, 5.0).at(layers=[3])).logits[0]
    assert torch.equal(run.logits[0], torch.where(opened[:, None], edited, plain))
    assert (plain - edited).abs().max() > 1e-3


def test_strength_zero_and_closed_gate_are_bit_identical(vlm, batch, basis):
    plain = vlm.run(batch).logits
    closed = gates.harmful(basis, 1e9)
    for intervention in (
        iv.amplify(basis, 5.0).scaled(0.0),
        iv.replace(basis, iv.text_twin).when(closed),
        iv.project_out(basis).scaled(0.0).at(positions="all"),
    ):
        assert torch.equal(vlm.run(batch, intervention).logits, plain)


def test_strength_interpolates(vlm, batch, basis):
    V = basis.at(5)
    expected = reference.with_hooks(vlm.hf, batch.inputs, edits={5: reference.at_last(lambda h: h - 0.3 * h @ V.T @ V)})[:, -1]
    close(vlm.run(batch, iv.project_out(basis).scaled(0.3).at(layers=[5])).logits[0], expected)


@pytest.mark.parametrize("phase", ["prefill", "decode", "always"])
def test_generation_edits_exactly_the_steps_of_its_phase(vlm, batch, basis, phase):
    """Trap: without iterating over steps, an edit silently changes only the prefill."""
    push = 12 * basis.at(6)[0]
    expected = reference.generate(vlm.hf, batch.inputs, 6, lambda h: h + push, phase, 8)
    intervention = iv.add(basis.truncate(1), 12.0).at(layers=[6]).during(phase)
    assert torch.equal(vlm.run(batch, intervention, new_tokens=8).tokens[0], expected)
    others = [
        reference.generate(vlm.hf, batch.inputs, 6, lambda h: h + push, other, 8) for other in {"prefill", "decode", "always"} - {phase}
    ]
    assert not any(torch.equal(expected, other) for other in others)


def test_decode_edits_meet_every_step(vlm, batch):
    """Trap: an early end of the loop would drop the remaining edits."""
    steps = []

    def note(states, context):
        steps.append(context.decode_step)
        return states

    tokens = vlm.run(batch, iv.custom(note).at(layers=[1]).during("always"), new_tokens=7).tokens
    assert steps == list(range(tokens.shape[-1]))


def test_gate_is_latched_for_decode_steps(vlm, batch, basis):
    calls = []

    def note(states, context):
        calls.append((context.decode_step, context.query.tolist()))
        return states + 12 * basis.at(6)[0]

    states = vlm.run(vlm.batch(TEXTS), read=[Site()], logits=None).reads[Site()][0, :, 6] @ basis.at(6)[0]
    gate = gates.harmful(basis, float(states.median()) + 1e-4)
    intervention = iv.custom(note).when(gate).during("decode").at(layers=[6])
    run = vlm.run(batch, intervention, new_tokens=6)
    plain = vlm.run(batch, new_tokens=6).tokens[0]
    pushed = vlm.run(batch, iv.add(basis.truncate(1), 12.0).at(layers=[6]).during("decode"), new_tokens=6).tokens[0]
    for row, opened in enumerate(run.decisions[0, 0, 6].tolist()):
        assert torch.equal(run.tokens[0, row], (pushed if opened else plain)[row])
    assert calls[0] == (1, [0, 1, 2, 3])


@pytest.mark.parametrize("presentation", [text_only, GREY], ids=["text", "grey"])
def test_alone_in_a_batch_in_any_order_with_either_padding(vlm, presentation, basis):
    intervention = iv.replace(basis, iv.text_twin).when(gates.harmful(basis, "midpoint")).at(layers=[3, 5])
    site = Site()
    alone = [vlm.run(vlm.batch([text], presentation), intervention, read=[site]) for text in TEXTS]
    states, logits = torch.cat([run.reads[site] for run in alone], 1), torch.cat([run.logits for run in alone], 1)
    order = [2, 0, 3, 1]
    for rows, side in ((range(4), "left"), (order, "left"), (range(4), "right")):
        run = vlm.run(vlm.batch([TEXTS[i] for i in rows], presentation, padding_side=side), intervention, read=[site])
        close(run.reads[site], states[:, list(rows)])
        close(run.logits, logits[:, list(rows)])


@pytest.mark.parametrize("layout", ["branch", "tile"])
def test_lanes_equal_separate_runs(vlm, batch, basis, layout):
    interventions = [
        iv.nothing,
        iv.amplify(basis, 2.0).at(layers=[1]),
        iv.replace(basis, iv.text_twin).at(layers=[4]).when(gates.harmful(basis)),
        iv.add(basis.truncate(1), 5.0),
    ]
    together = vlm.run(batch, interventions, read=[Site()], layout=layout)
    assert (together.layout, bool(together.why)) == (layout, layout == "tile")
    for lane, intervention in enumerate(interventions):
        single = vlm.run(batch, intervention, read=[Site()])
        close(together.logits[lane], single.logits[0])
        close(together.reads[Site()][lane], single.reads[Site()][0])
    tokens = vlm.run(batch, interventions, new_tokens=5).tokens
    assert all(
        torch.equal(tokens[lane], vlm.run(batch, intervention, new_tokens=5).tokens[0]) for lane, intervention in enumerate(interventions)
    )


def test_own_state_is_read_before_its_edit_and_after_earlier_ones(vlm, batch, basis):
    V, push = basis.at(4), 5 * basis.at(2)[0]
    intervention = iv.add(basis.truncate(1), 5.0).at(layers=[2]) >> iv.patch(basis, iv.State(layer=2)).at(layers=[4])
    kept = {}
    reference.with_hooks(vlm.hf, batch.inputs, edits={2: reference.at_last(lambda h: h + push)}, keep=kept)

    def edit(h):
        return h + (kept[2][:, -1] - h) @ V.T @ V

    expected = reference.with_hooks(vlm.hf, batch.inputs, edits={2: reference.at_last(lambda h: h + push), 4: reference.at_last(edit)})[
        :, -1
    ]
    close(vlm.run(batch, intervention).logits[0], expected)
    own = vlm.run(batch, iv.patch(basis, iv.own_state)).logits
    close(own, vlm.run(batch).logits)


def test_run_with_hooks_means_what_transformerlens_means(vlm, batch):
    seen = []

    def double(value, hook):
        seen.append((hook.name, hook.layer(), tuple(value.shape)))
        return value * 2

    names = ["blocks.1.hook_resid_post", "blocks.3.hook_out"]
    logits = vlm.run_with_hooks(batch, fwd_hooks=[(name, double) for name in reversed(names)])
    expected = reference.with_hooks(vlm.hf, batch.inputs, edits={1: lambda h: h * 2, 3: lambda h: h * 2})
    assert torch.equal(logits, expected)
    shape = (*batch.mask.shape, 128)
    assert seen == [("blocks.1.hook_resid_post", 1, shape), ("blocks.3.hook_resid_post", 3, shape)]
    assert torch.equal(vlm.run_with_hooks(batch, fwd_hooks=[("resid_post", lambda value, hook: None)]), vlm.run_with_hooks(batch))


def test_model_is_untouched_and_usable_after_an_error(vlm, batch, basis):
    """Traps: edits that outlive the run; gradients that are on; a wrapper broken by an exception in an edit."""
    before = vlm.run(batch).logits

    def broken(states, context):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        vlm.run(batch, iv.custom(broken).at(layers=[1]))
    run = vlm.run(batch, iv.amplify(basis, 9.0), read=[Site()])
    assert not run.logits.requires_grad and not run.reads[Site()].requires_grad
    assert torch.equal(vlm.run(batch).logits, before)


def test_tokenizer_keeps_its_padding_side(processor, hf_vlm):
    """Trap: nnsight's own wrappers set it to left on the user's object."""
    processor.tokenizer.padding_side = "right"
    try:
        model = gl.load(hf_vlm, processor=processor)
        model.run(model.batch(TEXTS, GREY))
        assert processor.tokenizer.padding_side == "right"
    finally:
        processor.tokenizer.padding_side = "left"


def test_text_model(llm):
    batch = llm.batch(TEXTS)
    kept = {}
    reference.with_hooks(llm.hf, batch.inputs, keep=kept)
    mine = llm.run(batch, read=[Site()])
    close(mine.reads[Site()][0].transpose(0, 1), torch.stack([kept[i][:, -1] for i in range(3)]))
    right = llm.run(llm.batch(TEXTS, padding_side="right"), read=[Site()])
    close(right.logits, mine.logits)
    assert "position_ids" in batch.inputs
    assert isinstance(llm.generate(TEXTS[0], max_new_tokens=3), str)
    plain = {name: value for name, value in batch.inputs.items() if name != "position_ids"}
    expected = llm.hf.generate(**plain, max_new_tokens=9, do_sample=False, pad_token_id=0)[:, batch.mask.shape[1] :]
    assert torch.equal(llm.run(batch, new_tokens=9).tokens[0], expected)
    assert len(llm.generate(TEXTS, max_new_tokens=3)) == 4


def test_save_pretrained_round_trip(hf_vlm, processor, vlm, tmp_path):
    hf_vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = gl.load(tmp_path)
    assert loaded.id.rpartition("@")[2] == vlm.id.rpartition("@")[2]
    assert torch.equal(loaded.run(loaded.batch(TEXTS, GREY)).logits, vlm.run(vlm.batch(TEXTS, GREY)).logits)


def test_bfloat16_projects_in_float32(hf_vlm, processor, basis):
    import copy

    half = gl.load(copy.deepcopy(hf_vlm).to(torch.bfloat16), processor=processor)
    batch = half.batch(TEXTS, GREY)
    anyone = directions.random(basis)
    intervention = iv.project_out(anyone.__class__(**{**vars(anyone), "provenance": half.provenance})).at(layers=[4])
    V = anyone.at(4)

    def edit(h):
        return (h.float() - h.float() @ V.T @ V).to(h.dtype)

    expected = reference.with_hooks(half.hf, batch.inputs, edits={4: reference.at_last(edit)})[:, -1]
    assert torch.equal(half.run(batch, intervention).logits[0], expected)


class TestImagesThatAreNotShown:
    def test_asking_with_no_presentation_says_so(self, vlm):
        query = gl.Query("How to fold a paper boat?", images=(Image.new("RGB", (32, 32), "red"),))
        for ask in (vlm.generate, vlm.run_with_cache, vlm.run_with_hooks):
            with pytest.warns(UserWarning, match=r"images of queries are not shown: ask with presentations\.own"):
                ask(query)
        assert vlm.generate(query, presentations.own_images, max_new_tokens=1) is not None
        alone = vlm.run_with_cache(query, text_only)[0]
        assert torch.equal(alone, vlm.run_with_cache(query.text)[0])

    def test_a_text_only_model_has_none_to_show(self, llm):
        llm.generate(gl.Query("How to fold a paper boat?", images=("boat.png",)), max_new_tokens=1)


class TestErrors:
    def test_hook_name(self, vlm):
        with pytest.raises(
            errors.SiteError, match=r"hook name 'blocks.3.hook_resid_pots'.*\n.*\nNext: did you mean 'blocks.3.hook_resid_post'"
        ):
            vlm.run_with_cache("how to mend the hat ?", names_filter="blocks.3.hook_resid_pots")

    def test_layer(self, vlm, batch, basis):
        with pytest.raises(errors.SiteError, match=r"Found layer 8\.\nExpected a layer from 0 to 7\."):
            vlm.run(batch, iv.project_out(basis[3]).at(layers=[8]))
        with pytest.raises(errors.SiteError, match="Found layer 9"):
            vlm.run_with_cache(batch, names_filter="blocks.9.hook_resid_post")

    def test_directions_of_another_model(self, vlm, llm, basis):
        with pytest.raises(errors.MismatchError, match=f"of the model {vlm.id}.\nExpected those of {llm.id}") as caught:
            llm.run(llm.batch(TEXTS), iv.project_out(basis))
        assert "anew" in str(caught.value)

    def test_mixed_widths(self, llm, basis):
        intervention = iv.linear(torch.eye(128))
        with pytest.raises(errors.MismatchError, match=r"of width 128 at resid_post.\nExpected width 32"):
            llm.run(llm.batch(TEXTS), intervention)

    def test_image_on_a_text_model(self, llm):
        with pytest.raises(errors.PresentationError, match="'blank grey', which shows an image, for a text-only model"):
            llm.batch(TEXTS, GREY)

    def test_query_without_own_image(self, vlm):
        with pytest.raises(errors.PresentationError, match="query 'q7' without an own image"):
            vlm.batch([gl.Query("how to mend the hat ?", id="q7")], presentations.own_images)

    def test_no_queries(self, vlm):
        with pytest.raises(errors.QueryError, match="no queries"):
            vlm.batch([])

    def test_image_token_in_text(self, vlm):
        with pytest.raises(errors.QueryError, match="image token '<image>' in the text of query 'x'"):
            vlm.batch([gl.Query("how to <image> ?", id="x")])

    def test_positions_without_tokens(self, vlm):
        with pytest.raises(errors.SiteError, match="no token at positions 'image' in query"):
            vlm.run(vlm.batch(TEXTS), read=[Site(positions="image")])

    def test_nan_names_layer_and_query(self, vlm, batch):
        def poison(states, context):
            states = states.clone()
            states[2] = float("nan")
            return states

        text = rf"NaN or infinity at blocks.3.hook_resid_post after the edit custom\(.*poison\), query '{batch.queries[2].id}'"
        for asked in ({"read": [Site()]}, {}, {"logits": "all"}, {"logits": None, "read": [Site(layers=(1,))]}):
            with pytest.raises(errors.NumericsError, match=text):
                vlm.run(batch, iv.custom(poison).at(layers=[3]), **asked)

    def test_text_twin_of_a_model_without_one(self, hf_vlm, processor, basis):
        class NeedsImages:
            tokenizer, image_token = processor.tokenizer, processor.image_token
            chat_template = processor.chat_template

            def apply_chat_template(self, conversation, **options):
                return processor.apply_chat_template(conversation, **options)

            def __call__(self, images=None, **options):
                if images is None:
                    raise ValueError("images are required")
                return processor(images=images, **options)

        model = gl.load(hf_vlm, processor=NeedsImages())
        batch = model.batch(TEXTS, GREY)
        model.run(batch, iv.amplify(directions.random(basis)))
        with pytest.raises(errors.ModelError, match=r"NeedsImages, which takes no prompt without an image[\s\S]*text twin"):
            model.run(batch, iv.replace(basis, iv.text_twin))

    def test_state_that_comes_too_late(self, vlm, batch, basis):
        with pytest.raises(errors.InterventionError, match=r"blocks.2.hook_resid_post that needs this run's own blocks.5.hook_resid_post"):
            vlm.run(batch, iv.patch(basis, iv.State(layer=5)).at(layers=[2]))

    def test_generation_needs_left_padding(self, vlm):
        with pytest.raises(errors.InterventionError, match="padded on the right"):
            vlm.run(vlm.batch(TEXTS, padding_side="right"), new_tokens=2)

    def test_loading(self, tmp_path, hf_vlm):
        with pytest.raises(errors.ModelError, match="which transformers can't load"):
            gl.load(tmp_path)
        with pytest.raises(errors.ModelError, match="a module without its processor"):
            gl.load(hf_vlm)
        with pytest.raises(errors.ModelError, match=r"Conv2d, in which no stack was found[\s\S]*names=\{\"stack\": \"its.path\"\}"):
            find(torch.nn.Conv2d(1, 1, 1))


def test_importing_guardlens_is_light():
    """Nothing heavy until it is used; and jaxtyping's checks need beartype imported before nnsight, as trace_driver does."""
    heavy = ("nnsight", "transformers", "pandas", "matplotlib", "sklearn", "scipy")
    code = f"import sys, guardlens; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    code = "import guardlens.models.hooked_model, beartype"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_generation_that_ends_early_keeps_its_edits_and_warns_of_nothing():
    """Trap: a bounded iteration over steps that the end-of-sequence token cuts short warns, and warnings are errors here."""
    organism = gl.load("organism")
    batch = organism.batch(gl.organism.queries("validation")[:6], GREY)
    steps = []

    def note(states, context):
        steps.append(context.decode_step)
        return states

    plain = organism.run(batch, new_tokens=16).tokens[0]
    noted = organism.run(batch, iv.custom(note).at(layers=[3]).during("always"), new_tokens=16).tokens[0]
    assert torch.equal(plain, noted)
    assert steps == list(range(plain.shape[1])) and plain.shape[1] < 16


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_model_in_use_and_its_cache_can_be_copied(copied):
    own = gl.load("organism")  # where a test asked the shared one for hidden states, transformers left a hook that pickle refuses
    batch = own.batch("how to mend the hat ?")
    logits, cache = own.run_with_cache(batch)
    another = copied(own)
    assert another.id == own.id
    torch.testing.assert_close(another.run(batch).logits[0], logits[:, -1], atol=1e-4, rtol=1e-4)
    again = copied(cache)
    assert list(again) == list(cache) and torch.equal(again["resid_post", 3], cache["resid_post", 3])
    assert torch.equal(again.logit_lens(), cache.logit_lens())


def test_a_deep_copy_is_a_model_of_its_own(vlm):
    batch = vlm.batch("how to mend the hat ?")
    before = vlm.run(batch).logits
    another = copy.deepcopy(vlm)
    with torch.no_grad():
        another.hf.get_decoder().layers[3].mlp.down_proj.weight.mul_(3)
    assert torch.equal(vlm.run(batch).logits, before) and not torch.allclose(another.run(batch).logits, before)
    assert another.id != vlm.id


class TestTheLanguageModel:
    def test_it_refuses_images_however_they_come(self, vlm, batch):
        assert batch.beside_image and vlm.llm.hf is vlm.hf and vlm.llm.llm is vlm.llm and vlm.llm.id == vlm.id
        calls = (
            lambda llm: llm.batch(TEXTS, batch.presentation),
            lambda llm: llm.run(batch),
            lambda llm: llm.prefill(batch),
            lambda llm: llm.generate(TEXTS[0], batch.presentation),
            lambda llm: llm.run_with_cache(batch),
            lambda llm: gl.collect(llm, TEXTS, batch.presentation),
        )
        for call in calls:
            with pytest.raises(errors.PresentationError, match="an image for the language model of"):
                call(vlm.llm)

    def test_it_gives_what_the_model_gives_of_text(self, vlm):
        assert torch.equal(vlm.llm.run(vlm.llm.batch(TEXTS)).logits, vlm.run(vlm.batch(TEXTS)).logits)
        assert vlm.llm._tests is vlm._tests


@pytest.mark.filterwarnings("ignore:what guardlens measures includes the hook")
def test_a_plain_read_passes_few_modules(vlm, batch):
    """From `run` to the model's forward pass, a call goes through these modules, and a reader with it."""
    passed = set()

    def note(module, args):
        frame = sys._getframe()
        while frame is not None:
            passed.add(str(frame.f_globals.get("__name__")))
            frame = frame.f_back

    with vlm.hf.get_submodule(vlm.cfg.decoder).register_forward_pre_hook(note):
        vlm.run(batch, read=[Site()])
    inside = {name.removeprefix("guardlens.models.") for name in passed if name.startswith("guardlens.")}
    engine = {"engine.scheduler", "engine.strategies.tiles", "engine.forward", "engine.drivers.nnsight_trace"}
    assert inside == {"hooked_model", *engine}
