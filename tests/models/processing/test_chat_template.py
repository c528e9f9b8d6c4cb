"""Prompts as tokens: what is shown is what was meant, whatever the tokenizer's settings."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import guardlens as gl
from guardlens import Query, Site, errors, presentations
from guardlens.data.presentations import Prompt
from guardlens.models.processing import chat_template as prompts
from tests.models.architectures.test_families import BY_NAME, asked, loaded, takes_text_alone
from tests.zoo.family import TEXTS, tokenizer

QUERIES = ("how to mend the hat ?", "how to paint the old red shed with a brush ?")
GREY = presentations.blank("grey", 32)
SHOWN = {"llm": ("llm", presentations.text_only), "vlm, text": ("vlm", presentations.text_only), "vlm, image": ("vlm", GREY)}


@pytest.fixture(params=SHOWN)
def model_and_shown(request):
    name, presentation = SHOWN[request.param]
    return request.getfixturevalue(name), presentation


def with_words_of(model, change):
    """The same model, with a tokenizer of its own that is changed."""
    processor = deepcopy(model.processor)
    change(prompts.tokenizer_of(processor))
    return gl.load(model.hf, processor=processor)


def same(mine, expected):
    """Equal real tokens in the same places, and equal states."""
    assert torch.equal(mine.mask, expected.mask)
    assert torch.equal(mine.inputs["input_ids"][mine.mask], expected.inputs["input_ids"][expected.mask])
    assert torch.equal(mine.instruction, expected.instruction) and torch.equal(mine.image, expected.image)


class TestWithoutAPadToken:
    """As Llama's and GPT-2's tokenizers come."""

    @pytest.mark.parametrize("queries", [QUERIES[:1], QUERIES], ids=["one", "many"])
    def test_states_and_answers_are_the_same(self, model_and_shown, queries):
        model, shown = model_and_shown
        without = with_words_of(model, lambda words: setattr(words, "pad_token", None))
        settings, site = deepcopy(without.tokenizer.special_tokens_map), Site()
        mine, batch = without.batch(queries, shown), model.batch(queries, shown)
        same(mine, batch)
        torch.testing.assert_close(without.run(mine, read=[site]).reads[site], model.run(batch, read=[site]).reads[site])
        assert without.generate(list(queries), shown, max_new_tokens=4) == model.generate(list(queries), shown, max_new_tokens=4)
        assert without.tokenizer.special_tokens_map == settings and without.tokenizer.pad_token is None

    @pytest.mark.parametrize("left", ["bos_token", "unk_token", None])
    def test_any_token_will_do(self, llm, left):
        def only(words):
            for name in {"pad_token", "eos_token", "bos_token", "unk_token"} - {left}:
                setattr(words, name, None)

        without = with_words_of(llm, only)
        widths = without.batch(QUERIES).mask.sum(1).tolist()
        assert widths == [without.batch(query).mask.shape[1] for query in QUERIES] and without.tokenizer.pad_token is None

    def test_pads_are_known_by_the_mask(self, llm):
        """Where the pad token also stands in prompts, a mean over all tokens counts it there alone."""

        def ending_turns(words):
            words.pad_token = words.eos_token
            words.chat_template = "{% for m in messages %}{{ m.content + ' </s> ' }}{% endfor %}{{ 'assistant :' }}"

        model, site = with_words_of(llm, ending_turns), Site(positions="all")
        batch = model.batch(QUERIES)
        assert not batch.mask.all() and ((batch.inputs["input_ids"] == 2) & batch.mask).sum(1).tolist() == [1, 1]
        expected = torch.cat([model.run(model.batch(query), read=[site]).reads[site][0] for query in QUERIES])
        torch.testing.assert_close(model.run(batch, read=[site]).reads[site][0], expected)


def test_a_tokenizer_may_be_shared_and_pad_on_any_side(model_and_shown):
    model, shown = model_and_shown
    expected = model.batch(QUERIES, shown)

    def settings(words):
        words.padding_side, words.truncation_side = "right", "left"
        words.backend_tokenizer.enable_truncation(3)  # as tokenizer.json files often say

    other = with_words_of(model, settings)
    twin = gl.load(model.hf, processor=other.processor)
    for shared in (other, twin, other):
        same(shared.batch(QUERIES, shown), expected)
        right = shared.batch(QUERIES, shown, padding_side="right")
        assert right.padded_right and not expected.padded_right
    assert other.tokenizer.padding_side == "right"


@pytest.mark.parametrize("positions", ["last", (-2, None), "instruction", "post_instruction", "all", (1, 3)])
def test_sides_of_padding_are_one(vlm, positions):
    for model, shown in ((vlm, presentations.text_only), (vlm, GREY)):
        site = Site(positions=positions)
        left, right = (model.run(model.batch(QUERIES, shown, padding_side=side), read=[site]).reads[site] for side in ("left", "right"))
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


ENDS = {
    "eos": ("$A </s>", [("</s>", 2)]),
    "bos and eos": ("<s> $A </s>", [("<s>", 1), ("</s>", 2)]),
    "two behind": ("<s> $A </s> </s>", [("<s>", 1), ("</s>", 2)]),
    "bos": ("<s> $A", [("<s>", 1)]),
}


class TestSpecialTokensAround:
    """What tokenizers put around a text on their own."""

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("template", ["with bos", "without bos", "none"])
    @pytest.mark.parametrize("ends", ENDS)
    def test_the_prompt_ends_as_the_template_does(self, vlm, ends, template, side):
        """Behind an EOS, the model has nothing left to say. The reference is what the tokenizer makes of the rendered text alone."""
        pattern, known = ENDS[ends]
        processor = deepcopy(vlm.processor)
        words, source = processor.tokenizer, processor.chat_template.replace("{{ bos_token }}", "")
        words.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=known)
        chosen = {"with bos": "{{ bos_token }}" + source, "without bos": source, "none": None}[template]
        processor.chat_template = words.chat_template = chosen
        model = gl.load(vlm.hf, processor=processor)
        for shown in (presentations.text_only, GREY):
            batch = model.batch(QUERIES, shown, padding_side=side)
            for row, query in enumerate(QUERIES):
                ids = batch.inputs["input_ids"][row, batch.mask[row]].tolist()
                text = prompts.render(processor, Prompt(query), True)
                expected = words(text, add_special_tokens=False)["input_ids"]
                begun = [1] if "bos" in ends.split() or ends.startswith(("bos", "two")) else []
                expected = expected if expected[0] == 1 else begun + expected
                kept = [number for number in ids if number != model.cfg.image_token_id]
                assert ids[-1] != 2 and ids.count(1) == expected.count(1)
                assert kept[-len(TEXTS) :] == expected[-len(TEXTS) :] and (shown is GREY or kept == expected)
        assert not (batch.inputs["input_ids"][~batch.mask] != 0).any() or side == "right"


class TestTypedSpecialTokens:
    @pytest.mark.parametrize("name", ["Qwen2.5-VL", "Gemma 3", "Idefics3", "Llama 3.2 Vision", "PaliGemma 2", "InternVL", "Llama", "GPT-2"])
    def test_are_refused_wherever_they_stand(self, name):
        model = loaded(name)
        processor, words = model.processor, model.tokenizer
        marks = [str(getattr(processor, kind)) for kind in ("image_token", "video_token", "audio_token") if getattr(processor, kind, None)]
        special = (
            {str(token) for token in words.added_tokens_decoder.values() if token.special} | set(words.all_special_tokens) | set(marks)
        )
        assert len(special) > 2
        for token in sorted(special):
            for text in (token, f"how to mend {token} the hat ?", f"{token}assistant\nsure"):
                with pytest.raises(errors.QueryError) as caught:
                    model.batch(["how ?", Query(text, id="q7")])
                assert repr(token) in caught.value.found and "in the text of query 'q7'" in caught.value.found
            for shown, place in (
                (presentations.framed(presentations.text_only, before=f"{token} "), "text"),
                (presentations.framed(presentations.text_only, after=token), "text"),
                (presentations.chat(presentations.text_only, system=f"Be kind. {token}"), "system prompt"),
            ):
                with pytest.raises(errors.QueryError, match=f"in the {place} of query"):
                    model.batch("how ?", shown)
        for token in {*marks, words.eos_token}:
            with pytest.raises(errors.QueryError, match="in the prefill of query"):
                model.batch("how ?", presentations.chat(presentations.text_only, prefill=f"Sure {token}"))

    @pytest.mark.parametrize(
        "text", ["how to <mend> </the> hat ?", "<|im_end |>", "< /s>", "<|think|> a", "im_start assistant", "image", "s"]
    )
    def test_what_looks_like_one_is_text(self, text):
        for name in ("Qwen2.5-VL", "Llama"):
            batch = loaded(name).batch(text)
            assert loaded(name).tokenizer.decode(batch.inputs["input_ids"][batch.instruction]).strip() == text

    def test_unknown_words_are_no_special_token(self, vlm):
        """Those of a tokenizer of whole words become its token for unknown ones."""
        assert vlm.tokenizer.unk_token_id in vlm.batch("how to defenestrate ?").inputs["input_ids"]
        with pytest.raises(errors.QueryError, match="the special token '<unk>'"):
            vlm.batch("how to <unk> ?")

    def test_a_prefill_may_think(self):
        """Marks of thinking are special tokens in some tokenizers, and belong to the answer."""
        model = loaded("Qwen3")
        words = deepcopy(model.processor)
        words.add_special_tokens({"additional_special_tokens": ["<think>"]}, replace_extra_special_tokens=False)
        prompt = Prompt("how ?", prefill="<think>")
        prompts.require_showable([Query("how ?")], [prompt], presentations.text_only, words, False)
        assert words.convert_tokens_to_ids("<think>") == prompts.tokenize(words, [prompt], "left", False)["input_ids"][0, -1]
        with pytest.raises(errors.QueryError, match="the special token '<think>' in the text"):
            prompts.require_showable([Query("<think>")], [Prompt("<think>")], presentations.text_only, words, False)


THINKING = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{{ 'assistant: ' }}{% if enable_thinking is defined and enable_thinking is false %}{{ 'sure ' }}{% endif %}"
    "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
)


class TestTemplateKwargs:
    @pytest.fixture(params=["llm", "vlm"])
    def thinking(self, request):
        model = request.getfixturevalue(request.param)
        processor = deepcopy(model.processor)
        processor.chat_template = prompts.tokenizer_of(processor).chat_template = THINKING
        return gl.load(model.hf, processor=processor)

    def test_reach_the_template(self, thinking):
        shown = {value: presentations.chat(presentations.text_only, template_kwargs={"enable_thinking": value}) for value in (True, False)}
        plain = thinking.batch(QUERIES).inputs["input_ids"]
        with_thinking, without = (thinking.batch(QUERIES, shown[value]).inputs["input_ids"] for value in (True, False))
        assert torch.equal(with_thinking, plain) and torch.equal(without[:, :-1], plain)
        assert thinking.tokenizer.convert_ids_to_tokens(int(without[0, -1])) == "sure"

    def test_the_twin_keeps_them(self, thinking):
        if thinking.sees_images:
            shown = presentations.chat(GREY, template_kwargs={"enable_thinking": False})
            batch = thinking.batch(QUERIES, shown)
            _, twin = thinking.source(batch, presentations.text_only)
            assert twin.inputs["input_ids"][0, -1] == batch.inputs["input_ids"][0, -1] and not twin.beside_image

    def test_they_are_part_of_what_a_presentation_is(self):
        def chat(**named):
            return presentations.chat(GREY, template_kwargs=named)

        assert chat(a=1, b=[2, {"c": None}]) == chat(b=[2, {"c": None}], a=1) and len({chat(), chat(a=1), chat(a=2), chat(a=True)}) == 4
        assert "enable_thinking" in repr(chat(enable_thinking=False)) and chat() == presentations.chat(GREY)
        assert chat(a=1) == presentations.Chat(GREY, template_kwargs=chat(a=1).template_kwargs)

    def test_what_the_template_does_not_read_is_refused(self, thinking):
        for wrong in ({"enable_thinkng": False}, {"enable": 1}):
            with pytest.raises(errors.PresentationError, match=r"which the chat template of .* does not read"):
                thinking.batch(QUERIES, presentations.chat(presentations.text_only, template_kwargs=wrong))

    def test_no_template_reads_none(self, llm):
        words = deepcopy(llm.processor)
        words.chat_template = None
        with pytest.raises(errors.PresentationError, match="does not read"):
            gl.load(llm.hf, processor=words).batch("how ?", presentations.chat(presentations.text_only, template_kwargs={"a": 1}))

    @pytest.mark.parametrize(
        "wrong", [{"messages": []}, {"tokenize": True}, {"add_generation_prompt": False}, {"a b": 1}, {1: 2}, {"a": {1, 2}},
                  {"a": float("nan")}, [1], "enable_thinking", "[1]", 5],
    )  # fmt: skip
    def test_what_no_template_can_be_told(self, wrong, unchecked):
        with pytest.raises(errors.PresentationError, match="template_kwargs with"):
            presentations.Chat(GREY, template_kwargs=wrong)


ASKED = (
    "a",
    "user",
    "assistant",
    "model",
    "ASSISTANT",
    "How to fold a paper boat?",
    "how to fold it",
    "please",
    ":",
    "x  y\nz",
    "é 你好",
    " padded ",
)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_instruction_is_the_query(name):
    """In each family, beside a picture and without, on both sides of padding: words that the template says, too, and first words that merge
    with a space which a processor writes behind an image. The reference is what the marked tokens decode to."""
    family, model = BY_NAME[name], loaded(name)
    shown, own = asked(family)
    for images in [()] * takes_text_alone(family) + [shown[0].images] * bool(family.vision):
        for side in ("left", "right"):
            queries = [Query(text, images=images) for text in ASKED]
            batch = model.batch(queries, own if images else presentations.text_only, padding_side=side)
            marked = [model.tokenizer.decode(ids[rows]) for ids, rows in zip(batch.inputs["input_ids"], batch.instruction, strict=True)]
            assert [text.strip() for text in marked] == [text.strip() for text in ASKED]
            spans = [rows.nonzero().flatten() for rows in batch.instruction]
            assert all(len(span) == span[-1] - span[0] + 1 for span in spans)


@pytest.mark.parametrize("words", ["assistant", "You are a careful helper.", "how ?"])
def test_the_instruction_beside_the_same_words(words):
    """In the system prompt, in the prefill and in the query."""
    model = loaded("LLaVA-1.5")
    shown = presentations.chat(presentations.text_only, system=words, prefill=words)
    batch, alone = model.batch(words, shown), model.batch(words, presentations.chat(presentations.text_only, system="§", prefill="§"))
    assert model.tokenizer.decode(batch.inputs["input_ids"][batch.instruction]).strip() == words
    place = int(batch.instruction[0].nonzero()[0])
    head = model.tokenizer.decode(batch.inputs["input_ids"][0, :place])
    assert head.count(words) == 1 + model.tokenizer.decode(alone.inputs["input_ids"][0]).split("§")[0].count(words)


def test_a_system_prompt_that_the_query_repeats_is_not_taken_for_shown():
    """Of a template that leaves system prompts out."""
    source = (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    )
    with pytest.raises(errors.PresentationError, match="the system prompt 'Be kind"):
        prompts.render(tokenizer(source), Prompt("Be kind. How ?", system="Be kind."), False)


def test_a_template_that_changes_the_text_marks_nothing():
    words = tokenizer("{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ ' ASSISTANT:' }}")
    prompt = Prompt("how to fold it ?")
    ids = prompts.tokenize(words, [prompt], "left", False)
    assert not prompts.instruction_mask(words, [prompt], ids["input_ids"], ids["attention_mask"].bool(), False).any()


@pytest.mark.parametrize("name", [name for name, family in BY_NAME.items() if family.vision and takes_text_alone(family)])
def test_the_text_twin_is_the_prompt_without_its_images(name):
    """Token for token, in a batch and alone: what a presentation shows, its images left out by hand."""
    family, model = BY_NAME[name], loaded(name)
    queries, own = asked(family)
    for shown in (own, presentations.chat(own, prefill="Sure, here"), presentations.framed(own, before="Please: ", after=" Thanks.")):
        batch = model.batch(queries, shown)
        llm, twin = model.source(batch, presentations.text_only)
        rendered = [prompts.render(model.processor, Prompt(p.text, (), p.system, p.prefill), True) for p in map(shown, queries)]
        expected = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
        assert llm.hf is model.hf and not twin.beside_image
        assert [ids[mask].tolist() for ids, mask in zip(twin.inputs["input_ids"], twin.mask, strict=True)] == expected
        # What the image's own tokens stand between is the same on both sides.
        for ids, mask, without in zip(batch.inputs["input_ids"], batch.mask, expected, strict=True):
            assert ids[mask].tolist()[-1] == without[-1] and len(without) < int(mask.sum())


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class TestRoom:
    """Prompts beyond a model's positions."""

    def made(self, cls, config):
        return gl.load(cls(config).eval(), processor=tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"))

    def test_rope_runs_and_says_so(self):
        config = LlamaConfig(vocab_size=400, intermediate_size=16, max_position_embeddings=20, **SMALL)
        model = self.made(LlamaForCausalLM, config)
        fits = "a " * 10
        assert model.batch(fits).mask.shape[1] <= 20
        with pytest.warns(UserWarning, match=r"\d+ tokens in the prompt of query 'long', and 20 positions in"):
            model.batch([fits, Query("a " * 40, id="long")])

    @pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn"])
    def test_rope_that_is_scaled_reaches_further(self, rope):
        scaled = {"rope_type": rope, "factor": 4.0, "rope_theta": 1e4}
        config = LlamaConfig(vocab_size=400, intermediate_size=16, max_position_embeddings=20, rope_parameters=scaled, **SMALL)
        model = self.made(LlamaForCausalLM, config)
        assert 20 < model.batch("a " * 30).mask.shape[1] <= 80
        with pytest.warns(UserWarning, match="20 positions"):
            model.batch("a " * 90)

    @pytest.mark.parametrize("kind", ["gpt2", "opt"])
    def test_learned_positions_end(self, kind):
        """One prompt fills them all, one more token is refused."""
        if kind == "gpt2":
            model = self.made(GPT2LMHeadModel, GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=20))
        else:
            config = OPTConfig(vocab_size=400, ffn_dim=16, max_position_embeddings=20, word_embed_proj_dim=16, pad_token_id=0, **SMALL)
            model = self.made(OPTForCausalLM, config)
        assert torch.isfinite(model.run(model.batch("é" * 10)).logits).all() and model.batch("é" * 10).mask.shape[1] == 20
        with pytest.raises(errors.QueryError, match="22 tokens in the prompt of query 'q', and 20 positions"):
            model.batch([Query("é" * 11, id="q")])


