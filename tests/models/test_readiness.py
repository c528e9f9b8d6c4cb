"""What is measured is the model itself: guards, training and hooks of other code are refused or said."""

from typing import ClassVar

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from tests.zoo.family import tokenizer
from tests.zoo.text import TEMPLATE

TEXTS = ["how to forge the badge ?", "please explain how to wash the hat ."]


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(TEXTS, presentations.blank("grey", 32))


VERBS = {
    "run": lambda model, batch: model.run(batch),
    "answers": lambda model, batch: model.generate(batch, max_new_tokens=2),
    "kept": lambda model, batch: model.prefill(batch),
    "cache": lambda model, batch: model.run_with_cache(batch),
    "hooks": lambda model, batch: model.run_with_hooks(batch),
    "collect": lambda model, batch: gl.collect(model, batch.queries),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
class TestRefused:
    def test_a_guard_that_is_still_attached(self, vlm, batch, verb):
        intervention = iv.custom(lambda states, context: states + 1).at(layers=[5])
        with gl.attach(intervention, vlm.hf), pytest.raises(errors.ModelError, match=r"a guard that is still attached: Attachment\(custom"):
            verb(vlm, batch)

    def test_training(self, vlm, batch, verb):
        for path in ("", "model.language_model.layers.2.mlp"):
            vlm.hf.get_submodule(path).train()
            try:
                with pytest.raises(errors.ModelError, match=f"training mode in {path or 'Llava'}"):
                    verb(vlm, batch)
            finally:
                vlm.hf.eval()

    def test_outputs_without_names(self, vlm, batch, verb, monkeypatch):
        monkeypatch.setattr(vlm.hf.config, "return_dict", False)
        with pytest.raises(errors.ModelError, match="return_dict = True"):
            verb(vlm, batch)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
class TestAdaptersThatWorkInTheirOwnForward:
    """Their tokens or keys come before the prompt, so that places in it would be others, and parts that run alone would not have them."""

    CONFIGS: ClassVar = {
        "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "activated LoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
    }

    @pytest.fixture
    def hf(self):
        config = LlamaConfig(vocab_size=352, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
        return LlamaForCausalLM(config).eval()

    @pytest.mark.parametrize("made", CONFIGS.values(), ids=CONFIGS)
    def test_are_refused(self, hf, made):
        adapted = peft.get_peft_model(hf, made()).eval()
        with pytest.raises(errors.ModelError, match=r"an adapter of .*_TUNING|an adapter of an invocation phrase \(LORA\)"):
            gl.load(adapted, processor=tokenizer(TEMPLATE)).batch(TEXTS)
        with pytest.raises(errors.ModelError, match=r"hf\.get_base_model\(\)"):
            gl.attach(iv.custom(lambda states, context: states).at(layers=1), adapted)

    def test_that_are_switched_on_later_are_refused(self, hf):
        adapted = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
        model = gl.load(adapted, processor=tokenizer(TEMPLATE))
        assert model.run(model.batch(TEXTS)).logits is not None
        adapted.add_adapter("other", self.CONFIGS["activated LoRA"]())
        adapted.set_adapter("other")
        with pytest.raises(errors.ModelError, match="an invocation phrase"):
            gl.collect(model, TEXTS)


def test_a_guard_is_found_without_its_handle(vlm, batch):
    before = vlm.run(batch).logits
    gl.attach(iv.custom(lambda states, context: states + 1).at(layers=[5]), vlm.hf)
    found = gl.models.attachment.Attachment.on(vlm.hf)
    assert found is not None
    found.remove()
    assert gl.models.attachment.Attachment.on(vlm.hf) is None
    assert torch.equal(vlm.run(batch).logits, before)


def test_a_compiled_model_is_refused(vlm, batch):
    compiled = torch.compile(vlm.hf, backend="eager")
    with pytest.raises(errors.ModelError, match=r"hand in model\._orig_mod"):
        gl.attach(iv.custom(lambda states, context: states), compiled)
    with pytest.raises(errors.ModelError, match=r"hand in model\._orig_mod"):
        gl.load(compiled, processor=vlm.processor, self_check=False).run(batch)


class Doubling:
    def __call__(self, module, args, output):
        return output


@pytest.mark.parametrize(("hook", "named"), [(lambda *_: None, "test_readiness.<lambda>"), (Doubling(), "test_readiness.Doubling")])
def test_hooks_of_other_code_are_said(vlm, batch, hook, named):
    handle = vlm.hf.get_submodule("model.language_model.layers.2").register_forward_hook(hook)
    try:
        with pytest.warns(UserWarning, match=f"{named} on model.language_model.layers.2"):
            vlm.run(batch)
    finally:
        handle.remove()


def test_a_hook_is_said_once_while_it_is_there(vlm, batch):
    layer = vlm.hf.get_submodule("model.language_model.layers.2")

    def hook(*_):
        return None

    for _ in range(2):
        handle = layer.register_forward_hook(hook)
        with pytest.warns(UserWarning, match="includes the hook") as said:
            gl.collect(vlm, TEXTS, batch_size=1)
            vlm.run(batch)
        assert len(said) == 1
        handle.remove()
        vlm.run(batch)


def test_hooks_that_came_with_the_model_are_not(vlm, batch):
    """Such as those of accelerate and peft."""

    def hook(*_):
        return None

    hook.__module__ = "accelerate.hooks"
    handle = vlm.hf.get_submodule("model.language_model.layers.2").register_forward_pre_hook(hook)
    try:
        vlm.run(batch)
    finally:
        handle.remove()


def test_loading_leaves_the_mode_alone(vlm, batch):
    """A trainer that measures in between must not lose its dropout without a word."""
    vlm.hf.train()
    try:
        model = gl.load(vlm.hf, processor=vlm.processor)
        assert vlm.hf.training
        with pytest.raises(errors.ModelError, match=r"call model.hf.eval\(\)"):
            model.run(batch)
    finally:
        vlm.hf.eval()
