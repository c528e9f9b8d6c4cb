"""The identity of a run: whatever states or answers depend on is named where it differs, and nothing else is."""

import copy
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import normalizers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import guardlens as gl
from guardlens import defences, errors, presentations
from guardlens.data.presentations import Prompt, text_only
from guardlens.models.architectures import facts, fingerprint
from guardlens.models.architectures.fingerprint import WORDS, _summed
from guardlens.models.identity import configuration
from guardlens.results.run_directory import first_difference

GREY = presentations.blank("grey", 32)
QUERIES = (gl.Query("how to mend the hat ?", "harmless"), gl.Query("how to forge the badge ?", "harmful"))


@pytest.fixture
def model(hf_vlm, processor):
    """One of its own, to be changed."""
    return gl.load(copy.deepcopy(hf_vlm), processor=copy.deepcopy(processor))


def whole(model, presentation=GREY, queries=QUERIES):
    return configuration(model, queries, [presentation])


def block(model, layer=3):
    return model.hf.model.language_model.layers[layer]


@torch.no_grad()
def one_value(model):
    block(model).mlp.down_proj.weight[5, 7] += 1e-3


def behind_versions(model):
    block(model).mlp.down_proj.weight.data[5, 7] += 1e-3


@torch.no_grad()
def one_row(model):
    model.hf.model.language_model.embed_tokens.weight[9] *= -3


def another_parameter(model):
    weight = block(model).mlp.up_proj.weight
    block(model).mlp.up_proj.weight = torch.nn.Parameter(weight.detach().roll(1, 0))


def saved_buffer(model):
    block(model).register_buffer("shift", torch.ones(3))


def frequencies(model):
    model.hf.model.language_model.rotary_emb.inv_freq.mul_(0.5)


def eye_layer(model):
    model.hf.config.vision_feature_layer = -1


def epsilon(model):
    block(model).input_layernorm.variance_epsilon = 0.1


def activation(model):
    block(model).mlp.act_fn = torch.nn.Tanh().eval()


def causal(model):
    block(model).self_attn.is_causal = False


def kept_function(model):
    model.hf.model.get_image_features = lambda *args, **options: None


def half(model):
    model.hf.bfloat16()


def template(model):
    model.processor.chat_template = model.processor.chat_template.replace(":", ",")


def normaliser(model):
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b")


def picture_mean(model):
    model.processor.image_processor.image_mean = [0.0] * 3


