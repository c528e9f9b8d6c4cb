"""`load`: from a directory, a module, an adapter, with transformers' options, with another LLM beside."""

import copy
import inspect
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.hooks import Site
from guardlens.models.architectures import Names
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
        text, image = gl.collect(both.llm, TEXTS), gl.collect(both, TEXTS, GREY)
        assert both.llm is llm and repr(both).endswith(f"beside {llm.name!r})")
        assert text.provenance.model == llm.id and image.provenance.model == both.id
        own = gl.collect(both, TEXTS)
        assert own.provenance.model == both.id and (own.states - text.states).abs().max() > 0.1

    def test_the_text_twin_is_read_from_it(self, both, llm, words):
        site = Site(layers=(1,))
        twin = llm.run(llm.batch(TEXTS), read=[site]).reads[site][0, :, 0]
        batch = both.batch(TEXTS, GREY)
        mine = both.run(batch, iv.swap(iv.text_twin).at(layers=[1]), read=[site]).reads[site][0, :, 0]
        torch.testing.assert_close(mine, twin, atol=1e-6, rtol=0)

    def test_directions_of_either_fit_and_a_third_models_are_refused(self, both, llm, vlm):
        pairs = gl.QueryPairs((gl.Query("How to paint?", "harmful"),), (gl.Query("How to fold?", "harmless"),))
        of_llm = gl.directions.ssd(gl.collect(both.llm, pairs))
        of_vlm = gl.directions.ssd(gl.collect(both, pairs, GREY))
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
    text = gl.collect(model, TEXTS, text_only)
    assert text.provenance.model == model.id and model.llm.hf is model.hf


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
    intervention = iv.custom(lambda states, context: states + 1).at(layers=range(plain.cfg.n_layers))
    whole, carried = (model.run(model.batch(TEXTS, GREY), intervention).logits for model in (plain, spread))
    assert torch.equal(whole, carried) and not torch.allclose(whole[0], logits(plain), atol=1e-3)


