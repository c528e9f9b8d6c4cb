"""Eyes before a language model: what the whole computes, what it leaves as it was, and what is refused."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import guardlens as gl
from guardlens import presentations
from guardlens.errors import MismatchError, ModelError, StorageError
from guardlens.models.eyes import Eyes, EyeSize, untrained, with_eyes

SIZE = EyeSize(pixels=32, patch=16, width=32, layers=2, heads=2, inner=64)
TEMPLATE = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
TEXT = "how to mend the hat ?"
SIZES = {"vocab_size": 245, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def language_model(llm):
    """A copy, since its modules become parts of another model."""
    return copy.deepcopy(llm.hf)


def words(processor):
    """The organism's tokenizer as that of a language model: without an image token."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def eyes(llm):
    return untrained(llm.hf, SIZE, 0)


@pytest.fixture
def seeing(llm, processor, eyes):
    hf, own = with_eyes(language_model(llm), words(processor), eyes)
    return gl.load(hf, processor=own)


def test_text_is_what_the_language_model_makes_of_it(llm, seeing):
    """And so at the old words' columns if the vocabulary grew by the image token."""
    ids = torch.tensor([[5, 9, 40, 7, 8]])
    with torch.no_grad():
        expected = llm.hf(ids).logits
        torch.testing.assert_close(seeing.hf(input_ids=ids).logits[..., : expected.shape[-1]], expected)


def test_image_tokens_are_the_last_but_one_layer_through_the_projector(seeing):
    batch = seeing.batch([gl.Query(TEXT)], presentations.blank("red", 32))
    pixels, ids = batch.inputs["pixel_values"], batch.inputs["input_ids"]
    tower, projector = seeing.hf.model.vision_tower, seeing.hf.model.multi_modal_projector
    entering = []
    handle = seeing.hf.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(states)))
        seeing.hf(**batch.inputs)
    handle.remove()
    is_image = ids == seeing.hf.config.image_token_id
    assert int(is_image.sum()) == SIZE.tokens == 4
    torch.testing.assert_close(entering[0][is_image], expected[0])


def test_a_saved_model_is_read_by_transformers_and_by_load(seeing, tmp_path):
    seeing.hf.save_pretrained(tmp_path)
    seeing.processor.save_pretrained(tmp_path)
    again, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    batch = seeing.batch([gl.Query(TEXT)], presentations.blank("red", 32))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch.inputs).logits, seeing.hf(**batch.inputs).logits)
    loaded = gl.load(tmp_path)
    assert loaded.fingerprint == seeing.fingerprint and loaded.sees_images
    assert processor.chat_template == seeing.processor.chat_template


def test_eyes_alone_and_the_language_model_make_the_same_model(llm, processor, seeing, eyes, tmp_path):
    eyes.save(tmp_path / "eye")
    language_model(llm).save_pretrained(tmp_path / "llm")
    words(processor).save_pretrained(tmp_path / "llm")
    loaded = gl.load(tmp_path / "llm", eyes=tmp_path / "eye")
    assert loaded.fingerprint == seeing.fingerprint
    assert loaded.name == "llm with eyes eye"
    query = gl.Query(TEXT)
    assert loaded.generate([query], presentations.blank("red", 32)) == seeing.generate([query], presentations.blank("red", 32))


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_is_full_grows_the_same_way_every_time(processor, tied, tmp_path):
    tokenizer = words(processor)
    tokenizer.add_tokens(["another"])
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        small = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
        ids = torch.tensor([[5, 9, 40]])
        expected = small(ids).logits
        torch.manual_seed(seed)
        hf, own = with_eyes(small, tokenizer, untrained(small, SIZE, 0))
        torch.testing.assert_close(hf(input_ids=ids).logits[..., :245], expected)
        found.append(gl.load(hf, processor=own))
    assert found[0].cfg.d_vocab == len(tokenizer) and found[0].fingerprint == found[1].fingerprint
    found[0].hf.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    assert gl.load(tmp_path).fingerprint == found[0].fingerprint


def test_the_tokenizer_stays_as_it_is(llm, processor, eyes):
    tokenizer = words(processor)
    before = len(tokenizer), tokenizer.padding_side, tokenizer.chat_template
    with_eyes(language_model(llm), tokenizer, eyes)
    assert (len(tokenizer), tokenizer.padding_side, tokenizer.chat_template) == before


def test_the_chat_template_takes_parts_and_texts(seeing):
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}]
    assert seeing.processor.apply_chat_template(parts, add_generation_prompt=True) == f"user : <image>{TEXT} assistant :"
    text = [{"role": "user", "content": TEXT}]
    assert seeing.processor.apply_chat_template(text, add_generation_prompt=True) == f"user : {TEXT} assistant :"


def test_eyes_of_another_language_model_are_refused(llm, processor, eyes):
    other = language_model(llm)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(MismatchError, match="eyes for the language model"):
        with_eyes(other, words(processor), eyes)


def test_a_model_that_sees_already_is_refused(vlm, processor, eyes):
    with pytest.raises(ModelError, match="can't be given eyes"):
        with_eyes(vlm.hf, words(processor), eyes)


def test_a_model_whose_parts_a_llava_does_not_know_is_refused():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=245, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ModelError, match="GPT2LMHeadModel, which can't be given eyes"):
        untrained(other, SIZE, 0)


def test_logits_that_a_llava_would_not_compute_are_refused(processor):
    scaled = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.5)).eval()
    with pytest.raises(ModelError, match="more than its unembedding"):
        with_eyes(scaled, words(processor), untrained(scaled, SIZE, 0))


def test_a_directory_without_eyes_is_said(llm, tmp_path):
    with pytest.raises(StorageError, match=r"eyes\.safetensors"):
        gl.load(language_model(llm), processor=llm.processor, eyes=tmp_path)


def test_saved_eyes_are_what_they_were(eyes, tmp_path):
    eyes.save(tmp_path)
    again = Eyes.load(tmp_path)
    assert (again.size, again.llm, again.record) == (eyes.size, eyes.llm, eyes.record)
    assert all(torch.equal(again.weights[name], weight) for name, weight in eyes.weights.items())
