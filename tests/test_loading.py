"""`load`: from a directory, a module, an adapter, with transformers' options, with another LLM beside."""

import copy
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from guardlens.queries import text_only
from guardlens.sites import Site
from tests.zoo.llava import llava, llava_processor
from tests.zoo.text import SMALL, TEMPLATE

TEXTS = ["How to fold a paper boat?", "I want to paint the shed."]
GREY = presentations.blank("grey", 32)


@pytest.fixture(scope="module")
def words():
    from tests.zoo.family import tokenizer

    return tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    llava().save_pretrained(path)
    llava_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, directory):
    """A directory with a LoRA adapter of random weights alone; its base is `directory`."""
    import peft

    base = AutoModelForImageTextToText.from_pretrained(directory)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    path = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(path)
    return path


def logits(model):
    return model.run(model.batch(TEXTS, GREY)).logits[0]


def with_decoder_pushed(hf, path, batch, push):
    def fn(module, args, out):
        out = out.clone()
        out[:, -1] += push
        return out

    handle = hf.get_submodule(path).register_forward_hook(fn)
    try:
        with torch.no_grad():
            return hf(**batch.inputs, use_cache=False).logits[:, -1]
    finally:
        handle.remove()


def test_a_directory_and_its_options(directory):
    plain, half = gl.load(directory), gl.load(directory, dtype="bfloat16", device_map="auto", attn_implementation="eager")
    assert plain.hf.dtype == torch.float32 and half.hf.dtype == torch.bfloat16
    assert half.hf.config.text_config._attn_implementation == "eager"
    torch.testing.assert_close(logits(half).float(), logits(plain), atol=0.15, rtol=0)
    assert gl.load(directory, device="cpu").hf.device.type == "cpu"


def test_a_quantisation_config_reaches_transformers(directory, monkeypatch):
    seen = {}
    real = AutoModelForImageTextToText.from_pretrained

    def note(path, **options):
        seen.update(options)
        return real(path, dtype=options["dtype"])

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", note)
    gl.load(directory, quantization_config="as given", device_map="auto", revision="main")
    assert seen["quantization_config"] == "as given" and seen["device_map"] == "auto" and seen["revision"] == "main"
    assert seen["trust_remote_code"] is False


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("how", ["adapter alone", "module in memory"])
def test_peft_adapters(adapter, directory, how):
    import peft

    base = gl.load(directory)
    if how == "adapter alone":
        model = gl.load(adapter)
    else:
        wrapped = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(directory), adapter)
        model = gl.load(wrapped, processor=llava_processor())
    batch = model.batch(TEXTS, GREY)
    with torch.no_grad():
        expected = model.hf(**batch.inputs, use_cache=False).logits[:, -1]
    torch.testing.assert_close(model.run(batch).logits[0], expected, atol=1e-5, rtol=0)
    assert (expected - logits(base)).abs().max() > 1e-2
    push = torch.randn(32, generator=torch.Generator().manual_seed(0))
    mine = model.run(batch, iv.custom(lambda states, context: states + push).at(layers=[1])).logits[0]
    torch.testing.assert_close(mine, with_decoder_pushed(model.hf, model.cfg.blocks[1], batch, push), atol=1e-5, rtol=0)
    tokens = model.hf.generate(**batch.inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)[:, batch.mask.shape[1] :]
    assert torch.equal(model.run(batch, new_tokens=4).tokens[0], tokens)
    assert model.id != base.id and "lora" not in " ".join(model.hook_names)


@pytest.fixture(scope="module")
def llm(words):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return gl.load(LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), processor=words)


@pytest.fixture(scope="module")
def both(llm):
    return gl.load(llava(), processor=llava_processor(), llm=llm)


