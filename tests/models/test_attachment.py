"""An attached guard against `HookedModel`, token for token, and against raw PyTorch hooks where `HookedModel` has no say (beams)."""

import copy
import dataclasses
import subprocess
import sys
import threading
from functools import cache

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlavaProcessor, PreTrainedTokenizerFast, XGLMConfig, XGLMForCausalLM

import guardlens as gl
from guardlens import errors, gates, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import Prompt, WithoutImages, text_only
from guardlens.directions import Directions
from guardlens.models.architectures import find, unwrapped
from guardlens.models.processing import chat_template as prompts
from guardlens.models.processing.text_twin import ImageRemover
from tests import reference, zoo
from tests.zoo.family import TEXTS as SENTENCES
from tests.zoo.family import build, tokenizer
from tests.zoo.text import TEMPLATE

TEXTS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)
ALL = {family.name: family for family in zoo.FAMILIES}
EYES = [name for name, family in ALL.items() if family.vision and not family.refused]
RUNNING = [name for name, family in ALL.items() if not family.refused and "text alone" not in dict(family.unsupported)]
CLOSELY = ["LLaVA-1.5", "Qwen2.5-VL", "Gemma 3", "Idefics3", "GPT-2"]
CUT = "whose prompts can't be rebuilt without their images"


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(TEXTS, GREY)


@pytest.fixture
def attach(hf_vlm, processor):
    """`attach` to the session's model, and its removal."""
    made = []

    def put(intervention, hf=hf_vlm, by=processor, **options):
        made.append(gl.attach(intervention, hf, by, **options))
        return made[-1]

    yield put
    for handle in made:
        handle.remove()


@pytest.fixture(scope="module")
def gate(vlm, basis):
    """Opens for some of the queries at layer 3 and for some at layer 5."""
    states = vlm.run(vlm.batch(TEXTS), read=[gl.Site()], logits=None).reads[gl.Site()][0]
    scores = torch.einsum("qld,ld->ql", states, basis.vectors[:, 0])
    return gates.harmful(basis, scores.median(dim=0).values + 1e-4)


PLANS = {
    "twin": lambda basis, gate: iv.replace(basis, iv.text_twin, gain=3.0).at(layers=[3, 5]),
    "twin, gated": lambda basis, gate: iv.replace(basis, iv.text_twin, gain=3.0).when(gate).at(layers=[3, 5]),
    "gated, always": lambda basis, gate: iv.replace(basis, iv.text_twin, gain=3.0).when(gate).at(layers=[5]).during("always"),
    "decode": lambda basis, gate: iv.add(basis.truncate(1), 12.0).at(layers=[6]).during("decode"),
    "strength": lambda basis, gate: iv.amplify(basis, 9.0).scaled(0.6).at(layers=[1, 2, 4]),
    "own state": lambda basis, gate: iv.patch(basis, iv.State(layer=2)).at(layers=[3, 4, 5]).during("always"),
    "z": lambda basis, gate: iv.add(dataclasses.replace(basis.truncate(1), hook="z"), 9.0).at(hook="z", layers=[2, 3], positions="all"),
    "attn_out": lambda basis, gate: iv.add(basis.truncate(1), 9.0).at(hook="attn_out", layers=[4]).during("always"),
    "resid_pre": lambda basis, gate: iv.add(basis.truncate(1), 9.0).at(hook="resid_pre", layers=[3], positions="image"),
    "z of the twin": lambda basis, gate: iv.swap(iv.State(text_only, "z", 1, "all")).at(hook="ln_final", positions="last"),
    "two steps": lambda basis, gate: iv.add(basis.truncate(1), 5.0).at(layers=[1], positions=(1, 4)) >> iv.amplify(basis, 3.0).when(~gate),
}
OPTIONS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampled": {"do_sample": True, "temperature": 1.3},
    "sampled, no cache": {"do_sample": True, "use_cache": False},
}