CHANGES = {
    one_value: "model.weights",
    behind_versions: "model.weights",
    one_row: "model.weights",
    another_parameter: "model.weights",
    saved_buffer: "model.weights",
    frequencies: "model.computed",
    eye_layer: "model.config.vision_feature_layer",
    epsilon: "model.constants",
    activation: "model.constants",
    causal: "model.constants",
    kept_function: "model.code",
    half: "model.weights",
    template: "model.processor.template",
    normaliser: "model.processor.tokenizer",
    picture_mean: "model.processor.images.image_processor.image_mean",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_run_depends_on_is_named(model, change):
    before = whole(model)
    assert whole(model) == before
    change(model)
    assert first_difference(before, whole(model))[0] == CHANGES[change]


@pytest.mark.parametrize(
    "change", [one_value, one_row, another_parameter, saved_buffer, eye_layer, half], ids=lambda change: change.__name__
)
def test_a_model_that_changed_is_another_one(model, change):
    before, kept = model.id, model.prefill(model.batch(QUERIES, GREY))
    change(model)
    assert model.id != before
    with pytest.raises(errors.MismatchError, match="Found prompts kept by"):
        model.run(kept)


def leftover_hook(model):
    block(model).mlp.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.filterwarnings("ignore:what guardlens measures includes the hook")
@pytest.mark.parametrize("change", [epsilon, activation, causal, leftover_hook], ids=lambda change: change.__name__)
def test_prompts_kept_before_a_change_are_refused(model, change):
    kept, prompts = model.prefill(model.batch(QUERIES, GREY)), gl.keep(model, QUERIES, GREY)
    change(model)
    intervention = gl.interventions.custom(lambda states, context: states)
    for ask in (lambda: model.run(kept), lambda: gl.sweep(model, intervention, prompts, layers=[2])):
        with pytest.raises(errors.MismatchError, match="before an attribute or a hook of its modules was changed"):
            ask()


def test_running_leaves_the_identity_alone(model):
    before, name = whole(model), model.id
    model.generate(QUERIES, GREY, max_new_tokens=3)
    gl.sweep(model, gl.interventions.custom(lambda states, context: states + 1), QUERIES, GREY, layers=[2])
    model.run_with_cache(QUERIES, GREY)
    assert whole(model) == before and model.id == name


def test_weights_are_known_by_their_numbers(hf_vlm, processor, tmp_path):
    rounded = copy.deepcopy(hf_vlm).bfloat16()
    wide = copy.deepcopy(rounded).float()
    assert fingerprint(rounded) == fingerprint(wide) != fingerprint(hf_vlm)
    assert first_difference(whole(gl.load(rounded, processor=processor)), whole(gl.load(wide, processor=processor)))[0] == "model.dtypes"
    rounded.save_pretrained(tmp_path)
    again = type(rounded).from_pretrained(tmp_path, dtype="float32")
    assert facts(again)["weights"] == facts(rounded)["weights"]


def test_a_model_is_hashed_once(model, monkeypatch):
    module = sys.modules["guardlens.models.architectures.fingerprint"]
    hashed, hash_of = [], module._hash
    monkeypatch.setattr(module, "_hash", lambda hf, name, tensor: hashed.append(name) or hash_of(hf, name, tensor))
    before, n = model.id, len(list(model.hf.parameters()))
    assert model.id == before and len(hashed) == n
    one_value(model)
    assert model.id != before and len(hashed) == n + 1
    facts(model.hf, anew=True)
    assert len(hashed) == 2 * n + 1


def test_weights_made_in_inference_mode_are_hashed_once_and_anew_at_the_door(processor, monkeypatch):
    from guardlens.organism.train import build_model

    with torch.inference_mode():
        inner = build_model(0).eval()
    module, hashed = sys.modules["guardlens.models.architectures.fingerprint"], []
    monkeypatch.setattr(module, "_hash", lambda hf, name, tensor, hash_of=module._hash: hashed.append(name) or hash_of(hf, name, tensor))
    before, n = fingerprint(inner), len(list(inner.parameters()))
    assert fingerprint(inner) == before and len(hashed) == n
    with torch.inference_mode():
        inner.lm_head.weight.mul_(2)
    assert facts(inner, anew=True) and fingerprint(inner) != before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_adapters_count_by_what_they_do(hf_vlm, processor):
    from peft import LoraConfig, get_peft_model

    def adapted(alpha):
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return gl.load(get_peft_model(copy.deepcopy(hf_vlm), config).eval(), processor=processor)

    weak, strong = adapted(1), adapted(8)
    assert weak.id != strong.id
    assert first_difference(whole(weak), whole(strong))[0] == "model.adapters[0]"
    on = weak.id
    weak.hf.base_model.disable_adapter_layers()
    off = weak.id
    weak.hf.base_model.enable_adapter_layers()
    assert off != on == weak.id
    torch.manual_seed(1)
    weak.hf.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    both = weak.id
    weak.hf.set_adapter("second")
    assert len({on, both, weak.id}) == 3


@pytest.mark.filterwarnings("ignore:what guardlens measures includes the hook")
def test_hooks_of_other_code_count(model):
    def scaled(factor):
        return lambda module, args, output: output * factor

    found = [whole(model)]
    for factor in (2, 3):
        handle = block(model).mlp.register_forward_hook(scaled(factor))
        found.append(whole(model))
        handle.remove()
    assert first_difference(found[0], found[1])[0] == "model.hooks"
    assert first_difference(found[1], found[2])[0] == "model.hooks[0]"
    assert whole(model) == found[0]


@pytest.mark.filterwarnings("ignore:what guardlens measures includes the hook")
@pytest.mark.filterwarnings("ignore:.*`forward` was replaced after nnsight wrapped this module")  # where the copied model had been in use
def test_a_forward_that_was_replaced_counts(model):
    before, mlp = whole(model), block(model).mlp

    def doubled(states):
        return type(mlp).forward(mlp, states) * 2

    mlp.forward = doubled
    after = whole(model)
    model.run(model.batch(QUERIES, GREY), read=[gl.Site()])
    assert first_difference(before, after)[0] == "model.hooks" and "doubled" in after["model"]["hooks"][0]
    assert whole(model) == after


def test_a_forward_of_a_class_that_was_replaced_counts(model, monkeypatch):
    before, kind = whole(model), type(block(model).mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, states: 2 * forward(self, states))
    assert first_difference(before, whole(model))[0] == "model.code"


def test_an_attention_of_ones_own_counts(model, monkeypatch):
    def attention(factor):
        return lambda module, query, *args, **options: ALL_ATTENTION_FUNCTIONS["sdpa"](module, factor * query, *args, **options)

    found = [whole(model)]
    model.hf.set_attn_implementation("eager")
    assert whole(model) == found[0]
    for factor in (2, 3):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", attention(factor))
        model.hf.set_attn_implementation("sdpa")
        found.append(whole(model))
    assert first_difference(found[0], found[1])[0] == first_difference(found[1], found[2])[0] == "model.code"


def test_autocast_counts(model):
    before = whole(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert first_difference(before, whole(model))[0] == "model.autocast"


def test_the_llm_beside_counts(model, hf_vlm, processor):
    twin = gl.load(copy.deepcopy(hf_vlm), processor=processor)
    beside = replace(model, separate_llm=twin)
    before = whole(beside)
    one_value(twin)
    assert first_difference(before, whole(beside))[0] == "llm.weights"
    assert first_difference(whole(model), before)[0] == "llm"


@dataclass(frozen=True, eq=False)
class Page:
    """A presentation whose repr is shortened by numpy."""

    pixels: np.ndarray
    name: str = "page"

    def __call__(self, query):
        return Prompt(query.text, (Image.fromarray(self.pixels),))


def test_presentations_count_by_what_they_show(model, tmp_path):
    blank, drawn = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    drawn[10:50, 10:50] = 255
    assert repr(Page(blank)) == repr(Page(drawn))
    assert first_difference(whole(model, Page(blank)), whole(model, Page(drawn)))[0] == "presentations.page.shows"

    def owning(colour):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "own.png")
        return [replace(query, images=(str(tmp_path / "own.png"),)) for query in QUERIES]

    white, black = (whole(model, presentations.own_images, owning(colour)) for colour in ("white", "black"))
    assert first_difference(white, black)[0] == "presentations.own.shows"


@pytest.mark.parametrize("change", [{"source": "x"}, {"pair": "p"}, {"cluster": "c"}, {"label": None}, {"id": "other"}], ids=str)
def test_queries_count_with_all_that_they_say(model, change):
    changed = [replace(QUERIES[0], **change), QUERIES[1]]
    assert first_difference(whole(model, text_only), whole(model, text_only, changed))[0] == "queries"


ASKED = {"judge": gl.organism.judge, "max_new_tokens": 3}


class TestEvaluate:
    def test_settings_of_the_checkpoint_count(self, model, tmp_path):
        gl.evaluate(model, {"none": defences.none}, QUERIES, text_only, out=tmp_path, **ASKED)
        model.hf.generation_config.repetition_penalty = 5.0
        with pytest.raises(errors.MismatchError, match=r"made with generation\.repetition_penalty"):
            gl.evaluate(model, {"none": defences.none}, QUERIES, text_only, out=tmp_path, **ASKED)

    def test_a_judge_counts_with_all_that_it_holds(self, model, tmp_path):
        class BySource:
            name = "by source"

            def __init__(self, refused):
                self.refused = refused

            def __call__(self, query, answer):
                return "refused" if query.source in self.refused else "answered"

            def __repr__(self):
                return "BySource()"

        def ask(judge):
            return gl.evaluate(model, {"none": defences.none}, QUERIES, text_only, out=tmp_path, **{**ASKED, "judge": judge})

        ask(BySource(["x"]))
        ask(BySource(["x"]))
        with pytest.raises(errors.MismatchError, match=r"made with judge\.content"):
            ask(BySource(["y"]))

    def test_what_a_defence_says_counts(self, model, tmp_path):
        def ask(words):
            arms = {"said": defences.Defence("said", present=lambda inner: presentations.framed(inner, before=words))}
            return gl.evaluate(model, arms, QUERIES, text_only, out=tmp_path, **ASKED)

        ask("please . ")
        ask("please . ")
        with pytest.raises(errors.MismatchError, match=r"made with defences\.said"):
            ask("now . ")

    def test_a_defence_is_asked_once_what_it_shows(self, model, tmp_path):
        words = iter(["please . ", "now . "])
        arm = defences.Defence("said", present=lambda inner: presentations.framed(inner, before=next(words)))
        once = defences.Defence("said", present=lambda inner: presentations.framed(inner, before="please . "))
        for asked in (arm, once):
            table = gl.evaluate(model, {"said": asked}, QUERIES, text_only, out=tmp_path, **ASKED)
        assert len(table) == 2 and next(words) == "now . "

    def test_a_function_counts_beside_its_name(self, model, tmp_path):
        def ask(factor):
            intervention = gl.interventions.custom(lambda states, context: states * factor, name="scale").at(layers=3)
            gl.evaluate(model, {"scaled": intervention}, QUERIES, text_only, out=tmp_path / "answers", **ASKED)
            gl.collect(model, QUERIES, text_only, intervention, out=tmp_path / "states")

        ask(2)
        ask(2)
        with pytest.raises(errors.MismatchError, match=r"made with defences\.scaled"):
            ask(3)


class Drawn:
    """What a notebook may draw: other pixels whenever it is asked."""

    name = "drawn"

    def __init__(self):
        self.random = np.random.default_rng(0)

    def __call__(self, query):
        return Prompt(query.text, (Image.fromarray(self.random.integers(0, 255, (8, 8, 3), dtype=np.uint8)),))


def test_what_is_shown_otherwise_every_time_is_refused(model, tmp_path):
    with pytest.raises(errors.PresentationError, match=r"'drawn', which shows query '\w+' otherwise every time"):
        gl.collect(model, QUERIES, Drawn(), out=tmp_path)


def test_collect_refuses_another_processor(model, tmp_path):
    gl.collect(model, QUERIES, GREY, out=tmp_path)
    picture_mean(model)
    with pytest.raises(errors.MismatchError, match=r"made with model\.processor\.images\.image_processor\.image_mean"):
        gl.collect(model, QUERIES, GREY, out=tmp_path)


SIZES = st.sampled_from([1, 7, WORDS - 1, WORDS + 1, 2 * WORDS + 3, 5 * WORDS])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float64])


@given(SIZES, DTYPES, st.randoms(use_true_random=False))
def test_every_changed_value_is_seen(size, dtype, random):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    values = torch.randint(-100, 100, (size,), generator=generator).to(dtype)
    before = _summed(values)
    assert _summed(values.clone()) == before
    place = random.randrange(size)
    values[place] = values[place] + 1
    assert _summed(values) != before


@given(st.sampled_from([2 * WORDS + 3, 5 * WORDS]), st.randoms(use_true_random=False))
def test_values_that_change_places_are_seen(size, random):
    values = torch.arange(size, dtype=torch.float32)
    one, another = random.sample(range(size), 2)
    swapped = values.clone()
    swapped[[one, another]] = values[[another, one]]
    assert _summed(swapped) != _summed(values) and _summed(-values) != _summed(values)