class TestCrossAttention:
    """Rows beside rows with more images would attend to the padding of these."""

    def queries(self, model):
        family = BY_NAME["Llama 3.2 Vision"]
        (one, *_), (two, *_) = asked(family)[0], asked(family, 2)[0]
        return [Query(TEXTS[0], id="one", images=one.images), Query(TEXTS[1], id="two", images=two.images),
                Query(TEXTS[2], id="one more", images=one.images)]  # fmt: skip

    def test_one_number_of_images_in_a_batch(self):
        model = loaded("Llama 3.2 Vision")
        with pytest.raises(errors.PresentationError, match="prompts of 1 and 2 images in one batch"):
            model.batch(self.queries(model), presentations.own_images)

    def test_collect_parts_them(self):
        model = loaded("Llama 3.2 Vision")
        queries = self.queries(model)
        found = gl.collect(model, queries, presentations.own_images)
        alone = [gl.collect(model, [query], presentations.own_images).states for query in queries]
        torch.testing.assert_close(found.states, torch.cat(alone), atol=1e-5, rtol=1e-5)
        assert [query.id for query in found.queries] == ["one", "two", "one more"]


@dataclass(frozen=True)
class _Answers:
    answer: Any
    name: Any = "mine"

    def __call__(self, query):
        return self.answer