class TestAnotherLLM:
    def test_the_text_side_is_the_other_llm(self, both, llm):
        text, image = gl.collect(both.llm, TEXTS, progress=False), gl.collect(both, TEXTS, GREY, progress=False)
        assert both.llm is llm and repr(both).endswith(f"beside {llm.name!r})")
        assert text.provenance.model == llm.id and image.provenance.model == both.id
        own = gl.collect(both, TEXTS, progress=False)
        assert own.provenance.model == both.id and (own.states - text.states).abs().max() > 0.1

    def test_the_text_twin_is_read_from_it(self, both, llm, words):
        site = Site(layers=(1,))
        twin = llm.run(llm.batch(TEXTS), read=[site]).reads[site][0, :, 0]
        batch = both.batch(TEXTS, GREY)
        mine = both.run(batch, iv.swap(iv.text_twin).at(layers=[1]), read=[site]).reads[site][0, :, 0]
        torch.testing.assert_close(mine, twin, atol=1e-6, rtol=0)

    def test_directions_of_either_fit_and_a_third_models_are_refused(self, both, llm, vlm):
        pairs = gl.QueryPairs((gl.Query("How to paint?", "harmful"),), (gl.Query("How to fold?", "harmless"),))
        of_llm = gl.directions.ssd(gl.collect(both.llm, pairs, progress=False))
        of_vlm = gl.directions.ssd(gl.collect(both, pairs, GREY, progress=False))
        batch = both.batch(TEXTS, GREY)
        for ssd in (of_llm, of_vlm):
            both.run(batch, iv.project_out(ssd).at(layers=[1]))
        stranger = gl.load(copy.deepcopy(llm.hf), processor=llm.processor)
        with torch.no_grad():
            stranger.hf.lm_head.weight.add_(1)
        with pytest.raises(errors.MismatchError, match="of the model"):
            stranger.run(stranger.batch(TEXTS), iv.project_out(of_vlm).at(layers=[1]))

    def test_one_of_another_size_is_refused(self, words):
        small = LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 2})).eval()
        with pytest.raises(errors.MismatchError, match=r"an LLM of width 32 and 2 layers beside.*\n.*width 32 and 3 layers"):
            gl.load(llava(), processor=llava_processor(), llm=gl.load(small, processor=words))


class TestProcessors:
    def test_one_that_prepares_no_images_is_refused_for_a_vlm(self, words):
        with pytest.raises(errors.ModelError, match=r"which prepares no images, for the VLM Llava.*\n.*image processor.*\nNext: pass"):
            gl.load(llava(), processor=words)

    def test_weights_without_a_processor_say_what_it_lacks(self, directory, monkeypatch):
        def lacks(*args, **options):
            raise ImportError("\nLlavaVideoProcessor requires Torchvision, which was not\nfound. Check out\nthe page.\n")

        monkeypatch.setattr(AutoProcessor, "from_pretrained", lacks)
        with pytest.raises(
            errors.ModelError,
            match=r"Found the weights of .*, but not its processor \(LlavaVideoProcessor requires Torchvision, which was not found\)",
        ) as caught:
            gl.load(directory)
        assert 'install "guardlens[vision]"' in str(caught.value) and "pass processor=" in str(caught.value)
        gl.load(directory, processor=llava_processor())

    def test_a_torchvision_that_does_not_fit_torch(self, directory, monkeypatch):
        class Broken:
            def __getattr__(self, name):
                raise RuntimeError("operator torchvision::nms does not exist")

        monkeypatch.setitem(sys.modules, "transformers", Broken())
        with pytest.raises(errors.ModelError, match=r"\(operator torchvision::nms does not exist\)\.\n.*\nNext: install a torchvision"):
            gl.load(directory)


def test_the_own_llm_says_so(directory):
    model = gl.load(directory)
    text = gl.collect(model, TEXTS, text_only, progress=False)
    assert text.provenance.model == model.id and model.llm is model


def test_patterns_need_eager_attention(directory):
    model = gl.load(directory, attn_implementation="sdpa")
    _, cache = model.run_with_cache(TEXTS, GREY)
    assert ("pattern", 0) not in cache and ("z", 0) in cache
    with pytest.raises(
        errors.SiteError, match=r'no patterns\.\nExpected eager attention\.\nNext: load the model with attn_implementation="eager"'
    ):
        model.run_with_cache(TEXTS, GREY, names_filter="pattern")


def test_blocks_on_disk_are_the_same_model(directory, tmp_path):
    """What stands for blocks on several devices here: accelerate carries states and weights to where each block runs."""
    plain = gl.load(directory)
    parts = [name for name, _ in plain.hf.named_modules() if name.count(".") == 1 or name == "lm_head"]
    blocks = plain.cfg.blocks
    inside = [name for name, _ in plain.hf.get_submodule(plain.cfg.decoder).named_children() if name != "layers"]
    on = dict.fromkeys([*parts, *(f"{plain.cfg.decoder}.{name}" for name in inside), *blocks], "cpu") | {blocks[-1]: "disk"}
    del on[plain.cfg.decoder]
    spread = gl.load(directory, device_map=on, offload_folder=tmp_path)
    assert {name for name, weight in spread.hf.named_parameters() if weight.is_meta} == {
        f"{blocks[-1]}.{name}" for name, _ in plain.hf.get_submodule(blocks[-1]).named_parameters()
    }
    assert spread.id == plain.id
    plan = iv.custom(lambda states, context: states + 1).at(layers=range(plain.cfg.n_layers))
    whole, carried = (model.run(model.batch(TEXTS, GREY), plan).logits for model in (plain, spread))
    assert torch.equal(whole, carried) and not torch.allclose(whole[0], logits(plain), atol=1e-3)
