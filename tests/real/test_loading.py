"""A checkpoint is loaded, known again, and sound."""

from pathlib import Path

import pytest
import torch

import guardlens as gl
from guardlens.models.checks import check


def weights(model):
    return model.id.partition("@")[2]


def test_the_check_finds_nothing_wrong(model):
    wrong = [finding for finding in check(model) if finding.works is False]
    assert not wrong


def test_it_has_one_id_whenever_it_is_loaded(loaded):
    model, before = loaded
    assert model.id == before


def test_one_changed_weight_changes_the_id(model, hf):
    again = lambda: weights(gl.load(hf, processor=model.processor, self_check=False))  # noqa: E731
    before, parameter = again(), hf.get_input_embeddings().weight
    assert before == weights(model)
    row, column = len(parameter) // 2 + 1, parameter.shape[1] // 3
    value = parameter[row, column].item()
    try:
        with torch.no_grad():
            parameter[row, column] = value + 0.01
        assert again() != before
    finally:
        with torch.no_grad():
            parameter[row, column] = value
    assert again() == before


def test_a_gguf_file_is_what_transformers_reads(source, hf, model):
    if Path(source).suffix != ".gguf":
        pytest.skip("not a GGUF file")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"pretrained_model_name_or_path": Path(source).parent, "gguf_file": Path(source).name}
    theirs = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    mine = dict(hf.named_parameters())
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(mine[name], parameter) for name, parameter in theirs.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(**named)
    assert tokenizer.chat_template == model.tokenizer.chat_template
    assert tokenizer("How to fold a boat?").input_ids == model.tokenizer("How to fold a boat?").input_ids