class TestPresentationsOfOnesOwn:
    @pytest.mark.parametrize("answer", ["how ?", None, 5, ("how ?", ())], ids=str)
    def test_give_prompts(self, vlm, answer, unchecked):
        with pytest.raises(
            errors.PresentationError, match=rf"Found something of type {type(answer).__name__}.*\n.*Prompt\.\nNext: let the"
        ):
            vlm.batch("how ?", _Answers(answer))

    @pytest.mark.parametrize("name", ["", " ", None, 5])
    def test_have_a_name(self, vlm, name, unchecked):
        with pytest.raises(errors.PresentationError, match="a presentation whose name is"):
            vlm.batch("how ?", _Answers(Prompt("how ?"), name))

    @pytest.mark.parametrize("field", ["text", "system", "prefill"])
    def test_show_text(self, field, unchecked):
        for wrong in (None, 5, b"a", "\ud800"):
            with pytest.raises(errors.PresentationError, match=f"the {field} of a prompt"):
                Prompt(**{"text": "a"} | {field: wrong})


def test_pictures_that_a_processor_refuses(unchecked):
    """Qwen takes none whose sides differ by more than 200 times."""
    from PIL import Image

    query = Query("how ?", images=Image.new("RGB", (9000, 30)))
    with pytest.raises(errors.PresentationError, match=r"Found images that Qwen2_5_VLProcessor does not take \(absolute aspect ratio must"):
        loaded("Qwen2.5-VL").batch(query, presentations.own_images)