class TestAtTheDoor:
    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [
            ({"dtype": "float33"}, r"dtype='float33'\.\nExpected 'auto' or one of float64, float32, float16, bfloat16"),
            ({"dtype": "load"}, "dtype='load'"),
            ({"dtype": torch.int8}, "dtype=torch.int8"),
            ({"dtype": "float8_e4m3fn"}, r"float8_e4m3fn'\.\n.*\nNext: choose one; fewer bits need a quantization_config"),
            ({"device": "nope"}, r"device='nope', where the model can't be put \(Expected one of cpu"),
            ({"device": "cuda:99"}, "device='cuda:99'"),
            ({"device": "cpu", "device_map": "auto"}, "device and device_map"),
            ({"names": ["layers"]}, r"names=\['layers'\]\.\nExpected one name for each part"),
            ({"names": {"stack": ["layers"]}}, "names="),
            ({"nope": 1}, r"unexpected keyword argument 'nope'\)\.\n.*\nNext: compare the options with those of from_pretrained"),
            ({"attn_implementation": "nope"}, r"which transformers can't load \(Specified `attn_implementation"),
        ],
    )
    def test_options(self, wrong, expected, monkeypatch):
        monkeypatch.setattr(Names, "preferring", inspect.unwrap(Names.preferring))  # past the type checks of the test run, as `load`
        with pytest.raises(errors.ModelError, match=expected):
            inspect.unwrap(gl.load)("organism", **wrong)

    def test_sources(self, vlm):
        plain = inspect.unwrap(gl.load)
        for source, expected in ((None, "of type NoneType"), (vlm, r"HookedModel\.\n.*\nNext: a HookedModel is loaded already")):
            with pytest.raises(errors.ModelError, match=expected):
                plain(source)
        with pytest.raises(errors.ModelError, match="Linear, a module without a config"):
            gl.load(torch.nn.Linear(2, 2), processor=vlm.processor)

    @pytest.mark.parametrize("option", [{"dtype": "float16"}, {"device_map": "auto"}, {"attn_implementation": "eager"}])
    def test_no_option_changes_how_a_module_in_memory_was_loaded(self, vlm, option):
        with pytest.raises(errors.ModelError, match=rf"{next(iter(option))}= for a module in memory"):
            gl.load(vlm.hf, processor=vlm.processor, **option)

    @pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json", "adapter_config.json"])
    @pytest.mark.parametrize("content", ["", "[1]", "\0" * 64])
    def test_damaged_files(self, words, tmp_path, broken, content):
        LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 1})).save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)
        if broken == "adapter_config.json":
            (tmp_path / "config.json").unlink()
        (tmp_path / broken).write_text(content)
        with pytest.raises(errors.ModelError, match=r"can't load|can't be read|but not its processor"):
            gl.load(tmp_path)

    def test_damaged_pickles(self, words, tmp_path):
        LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 1})).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(errors.ModelError, match=r"can't load \(UnpicklingError.*\n.*\nNext: fetch the files again"):
            gl.load(tmp_path, processor=words)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A Llama of one block with random weights, as llama.cpp's own writer makes it."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    words = [chr(33 + i) for i in range(94)] + ["Ġ", "Ċ", "Ho", "How", "<end>"]
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 1) + [3])
    writer.add_token_merges(["H o", "Ho w"])
    writer.add_eos_token_id(len(words) - 1)
    writer.add_pad_token_id(len(words) - 1)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}<end>")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(words), 32), "output": (len(words), 32), "output_norm": (32,)}
    inside = {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    inside |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in inside.items()}).items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestGGUF:
    def test_a_file_and_a_directory_with_one(self, gguf_file):
        reference = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).eval()
        for source, options in ((gguf_file, {}), (gguf_file.parent, {}), (gguf_file.parent, {"gguf_file": gguf_file.name})):
            model = gl.load(source, **options)
            batch = model.batch(["How?", "How?!"])
            assert model.tokenizer.decode(batch.inputs["input_ids"][0][batch.mask[0]]) == "How?<end>"
            with torch.no_grad():
                expected = reference(**batch.inputs, use_cache=False).logits[:, -1]
            torch.testing.assert_close(model.run(batch).logits[0], expected, atol=1e-5, rtol=1e-5)
        assert gl.load(gguf_file).name == "tiny.gguf"

    def test_its_weights_are_ordinary_ones(self, gguf_file, tmp_path):
        model = gl.load(gguf_file, dtype="bfloat16")
        assert {parameter.dtype for parameter in model.hf.parameters()} == {torch.bfloat16}
        model.hf.save_pretrained(tmp_path)
        model.processor.save_pretrained(tmp_path)
        again = gl.load(tmp_path)
        assert all(map(torch.equal, model.hf.parameters(), again.hf.parameters()))
        assert again.batch("How?").inputs.keys() == model.batch("How?").inputs.keys()

    def test_what_is_no_gguf_file(self, tmp_path):
        with pytest.raises(errors.ModelError, match=r"no file .*gone\.gguf"):
            gl.load(tmp_path / "gone.gguf")
        for name in "ab":
            (tmp_path / f"{name}.gguf").write_text("GGUF")
        with pytest.raises(errors.ModelError, match=r"2 GGUF files in .*\(a\.gguf, b\.gguf\)\.\n.*\nNext: name it: gl\.load\("):
            gl.load(tmp_path)

    def test_a_damaged_file(self, gguf_file, tmp_path):
        whole = gguf_file.read_bytes()
        for size in (0, 3, 20, 400, len(whole) - 64):
            (tmp_path / "cut.gguf").write_bytes(whole[:size])
            with pytest.raises(errors.ModelError, match="which transformers can't load"):
                gl.load(tmp_path / "cut.gguf")

    def test_without_the_package_that_reads_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr("transformers.utils.import_utils.is_gguf_available", lambda: False)
        (tmp_path / "x.gguf").touch()
        with pytest.raises(errors.ModelError, match=r'x\.gguf.*\n.*gguf and accelerate\.\nNext: pip install "guardlens\[gguf\]"'):
            gl.load(tmp_path / "x.gguf")