def generate(hf, batch, new_tokens=8, seed=5, **options):
    """What any code that knows only transformers does."""
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, **options}
    inputs = {name: value for name, value in batch.inputs.items() if name != "position_ids"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return hf.generate(**inputs, **settings)[:, batch.mask.shape[1] :]


def hooks(hf):
    """All hooks on a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return [
        (path, kind) for path, module in hf.named_modules() for kind in (*kinds, "_forward_pre_hooks_with_kwargs") if vars(module)[kind]
    ]


class TestAgainstHookedModel:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("intervention", PLANS.values(), ids=PLANS)
    def test_tokens(self, vlm, hf_vlm, batch, basis, gate, attach, intervention, options):
        intervention = intervention(basis, gate)
        run = vlm.run(batch, intervention, new_tokens=8, seed=5, generation=options)
        plain = generate(hf_vlm, batch, **options)
        handle = attach(intervention)
        mine = generate(hf_vlm, batch, **options)
        assert torch.equal(mine, run.tokens[0]) and not torch.equal(mine, plain)
        assert handle.decisions.keys() == {key[1:] for key in run.decisions}
        assert all(torch.equal(opened, run.decisions[0, *key]) for key, opened in handle.decisions.items())
        handle.remove()
        assert torch.equal(generate(hf_vlm, batch, **options), plain)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("intervention", [name for name in PLANS if name != "decode"])
    def test_logits_of_a_plain_forward(self, vlm, hf_vlm, basis, gate, attach, intervention, side):
        intervention, batch = PLANS[intervention](basis, gate), vlm.batch(TEXTS, GREY, padding_side=side)
        expected, plain = vlm.run(batch, intervention, logits="all").logits[0], vlm.run(batch, logits="all").logits[0]
        attach(intervention)
        with torch.no_grad():
            assert torch.equal(hf_vlm(**batch.inputs).logits, expected) and not torch.equal(expected, plain)
            ids, mask, pixels = (batch.inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))
            assert torch.equal(hf_vlm(ids, pixels, mask).logits, expected)

    def test_a_gate_decides_row_by_row(self, hf_vlm, batch, basis, gate, attach):
        edit = iv.replace(basis, iv.text_twin, gain=3.0).at(layers=[5]).during("always")
        plain = generate(hf_vlm, batch)
        with attach(edit):
            edited = generate(hf_vlm, batch)
        handle = attach(edit.when(gate))
        mine, opened = generate(hf_vlm, batch), handle.decisions[0, 5]
        assert 0 < opened.sum() < len(TEXTS) and torch.equal(mine, torch.where(opened[:, None], edited, plain))
        assert not (edited == plain).all(dim=1).any()

    def test_one_handle_for_many_prompts(self, vlm, hf_vlm, basis, gate, attach):
        """Every prefill is a new run, whatever came before; prompts with and without an image may share a batch."""
        intervention = PLANS["gated, always"](basis, gate)
        picture = Image.new("RGB", (32, 32), "teal")
        mixed = [gl.Query(text, images=(picture,) * shown) for text, shown in zip(TEXTS, (1, 0, 2, 0), strict=True)]
        handle = attach(intervention)

        def own(query):
            return Prompt(query.text, query.images)

        own.name = "own"
        for queries, show in ((TEXTS, GREY), (TEXTS[:1], text_only), (mixed, own), (TEXTS[::-1], GREY), (TEXTS[::-1], GREY)):
            batch = vlm.batch(queries, show)
            handle.remove()
            expected = vlm.run(batch, intervention, new_tokens=6).tokens[0]
            handle = attach(intervention)
            assert torch.equal(generate(hf_vlm, batch, 6), expected)
            assert torch.equal(generate(hf_vlm, batch, 6, use_cache=False), expected)

    def test_a_longer_prompt_is_a_new_one(self, hf_vlm, batch, basis, attach):
        """Without a cache, one token more is the next step of the answer; a second turn that begins with the first is not."""
        intervention, ids = iv.amplify(basis, 9.0).at(layers=[3]), batch.inputs["input_ids"]
        longer = {name: value for name, value in batch.inputs.items() if name not in ("input_ids", "attention_mask")}
        longer["input_ids"] = torch.cat([ids, ids[:, -3:]], 1)
        longer["attention_mask"] = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 3), value=1)
        with torch.no_grad():
            with attach(intervention):
                expected = hf_vlm(**longer).logits
            attach(intervention)
            hf_vlm(**batch.inputs)
            assert torch.equal(hf_vlm(**longer).logits, expected)

    def test_words_around_the_query_stay_in_the_twin(self, vlm, hf_vlm, basis, gate, attach):
        batch = vlm.batch(TEXTS, presentations.chat(presentations.framed(GREY, "please", "now"), "i want", "tell"))
        expected = vlm.run(batch, PLANS["twin"](basis, gate), new_tokens=6).tokens[0]
        attach(PLANS["twin"](basis, gate))
        assert torch.equal(generate(hf_vlm, batch, 6), expected)

    def test_a_decoding_loop_of_ones_own(self, hf_vlm, batch, basis, gate, attach):
        attach(PLANS["gated, always"](basis, gate))
        expected = generate(hf_vlm, batch, 5)
        inputs, tokens = dict(batch.inputs), []
        with torch.no_grad():
            for _ in range(5):
                out = hf_vlm(**inputs, use_cache=True)
                tokens.append(out.logits[:, -1:].argmax(-1))
                mask = torch.nn.functional.pad(batch.mask.long(), (0, len(tokens)), value=1)
                inputs = {"input_ids": tokens[-1], "attention_mask": mask, "past_key_values": out.past_key_values}
        # The caller's own loop does not stop at the end-of-sequence token.
        ended = (expected == 2).cumsum(1) - (expected == 2).long() > 0
        assert torch.equal(torch.where(ended, 0, torch.cat(tokens, 1)[:, : expected.shape[1]]), expected)

    def test_bfloat16(self, hf_vlm, processor, basis, gate, attach):
        half = gl.load(copy.deepcopy(hf_vlm).to(torch.bfloat16), processor=processor)
        own = Directions(**{**vars(basis), "provenance": half.provenance})
        intervention = iv.replace(own, iv.text_twin, gain=3.0).at(layers=[3, 5])
        batch = half.batch(TEXTS, GREY)
        batch.inputs["pixel_values"] = batch.inputs["pixel_values"].to(torch.bfloat16)
        expected = half.run(batch, intervention, new_tokens=6).tokens[0]
        assert not torch.equal(generate(half.hf, batch, 6), expected)
        attach(intervention, half.hf)
        assert torch.equal(generate(half.hf, batch, 6), expected)

    def test_a_text_model(self, llm, attach):
        generator = torch.Generator().manual_seed(3)
        vectors = torch.linalg.qr(torch.randn(3, 32, 2, generator=generator)).Q.transpose(1, 2).contiguous()
        means = torch.randn(2, 3, 32, generator=generator)
        own = Directions(vectors, (0, 1, 2), means[0], means[1], torch.zeros(3, 0), "test", provenance=llm.provenance)
        intervention = iv.add_component(own, iv.text_twin, 6.0).at(layers=[1, 2]).during("always")
        batch = llm.batch(TEXTS)
        for options in OPTIONS.values():
            expected, plain = (
                llm.run(batch, intervention, new_tokens=8, seed=5, generation=options).tokens[0],
                generate(llm.hf, batch, **options),
            )
            with attach(intervention, llm.hf, None):
                mine = generate(llm.hf, batch, **options)
            assert torch.equal(mine, expected) and not torch.equal(mine, plain)


class TestAgainstRawHooks:
    def test_an_edit_in_a_forward(self, hf_vlm, batch, basis, attach):
        V = basis.at(4)
        expected = reference.with_hooks(hf_vlm, batch.inputs, edits={4: reference.at_last(lambda h: h - h @ V.T @ V)})
        attach(iv.project_out(basis).at(layers=[4]))
        with torch.no_grad():
            mine = hf_vlm(**batch.inputs).logits
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
        assert (mine - reference.with_hooks(hf_vlm, batch.inputs)).abs().max() < 1e-6  # a raw run of the guarded model is guarded too

    @pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3, "do_sample": True}])
    @pytest.mark.parametrize("cached", [True, False])
    def test_beams_and_several_answers(self, vlm, hf_vlm, batch, basis, gate, attach, options, cached):
        """Rows repeat each prompt, and beams change places; all rows of a prompt have its twin and its decision."""
        twin, times, layer = vlm.batch(TEXTS), 3, 5
        kept = {}
        reference.with_hooks(hf_vlm, twin.inputs, keep=kept)
        states = kept[layer][:, -1]
        opened = states @ basis.at(layer)[0] > gate.thresholds[layer]
        V, width = basis.at(layer), batch.mask.shape[1]
        rows, open_rows = states.repeat_interleave(times, 0), opened.repeat_interleave(times, 0)[:, None]

        def edit(h):
            return torch.where(open_rows, h + (3 * rows - h) @ V.T @ V, h)

        def always(module, args, out):
            first = width - 1 if out.shape[1] > 1 else 0
            return torch.cat([out[:, :first], torch.stack([edit(column) for column in out[:, first:].unbind(1)], 1)], 1)

        plain = generate(hf_vlm, batch, use_cache=cached, **options)
        raw = reference.blocks(hf_vlm)[layer].register_forward_hook(always)
        expected = generate(hf_vlm, batch, use_cache=cached, **options)
        raw.remove()
        handle = attach(PLANS["gated, always"](basis, gate))
        mine = generate(hf_vlm, batch, use_cache=cached, **options)
        assert torch.equal(mine, expected) and not torch.equal(mine, plain)
        assert torch.equal(handle.decisions[0, layer], opened.repeat_interleave(times))

    def test_the_unembedding(self, hf_vlm, batch, attach):
        """Generation asks for the logits of the last token alone, whose column is then another."""
        push = 5 * torch.randn(hf_vlm.config.text_config.vocab_size, generator=torch.Generator().manual_seed(0))
        raw = hf_vlm.lm_head.register_forward_hook(lambda module, args, out: torch.cat([out[:, :-1], out[:, -1:] + push], 1))
        expected = generate(hf_vlm, batch)
        raw.remove()
        attach(iv.custom(lambda states, context: states + push).at(hook="unembed").during("always"))
        assert torch.equal(generate(hf_vlm, batch), expected)
        with torch.no_grad():
            every = hf_vlm(**batch.inputs).logits
            assert torch.equal(hf_vlm(**batch.inputs, logits_to_keep=2).logits, every[:, -2:])
            assert torch.equal(hf_vlm(**batch.inputs, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]])


@cache
def loaded(name):
    return gl.load(ALL[name].model(), processor=ALL[name].processor())


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


class TestFamilies:
    @pytest.mark.parametrize(("name", "images"), [*((name, 1) for name in RUNNING), *((name, 2) for name in CLOSELY)])
    def test_tokens(self, name, images, attach):
        """Ragged batches with pictures of two sizes: rows differ in their number of image tokens."""
        model, sizes = loaded(name), ALL[name].images
        shown = [tuple(picture(9 * row + i, sizes[(row + i) % 2]) for i in range(images)) for row in range(4)]
        queries = [gl.Query(text, images=shown[row] if model.sees_images else ()) for row, text in enumerate(SENTENCES)]
        batch = model.batch(queries, _Own())
        layers, width = model.cfg.n_layers, model.cfg.d_model
        generator = torch.Generator().manual_seed(3)
        vectors = torch.linalg.qr(torch.randn(layers, width, 2, generator=generator)).Q.transpose(1, 2).contiguous()
        means = torch.randn(2, layers, width, generator=generator)
        own = Directions(vectors, tuple(range(layers)), means[0], means[1], torch.zeros(layers, 0), "test", provenance=model.provenance)
        twin = model.run(model.batch(queries, WithoutImages(_Own())), read=[gl.Site()], logits=None).reads[gl.Site()][0]
        threshold = torch.einsum("qld,ld->ql", twin, own.vectors[:, 0]).median(dim=0).values + 1e-5
        edit = iv.replace(own, iv.text_twin, gain=9.0) if model.sees_images else iv.amplify(own, 9.0)
        intervention = edit.when(gates.harmful(own, threshold)).at(layers=[1, 2]).during("always")
        plain, expected = generate(model.hf, batch), model.run(batch, intervention, new_tokens=8)
        handle = attach(intervention, model.hf, model.processor)
        for options in ({}, {"use_cache": False}) if name in CLOSELY else ({},):
            mine = generate(model.hf, batch, **options)
            assert torch.equal(mine, expected.tokens[0]) and not torch.equal(mine, plain)
        assert all(torch.equal(handle.decisions[0, layer], expected.decisions[0, 0, layer]) for layer in (1, 2))
        assert all(opened.any() and not opened.all() for opened in handle.decisions.values())

    @pytest.mark.parametrize("name", EYES)
    def test_the_twin_has_the_tokens_of_the_prompt_without_images(self, name):
        family = ALL[name]
        processor, token = family.processor(), find(family.model()).image_token_id
        if "text alone" in dict(family.unsupported):
            with pytest.raises(errors.ModelError, match=CUT):
                ImageRemover.learn(processor, token)
            return
        remover = ImageRemover.learn(processor, token)
        alone = [Prompt(SENTENCES[0], system=system, prefill="Sure, here") for system in ("", "You are a careful helper.")]
        for count in (1, 2, 3) if "several images in a prompt" not in dict(family.unsupported) else (1,):
            pictures = tuple(picture(i, family.images[i % 2]) for i in range(count))
            for bare in alone:
                shown = [Prompt(bare.text, pictures, bare.system, bare.prefill), Prompt(SENTENCES[2], pictures[:1])]
                try:
                    expected = prompts.tokenize(processor, [bare, Prompt(SENTENCES[2])], "left", True)
                except errors.PresentationError:
                    continue  # the template has no place for a system prompt
                inputs = prompts.tokenize(processor, shown, "left", True)
                twin = remover(inputs)
                assert twin.keys() == expected.keys() and all(torch.equal(twin[key], expected[key]) for key in expected)
                assert twin["input_ids"].shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("spaces", ["before each stretch", "at the start"])
def test_tokenizers_that_add_spaces(spaces):
    """Llama's own (LLaVA-1.5's) puts a space before each stretch of text between special tokens; newer ones before the first alone."""
    words = Tokenizer(models.BPE())
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if spaces == "at the start":
        words.normalizer, words.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    marks = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=marks, show_progress=False)
    words.train_from_iterator([*SENTENCES, "USER: ASSISTANT: \n"], trainer)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        clean_up_tokenization_spaces=False, extra_special_tokens={"image_token": "<image>"})  # fmt: skip
    family = ALL["LLaVA-1.5"].processor()
    template = family.chat_template.replace("{{ bos_token }}", "")
    processor = LlavaProcessor(family.image_processor, tokenizer, patch_size=8, num_additional_image_tokens=1,
                               vision_feature_select_strategy="default", chat_template=template)  # fmt: skip
    shown = [Prompt(SENTENCES[0], (picture(0, (32, 32)),)), Prompt(SENTENCES[2])]
    inputs = prompts.tokenize(processor, shown, "left", True)
    expected = prompts.tokenize(processor, [Prompt(SENTENCES[0]), Prompt(SENTENCES[2])], "left", True)["input_ids"]
    assert (inputs["input_ids"] == 1).sum() == 2  # the tokenizer itself writes <s>
    assert torch.equal(ImageRemover.learn(processor, 3)(inputs)["input_ids"], expected)


class _Own:
    """Images as they are."""

    name = "own"

    def __call__(self, query):
        return Prompt(query.text, query.images)


class TestInOtherCode:
    def test_without_nnsight(self, vlm, hf_vlm, processor, basis, gate, batch, tmp_path):
        """A saved intervention, a fresh process, and nothing of the lab."""
        intervention = PLANS["gated, always"](basis, gate)
        intervention.save(tmp_path / "guard.safetensors")
        hf_vlm.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        code = f"""
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
import guardlens as gl
hf = AutoModelForImageTextToText.from_pretrained("model")
processor = AutoProcessor.from_pretrained("model")
torch.set_num_threads(1)
chats = [[{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": text}}]}}] for text in {TEXTS!r}]
texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
image = Image.new("RGB", (32, 32), (128, 128, 128))
inputs = processor(text=texts, images=[[image]] * 4, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
with gl.attach(gl.Intervention.load("guard.safetensors"), hf, processor):
    tokens = hf.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
print(tokens[:, inputs["input_ids"].shape[1]:].tolist(), "nnsight" in sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().splitlines()[-1] == f"{vlm.run(batch, intervention, new_tokens=8).tokens[0].tolist()} False"

    def test_a_loaded_intervention(self, hf_vlm, basis, gate, batch, attach, tmp_path):
        intervention = PLANS["twin, gated"](basis, gate)
        intervention.save(tmp_path / "guard.safetensors")
        with attach(intervention):
            expected = generate(hf_vlm, batch)
        attach(gl.Intervention.load(tmp_path / "guard.safetensors"))
        assert torch.equal(generate(hf_vlm, batch), expected)

    def test_a_pipeline_of_images_and_text(self, vlm, hf_vlm, processor, basis, gate, attach):
        from transformers import pipeline

        intervention = PLANS["twin"](basis, gate)
        picture = Image.new("RGB", (32, 32), "teal")
        ask = pipeline("image-text-to-text", model=hf_vlm, processor=processor)
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": TEXTS[0]}]}]

        def answer():
            return ask(text=chat, max_new_tokens=8, return_full_text=False, generate_kwargs={"do_sample": False})[0]["generated_text"]

        query, plain = gl.Query(TEXTS[0], images=(picture,)), answer()
        expected = vlm.generate(query, _Own(), intervention, max_new_tokens=8)
        attach(intervention)
        assert answer().strip() == expected != plain.strip()

    def test_a_pipeline_of_text(self, llm, attach):
        from transformers import pipeline

        intervention = iv.custom(lambda states, context: states.flip(-1)).at(layers=[1]).during("always")
        ask = pipeline("text-generation", model=llm.hf, tokenizer=llm.tokenizer)

        def answer():
            return ask(TEXTS[0], max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"].strip()

        plain, expected = answer(), llm.generate(TEXTS[0], intervention=intervention, max_new_tokens=8)
        attach(intervention, llm.hf, llm.processor)
        assert answer() == expected != plain

    def test_an_adapter_around_the_model(self, hf_vlm, batch, basis, gate, attach):
        """PEFT's forward calls the inner model's `forward`, round its hooks; its `generate` calls the inner model's."""
        plain, expected = generate(hf_vlm, batch), None
        with attach(PLANS["gated, always"](basis, gate)):
            expected = generate(hf_vlm, batch)
            with torch.no_grad():
                logits = hf_vlm(**batch.inputs).logits
        adapted = _Adapter(hf_vlm)
        intervention = iv.Intervention(tuple(PLANS["gated, always"](*_anyones(basis, gate)).steps))
        attach(intervention, adapted)
        assert torch.equal(generate(adapted, batch), expected) and not torch.equal(expected, plain)
        with torch.no_grad():
            assert torch.equal(adapted(**batch.inputs).logits, logits)


def _anyones(basis, gate):
    """The same, made for no model in particular: an adapter's fingerprint is another."""
    from dataclasses import replace

    from guardlens.results.provenance import Provenance

    return Directions(**{**vars(basis), "provenance": Provenance("")}), replace(gate, model="")


class _Adapter(torch.nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class TestHandle:
    def test_nothing_is_left_behind(self, hf_vlm, processor, batch, basis, gate):
        weights = {name: value.clone() for name, value in hf_vlm.state_dict().items()}
        mine, before = hooks(hf_vlm), dict(vars(hf_vlm))
        plain = generate(hf_vlm, batch)
        with gl.attach(PLANS["twin, gated"](basis, gate), hf_vlm, processor) as handle:
            assert hooks(hf_vlm) != mine and "gain=3" in repr(handle) and "removed" not in repr(handle)
            generate(hf_vlm, batch)
        assert hooks(hf_vlm) == mine and "removed" in repr(handle)
        assert vars(hf_vlm).keys() == before.keys() and all(vars(hf_vlm)[name] is value for name, value in before.items())
        assert all(torch.equal(hf_vlm.state_dict()[name], value) for name, value in weights.items())
        assert torch.equal(generate(hf_vlm, batch), plain)
        handle.remove()

    def test_others_hooks_stay(self, hf_vlm, processor, batch, basis, gate):
        calls = []
        other = hf_vlm.register_forward_pre_hook(lambda module, args: calls.append(1))
        with gl.attach(PLANS["twin"](basis, gate), hf_vlm, processor):
            generate(hf_vlm, batch, 3)
        assert len(calls) == 3
        generate(hf_vlm, batch, 3)
        assert len(calls) == 6
        other.remove()

    @pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("at", [0, 2])
    def test_an_error_inside_leaves_it_usable(self, hf_vlm, batch, basis, attach, kind, at):
        fails = [True]

        def edit(states, context):
            if fails[0] and context.decode_step == at:
                raise kind("mine")
            return states + 12 * basis.at(6)[0]

        attach(iv.custom(edit).at(layers=[6]).during("always"))
        between = hooks(hf_vlm)
        with pytest.raises(kind, match="mine"):
            generate(hf_vlm, batch)
        assert kind is KeyboardInterrupt or hooks(hf_vlm) == between
        fails[0] = False
        expected = reference.generate(hf_vlm, batch.inputs, 6, lambda h: h, "prefill", 8)
        assert torch.equal(generate(hf_vlm, batch), expected)

    def test_an_error_in_the_block_removes_it(self, hf_vlm, processor, basis):
        mine = hooks(hf_vlm)
        with pytest.raises(RuntimeError, match="theirs"), gl.attach(iv.project_out(basis), hf_vlm, processor):
            raise RuntimeError("theirs")
        assert hooks(hf_vlm) == mine

    def test_gradients_are_the_callers_business(self, hf_vlm, batch, basis, attach):
        seen = []

        def edit(states, context):
            held = context.held(iv.text_twin)
            seen.append((states.requires_grad, held.requires_grad))
            return states + held

        attach(iv.custom(edit, (iv.text_twin,)).at(layers=[2]))
        logits = hf_vlm(**batch.inputs).logits
        (slope,) = torch.autograd.grad(logits[:, -1].logsumexp(-1).sum(), [hf_vlm.get_input_embeddings().weight])
        assert slope.abs().sum() > 0 and seen == [(True, False)]


class TestErrors:
    def test_another_models_intervention(self, llm, basis):
        with pytest.raises(errors.MismatchError, match=r"of the model \S+@\w+\.\nExpected those of LlamaForCausalLM@\w+"):
            gl.attach(iv.project_out(basis), llm.hf)

    def test_another_width(self, llm):
        with pytest.raises(errors.MismatchError, match=r"of width 128 at resid_post.\nExpected width 32"):
            gl.attach(iv.linear(torch.eye(128)), llm.hf)

    def test_layer(self, attach, basis):
        with pytest.raises(errors.SiteError, match="Found layer 8"):
            attach(iv.project_out(basis).at(layers=[8]))

    @pytest.mark.parametrize("positions", ["instruction", "post_instruction"])
    def test_positions_that_tokens_do_not_tell(self, attach, basis, positions):
        text = (
            f"the positions '{positions}', which tokens alone do not tell.\nExpected 'last', 'all', 'image' or .*\nNext: choose these with"
        )
        with pytest.raises(errors.InterventionError, match=text):
            attach(iv.project_out(basis).at(positions=positions))
        with pytest.raises(errors.InterventionError, match=text):
            attach(iv.project_out(basis).when(gates.harmful(basis, state=iv.State(text_only, positions=positions))))

    def test_another_presentations_state(self, attach, basis):
        with pytest.raises(
            errors.InterventionError, match=r"a state of the presentation 'blank grey'[\s\S]*run this intervention with a HookedModel"
        ):
            attach(iv.patch(basis, iv.State(GREY)))

    def test_a_state_that_comes_too_late(self, attach, basis):
        with pytest.raises(errors.InterventionError, match=r"needs this run's own blocks.5.hook_resid_post"):
            attach(iv.patch(basis, iv.State(layer=5)).at(layers=[2]))

    def test_a_second_guard(self, attach, basis, hf_vlm):
        first = attach(iv.project_out(basis))
        before = hooks(hf_vlm)
        with pytest.raises(
            errors.InterventionError, match=r"a second guard on a model with Attachment\([\s\S]*join the interventions with >>"
        ):
            attach(iv.project_out(basis))
        assert hooks(hf_vlm) == before
        first.remove()
        attach(iv.project_out(basis))

    def test_twin_without_a_processor(self, attach, basis):
        with pytest.raises(errors.ModelError, match=r"without a processor[\s\S]*attach\(intervention, hf, processor\)"):
            attach(iv.patch(basis, iv.text_twin), by=None)
        attach(iv.project_out(basis), by=None)

    def test_embeddings_instead_of_ids(self, hf_vlm, attach, basis):
        attach(iv.project_out(basis))
        with pytest.raises(errors.ModelError, match=r"without input_ids[\s\S]*pass input_ids, not inputs_embeds"):
            hf_vlm(inputs_embeds=torch.zeros(1, 3, 128))

    def test_a_cache_that_it_did_not_see_filled(self, vlm, hf_vlm, attach, basis, batch):
        ids = vlm.batch(TEXTS[:1]).inputs["input_ids"]
        with torch.no_grad():
            foreign = hf_vlm(ids, use_cache=True).past_key_values
            handle = attach(iv.project_out(basis))
            width = ids.shape[1]
            text = (
                f"Found 1 tokens in 1 rows beside a KV cache of {width}, where 0 in 0 rows have been seen[\\s\\S]*leave out past_key_values"
            )
            with pytest.raises(errors.ModelError, match=text):
                hf_vlm(ids[:, -1:], past_key_values=foreign)
            cache = hf_vlm(ids, use_cache=True).past_key_values
            with pytest.raises(errors.ModelError, match=f"2 tokens in 1 rows beside a KV cache of {width}, where {width} in 1 rows"):
                hf_vlm(ids[:, -2:], past_key_values=cache)
            hf_vlm(**batch.inputs)
            with pytest.raises(errors.ModelError, match=f"where {batch.mask.shape[1]} in 4 rows have been seen"):
                hf_vlm(torch.ones(4, 1, dtype=torch.long), past_key_values=foreign)
        assert handle.decisions == {}

    def test_a_static_cache(self, hf_vlm, attach, basis, batch):
        attach(iv.project_out(basis))
        with pytest.raises(errors.ModelError, match=r"attention mask\S* of [\s\S]*generate with the default cache"):
            generate(hf_vlm, batch, cache_implementation="static")

    def test_a_way_round_the_guard(self, hf_vlm, attach, basis, batch):
        handle = attach(iv.project_out(basis))
        with pytest.raises(
            errors.ModelError, match=r"a call of model.language_model that goes round the forward of LlavaForCond[\s\S]*remove"
        ):
            hf_vlm.model(**batch.inputs)
        handle.remove()
        hf_vlm.model(**batch.inputs)

    def test_image_positions_without_an_image(self, vlm, hf_vlm, attach, basis):
        attach(iv.project_out(basis).at(positions="image"))
        with pytest.raises(errors.SiteError, match="no token at positions 'image' in query 'row 0'"):
            hf_vlm(**vlm.batch(TEXTS).inputs)

    def test_a_text_that_does_not_give_its_tokens_again(self, vlm, hf_vlm, attach, basis, batch):
        attach(iv.patch(basis, iv.text_twin).at(layers=[3]))
        ids = batch.inputs["input_ids"].clone()
        ids[1, -3] = 300  # no token of this tokenizer
        with pytest.raises(
            errors.ModelError, match=f"LlavaProcessor, {CUT}: the text of row 1 does not give[\\s\\S]*Next: pass twin=, a function"
        ):
            hf_vlm(**{**batch.inputs, "input_ids": ids})

    def test_an_image_between_unknown_marks(self):
        name = "Qwen2.5-VL"
        processor, token = ALL[name].processor(), find(ALL[name].model()).image_token_id
        remover, ids = ImageRemover.learn(processor, token), torch.tensor([[token, 60, 61]])
        with pytest.raises(errors.ModelError, match="row 0 has an image between marks that the probes did not show"):
            remover({"input_ids": ids, "attention_mask": ids == ids})

    def test_a_processor_that_takes_no_text_alone(self, processor, attach, basis):
        class NeedsImages:
            tokenizer, image_token, chat_template = processor.tokenizer, processor.image_token, processor.chat_template
            apply_chat_template = staticmethod(processor.apply_chat_template)

            def __call__(self, images=None, **options):
                if images is None:
                    raise ValueError("images are required")
                return processor(images=images, **options)

        with pytest.raises(errors.ModelError, match=rf"NeedsImages, {CUT}: [\s\S]*images are required[\s\S]*pass twin="):
            attach(iv.patch(basis, iv.text_twin), by=NeedsImages())

    def test_templates_that_say_something_else_beside_an_image(self, processor, attach, basis):
        def rendering(template):
            other = copy.deepcopy(processor)
            other.chat_template = "{{ bos_token }}{% set shown = messages[0].content | length > 1 %}" + template
            return other

        words = "{{ messages[0].content[-1].text }} assistant :"
        before = rendering("{% if shown %} push <image> how{% endif %} " + words)
        token = processor.tokenizer.convert_tokens_to_ids("<image>")
        assert ImageRemover.learn(before, token).without_images("<s> push <image> <image> how to mend") == "<s> to mend"
        around = rendering("{% if shown %} <image>{% endif %} " + words + "{% if shown %} please{% endif %}")
        with pytest.raises(errors.ModelError, match=f"{CUT}: row 0 has an image between marks that the probes did not show"):
            attach(iv.patch(basis, iv.text_twin), by=around)
        with pytest.raises(errors.ModelError, match=f"{CUT}: its prompts with an image show no 'mend'"):
            ImageRemover.learn(before, processor.tokenizer.convert_tokens_to_ids("mend"))
        blind = rendering(" radio " + words)
        with pytest.raises(errors.ModelError, match=f"{CUT}: The total number of <image> tokens in the prompts should be the same"):
            attach(iv.patch(basis, iv.text_twin), by=blind)
        far = rendering("{% if shown %} <image>{% endif %} " + words + " {{ 'mend' if shown and 'tulip' in messages[0].content[-1].text }}")
        with pytest.raises(errors.ModelError, match=f"{CUT}: removing an image of 24 x 24 does not give the prompt without one"):
            attach(iv.patch(basis, iv.text_twin), by=far)


class TestWhatRuns:
    """What `HookedModel` refuses of generation is refused here, too, but for beams and several answers, whose rows are prompts."""

    @pytest.mark.parametrize(
        "options",
        [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}, {"guidance_scale": 2.0}, {"prefill_chunk_size": 4},
         {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, {"generation_config": GenerationConfig(guidance_scale=2.0)}],
    )  # fmt: skip
    def test_generation_that_is_not_token_by_token(self, hf_vlm, batch, basis, attach, options):
        handle = attach(iv.project_out(basis))
        with pytest.raises(errors.InterventionError, match="by which a forward is not one token of every answer"):
            generate(hf_vlm, batch, **options)
        handle.remove()
        assert "generate" not in vars(hf_vlm)

    def test_an_assistant(self, hf_vlm, batch, basis, attach):
        attach(iv.project_out(basis))
        with pytest.raises(errors.InterventionError, match="assistant_model"):
            generate(hf_vlm, batch, assistant_model=hf_vlm)

    def test_what_the_checkpoint_says(self, hf_vlm, batch, basis, attach, monkeypatch):
        monkeypatch.setattr(hf_vlm.generation_config, "prompt_lookup_num_tokens", 3)
        attach(iv.project_out(basis))
        with pytest.raises(errors.InterventionError, match="prompt_lookup_num_tokens=3"):
            generate(hf_vlm, batch)

    def test_prompts_padded_on_the_right(self, vlm, hf_vlm, basis, attach):
        attach(iv.project_out(basis))
        with pytest.raises(errors.InterventionError, match="padded on the right"):
            generate(hf_vlm, vlm.batch(TEXTS, padding_side="right"))

    @pytest.mark.parametrize("at", [0, 2])
    def test_nan_and_infinity(self, hf_vlm, batch, attach, at):
        def poison(states, context):
            return torch.where((context.query == 1)[:, None] & (context.decode_step == at), states / 0, states)

        attach(iv.custom(poison).at(layers=[4]).during("always"))
        with pytest.raises(errors.NumericsError, match=r"blocks.4.hook_resid_post after the edit custom\(.*poison\), query 'row 1'"):
            generate(hf_vlm, batch)

    def test_a_call_of_the_model_inside_of_an_edit(self, hf_vlm, batch, basis, attach):
        """Also where the edit goes on without it: the forward around it stays guarded."""
        direction, inside = 12 * basis.at(6)[0], []

        def edit(states, context):
            try:
                hf_vlm(**batch.inputs)
            except errors.InterventionError as error:
                inside.append(error.found)
            return states + direction

        attach(iv.custom(edit).at(layers=[6]))
        expected = reference.generate(hf_vlm, batch.inputs, 6, lambda h: h + direction, "prefill", 8)
        assert torch.equal(generate(hf_vlm, batch), expected)
        assert inside and "while another is going on" in inside[0]

    def test_a_forward_of_another_thread(self, hf_vlm, batch, basis, attach):
        begun, end, found = threading.Event(), threading.Event(), []

        def edit(states, context):
            begun.set()
            end.wait(20)
            return states + 12 * basis.at(6)[0]

        attach(iv.custom(edit).at(layers=[6]))

        def work():
            with torch.no_grad():
                found.append(hf_vlm(**batch.inputs).logits)

        other = threading.Thread(target=work)
        other.start()
        begun.wait(20)
        with pytest.raises(errors.InterventionError, match="threads take turns"):
            hf_vlm(**batch.inputs)
        end.set()
        other.join()
        with torch.no_grad():
            assert torch.equal(found[0], hf_vlm(**batch.inputs).logits)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
    @pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "under PEFT"])
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cached", "no cache"])
    def test_a_vector_is_added_once_to_every_token(self, hf_vlm, batch, basis, attach, wrapped, options):
        """In the prompt and at every step, whatever modules the model is wrapped in."""
        direction, before, after = 3 * basis.at(4)[0], [], []
        hf = get_peft_model(copy.deepcopy(hf_vlm), LoraConfig(r=2, target_modules=["q_proj"])).eval() if wrapped else hf_vlm
        blocks = unwrapped(hf).model.language_model.layers
        given = blocks[4].register_forward_hook(lambda module, args, output: before.append(output[:, -1].clone()))
        taken = blocks[5].register_forward_pre_hook(lambda module, args: after.append(args[0][:, -1].clone()))
        attach(iv.custom(lambda states, context: states + direction).at(layers=[4]).during("always"), hf)
        generate(hf, batch, new_tokens=4, **options)
        given.remove()
        taken.remove()
        moved = torch.stack(after) - torch.stack(before)
        assert len(moved) == 4 and torch.allclose(moved, direction.expand_as(moved), atol=1e-4)


class TestNames:
    def test_of_a_family_that_needs_them(self, attach):
        config = XGLMConfig(vocab_size=352, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, max_position_embeddings=512)
        hf, names = build(XGLMForCausalLM, config), {"final_norm": "layer_norm"}
        model = gl.load(hf, processor=tokenizer(TEMPLATE), names=names)
        batch, intervention = model.batch("How to fold a paper boat?"), iv.custom(lambda states, context: states + 1).at(layers=1)
        expected = model.run(batch, intervention).logits[0]
        attach(intervention, hf, None, names=names)
        with torch.no_grad():
            assert torch.allclose(hf(**batch.inputs).logits[:, -1], expected, atol=1e-5)
        with pytest.raises(errors.ModelError, match="nowhere in"):
            attach(intervention, hf, None, names={"final_norm": "nothing"})


class TestOddThings:
    @pytest.mark.parametrize("processor", ["x", 5])
    def test_no_processor(self, attach, processor):
        with pytest.raises(errors.ModelError, match="AutoProcessor"):
            attach(iv.swap(iv.text_twin).at(layers=[3]), by=processor)

    def test_a_single_row(self, hf_vlm, attach, basis, batch):
        attach(iv.project_out(basis))
        with pytest.raises(errors.ModelError, match="input_ids"):
            hf_vlm(input_ids=batch.inputs["input_ids"][0])

    @pytest.mark.parametrize("given", [None, {}])
    def test_no_twin(self, hf_vlm, attach, batch, given, unchecked):
        attach(iv.swap(iv.text_twin).at(layers=[3]), twin=lambda inputs: given)
        with pytest.raises(errors.ModelError, match="inputs of the model"):
            hf_vlm(**batch.inputs)


class TestTwinOfTheCaller:
    def test_it_is_used(self, vlm, hf_vlm, basis, batch, attach):
        intervention, calls = iv.replace(basis, iv.text_twin, gain=3.0).at(layers=[3]), []

        def twin(inputs):
            calls.append(sorted(inputs))
            return vlm.batch(TEXTS).inputs

        expected = vlm.run(batch, intervention, new_tokens=6).tokens[0]
        attach(intervention, by=None, twin=twin)
        assert torch.equal(generate(hf_vlm, batch, 6), expected) and len(calls) == 1
        assert {"attention_mask", "input_ids"} <= set(calls[0])

    def test_it_must_be_a_twin(self, vlm, hf_vlm, basis, batch, attach):
        handle = attach(iv.patch(basis, iv.text_twin), twin=lambda inputs: inputs)
        with pytest.raises(errors.ModelError, match=r"a twin= that gives 4 rows, some with image tokens.\nExpected the same 4 prompts"):
            hf_vlm(**batch.inputs)
        handle.remove()
        attach(iv.patch(basis, iv.text_twin), twin=lambda inputs: vlm.batch(TEXTS[:3]).inputs)
        with pytest.raises(errors.ModelError, match=r"a twin= that gives 3 rows.\nExpected the same 4 prompts without"):
            hf_vlm(**batch.inputs)
