"""A family that guardlens does not know: the generic rule, the names that the user gives, and the self-check that stands behind both."""

import warnings

import pytest
import torch
from typer.testing import CliRunner

import guardlens as gl
from guardlens import errors
from guardlens.cli import commands
from guardlens.models.architectures import Names, find
from tests.models.architectures.unknown_family import novel
from tests.zoo.family import TEXTS, tokenizer
from tests.zoo.text import TEMPLATE

NAMES = {"stack": "storeys", "final_norm": "roof"}


@pytest.fixture(scope="module")
def words():
    return tokenizer(TEMPLATE)


def test_a_part_that_is_not_found_is_named_with_the_way_to_name_it(words):
    with pytest.raises(
        errors.ModelError, match=r"NovelForCausalLM, in which no stack was found\.\nExpected get_decoder\(\) to lead.*layers"
    ) as caught:
        gl.load(novel(), processor=words)
    assert 'gl.load(..., names={"stack": "its.path"})' in str(caught.value)


def test_named_parts_are_found_and_do_what_they_should(words):
    hf = novel()
    model = gl.load(hf, processor=words, names=NAMES)
    assert model.cfg.blocks == tuple(f"core.storeys.{layer}" for layer in range(3)) and model.cfg.norm == "core.roof"
    batch = model.batch(TEXTS)
    with torch.no_grad():
        expected = hf(**batch.inputs).logits
    logits, cache = model.run_with_cache(batch)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(cache["resid_post", 1], cache["resid_pre", 1] + cache["attn_out", 1] + cache["mlp_out", 1])
    torch.testing.assert_close(cache.logit_lens()[-1], expected[:, -1])
    assert not model.cfg.proven


def test_dotted_names_start_from_the_top(words):
    model = gl.load(novel(), processor=words, names={"stack": "core.storeys", "final_norm": "core.roof", "unembed": "head"})
    assert model.cfg.blocks[0] == "core.storeys.0" and model.cfg.norm == "core.roof"


def test_a_mistaken_part_is_refused_by_its_logits(words):
    """The rule would take `norm`, which is there but not in use."""
    with pytest.raises(errors.ModelError, match=r"new to guardlens, failing at 'logits reproduced': .*core\.norm") as caught:
        gl.load(novel(), processor=words, names={"stack": "storeys"})
    assert "names={part: path}" in str(caught.value)


def test_a_users_name_counts_before_a_known_one_wherever_it_is(words):
    """`norm` is in the decoder, the dotted name starts above it."""
    model = gl.load(novel(), processor=words, names={"stack": "storeys", "final_norm": "core.roof"})
    assert model.cfg.norm == "core.roof"


@pytest.mark.parametrize(("part", "name"), [("final_norm", "core.rof"), ("query", "ask"), ("head_width", "wide")])
def test_a_users_name_that_is_nowhere_is_refused(words, part, name):
    with pytest.raises(errors.ModelError, match=rf"'{name}' for the part '{part}', nowhere in NovelForCausalLM\.\n.*\nNext: look it up"):
        gl.load(novel(), processor=words, names=NAMES | {part: name})


def test_padding_that_leaks_is_refused(words):
    with pytest.raises(errors.ModelError, match="failing at 'batches and padding': states alone and in a padded batch: differ by"):
        gl.load(novel(leaky=True), processor=words, names=NAMES)


def test_attention_or_mlp_that_are_not_what_is_added_are_warned_of(words):
    with pytest.warns(UserWarning, match="attn_out or mlp_out that are not what its blocks add"):
        gl.load(novel(joined=True), processor=words, names=NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.load(novel(), processor=words, names=NAMES)


def test_the_self_check_can_be_left_out(words):
    assert gl.load(novel(leaky=True), processor=words, names=NAMES, self_check=False).cfg.n_layers == 3


def test_names_of_no_part():
    with pytest.raises(errors.ModelError, match=r"a name for 'stak'\.\nExpected one of the parts stack, inner, final_norm"):
        Names().preferring({"stak": "core.storeys"})


def test_known_names_come_after_the_users():
    names = Names().preferring({"final_norm": "roof"})
    assert names.final_norm == ("roof", *Names().final_norm)
    assert find(novel(), names.preferring({"stack": "storeys"})).norm == "core.roof"


def test_a_vlm_without_an_image_token_is_refused(words):
    model = novel()
    model.config.vision_config = {"image_size": 32}
    with pytest.raises(errors.ModelError, match="a vision encoder but no image token"):
        gl.load(model, processor=words, names=NAMES)


def test_the_command_line_shows_the_table_of_a_model_that_load_refuses(monkeypatch, words):
    from guardlens.models import checkpoints, loading

    monkeypatch.setattr(checkpoints, "read", lambda *args: (novel(leaky=True), words))
    monkeypatch.setattr(loading.KNOWN.__class__, "preferring", lambda self, given: Names(("storeys",), final_norm=("roof",)))
    result = CliRunner().invoke(commands.application, ["check", "somewhere"])
    assert result.exit_code == 1
    assert "batches and padding" in result.stdout and "no" in result.stdout
