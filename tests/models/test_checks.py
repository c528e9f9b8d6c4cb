"""`check` on models that work, and on models with one part broken on purpose."""

import pytest
import torch

import guardlens as gl
from guardlens.models import checks as checking
from guardlens.models.checks import CHECKS, check

pytestmark = pytest.mark.filterwarnings("ignore:what guardlens measures includes the hook:UserWarning")  # the models are broken by them


def by_name(model):
    return {finding.name: finding for finding in check(model)}


@pytest.fixture
def broken(hf_vlm, processor):
    """A new model with the same weights, to break before it is first used (nnsight wraps `forward` then, so hooks run after its reads)."""
    hf = type(hf_vlm)(hf_vlm.config).eval()
    hf.load_state_dict(hf_vlm.state_dict())
    return gl.load(hf, processor=processor)


def replace_forward(module, change):
    """Let a module return something else."""
    forward = module.forward
    module.forward = lambda *args, **options: change(forward(*args, **options))


def test_everything_works_on_a_vlm(vlm):
    findings = check(vlm)
    assert [finding.name for finding in findings] == list(CHECKS)
    assert [(finding.name, finding.detail) for finding in findings if finding.works is not True] == []
    details = {finding.name: finding.detail for finding in findings}
    assert details["parts found"].startswith("model.language_model: 8 layers, d_model 128")
    tokens = int(vlm.batch(["how to mend the hat ?"], gl.presentations.blank("grey", 32)).image.sum())
    assert details["images"].startswith(f"{tokens} image tokens: another image changes the embeddings of {tokens} of them, and of no other")


def test_images_do_not_apply_to_an_llm(llm):
    found = by_name(llm)
    assert {what for what, finding in found.items() if finding.works is None} == {"images", "text twin", "instruction positions"}
    assert [finding for finding in found.values() if finding.works is False] == []
    assert found["images"].detail == "a text-only model"
    assert found["instruction positions"].detail.startswith("no chat template")


def test_the_model_is_left_as_it_was(vlm):
    batch = vlm.batch(["how to mend the hat ?"])
    before = vlm.run(batch).logits
    check(vlm)
    assert torch.equal(vlm.run(batch).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vlm.hf.get_decoder().layers)


def test_padding_that_leaks_is_found(broken):
    """A block whose output depends on how long the padded prompt is."""
    replace_forward(broken.hf.get_decoder().layers[3], lambda out: out + 0.05 * out.shape[1])
    found = by_name(broken)
    assert found["batches and padding"].works is False
    assert "states alone and in a padded batch: differ by" in found["batches and padding"].detail


def test_a_residual_stream_that_does_not_add_up_is_found(broken):
    """As in a model that scales its residual stream."""
    replace_forward(broken.hf.get_decoder().layers[3], lambda out: out * 1.5)
    found = by_name(broken)
    assert found["residual stream adds up"].works is False
    assert "resid_pre + attn_out + mlp_out = resid_post up to" in found["residual stream adds up"].detail
    assert found["logits reproduced"].works is True


def test_logits_that_do_not_follow_from_the_residual_stream_are_found(broken):
    """As in a model that caps its logits after the unembedding."""
    replace_forward(broken.hf, lambda out: type(out)({**out, "logits": torch.tanh(out.logits)}))
    found = by_name(broken)
    assert found["logits reproduced"].works is False and "norm and unembed: differ by" in found["logits reproduced"].detail
    assert "keep their order: something is done to the logits after the unembedding" in found["logits reproduced"].detail
    assert found["residual stream adds up"].works is True


def test_logits_that_are_a_multiple_are_called_that(broken):
    replace_forward(broken.hf, lambda out: type(out)({**out, "logits": out.logits * 4}))
    found = by_name(broken)["logits reproduced"]
    assert found.works is False and "the model's own are 4 times these, a scale that" in found.detail


def test_logits_that_the_model_rules_out_are_counted(broken):
    """As Chameleon's of image tokens."""

    def masked(out):
        logits = out.logits.clone()
        logits[..., 5:12] = torch.finfo(logits.dtype).min
        return type(out)({**out, "logits": logits})

    replace_forward(broken.hf, masked)
    found = by_name(broken)["logits reproduced"]
    assert found.works is False and "the same but for 7 tokens, which the model rules out after its unembedding" in found.detail


def test_a_projector_whose_output_does_not_enter_is_named(hf_vlm, processor):
    """Another module of the right width."""
    model = gl.load(hf_vlm, processor=processor, names={"projector": "multi_modal_projector.linear_1"})
    found = by_name(model)["images"]
    assert found.works is True and "projector.hook_out is not what they are made of: another module" in found.detail


def test_an_edit_that_does_nothing_is_found(vlm, monkeypatch):
    """As if nnsight lost a write."""
    run = type(vlm).run

    def forgetful(self, batch, interventions=gl.interventions.nothing, **options):
        return run(self, batch, gl.interventions.nothing, **options)

    monkeypatch.setattr(type(vlm), "run", forgetful)
    found = by_name(vlm)
    assert found["edits"].works is False and "an edit at layer 4 against a PyTorch hook: differ by" in found["edits"].detail
    assert found["text twin"].works is False
    assert found["generation under edits"].works is False
    assert found["batches and padding"].works is True


def test_a_foreign_failure_becomes_a_finding(broken):
    def fail(out):
        raise IndexError("no such image\nand more")

    replace_forward(broken.hf.get_decoder().layers[0], fail)
    found = by_name(broken)
    assert found["parts found"].works is True
    for what in ("logits reproduced", "batches and padding", "edits", "images"):
        assert found[what].works is False and "no such image" in found[what].detail
        assert "\n" not in found[what].detail


def test_our_own_errors_tell_what_to_do(vlm, monkeypatch):
    def refuse(model):
        raise gl.errors.ModelError("a model without eyes", "one with eyes", "load another")

    monkeypatch.setitem(checking.CHECKS, "images", refuse)
    images = by_name(vlm)["images"]
    assert (images.works, images.detail) == (False, "Found a model without eyes. Expected one with eyes. Next: load another.")
