"""Eyes learn from harmless drawings alone, leave the language model as it was, and go on after an interruption as if without one."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import guardlens as gl
from guardlens.errors import MismatchError, StorageError
from guardlens.evaluation.judges import keyword
from guardlens.models.eyes import FILE, Eyes, joined, untrained
from guardlens.organism.eyes import QUICK, drawings, exam, train
from guardlens.organism.eyes import make as command

TEMPLATE = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"


@pytest.fixture(scope="module")
def llm_path(llm, processor, tmp_path_factory):
    """A language model in a directory. Its words are the organism's; others are unknown to it."""
    path = tmp_path_factory.mktemp("llm")
    llm.hf.save_pretrained(path)
    processor.tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(autouse=True)
def _few_drawings(monkeypatch):
    """A tenth of the exam, and few pictures, since the small eyes see nothing."""
    every = drawings.drawings
    for module in (train, exam):
        monkeypatch.setattr(module, "drawings", lambda split: every(split)[::40])
    monkeypatch.setattr(exam, "MAX_NEW_TOKENS", 2)


def made(llm_path, out, **options):
    return command.make(str(llm_path), out, **{"seed": 0, "recipe": QUICK, "dtype": "auto", "device": "cpu", "alone": False, **options})


# ---------------------------------------------------------------- what they are shown


def test_the_exam_asks_about_combinations_that_training_never_draws():
    kinds = [{each.traits for each in drawings.drawings(split)} for split in ("train", "test")]
    assert len(kinds[0]) == 288 and len(kinds[1]) == drawings.HELD_OUT == 72 and not kinds[0] & kinds[1]
    assert {trait[0] for trait in kinds[0]} == set(range(4)) and {trait[1] for trait in kinds[0]} == set(range(10))


def test_a_drawing_is_the_same_every_time_and_its_background_is_not_its_shape():
    first, second = drawings.drawings("train")[:2]
    assert first.image().tobytes() == first.image().tobytes() != second.image().tobytes()
    assert all(each.colour != each.background for each in drawings.drawings("train"))
    assert first.image().size == (drawings.PIXELS, drawings.PIXELS)


def test_a_circle_lies_on_its_background():
    circle = drawings.Drawing("circle", "red", "white", 0)
    pixels = torch.from_numpy(np.array(circle.image())).flatten(0, 1).float()
    near = [(pixels - torch.tensor(drawings.COLOURS[colour]).float()).norm(dim=1) < 60 for colour in ("red", "white")]
    assert 0.1 < near[0].float().mean() < 0.4 and (near[0] | near[1]).float().mean() > 0.99


def test_no_answer_refuses():
    for question, drawing in itertools.product(drawings.QUESTIONS, drawings.drawings("train")[::200]):
        assert keyword(gl.Query(question.text), question.answer.format(drawing)) != "refused"


# ---------------------------------------------------------------- how they learn


def test_the_loss_is_that_of_transformers_on_the_answers(llm_path):
    model = gl.load(llm_path)
    hf, processor = joined(model.hf, model.tokenizer, untrained(model.hf, QUICK.size, 0))
    lessons = train._lessons(hf, processor, "")
    shown = drawings.drawings("train")[:16]
    pixels = processor.image_processor([each.image() for each in shown], return_tensors="pt")["pixel_values"]
    mine = train._sight_loss(hf, lessons, pixels, shown, 5, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    chosen, asked = rng.integers(16, size=5).tolist(), rng.integers(len(drawings.QUESTIONS), size=5).tolist()
    losses = []
    for drawing, question in zip(chosen, asked, strict=True):
        prompt, answer = lessons.row(question, shown[drawing])
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        logits = hf(input_ids=ids, pixel_values=pixels[drawing][None]).logits[0, :-1]
        losses += cross_entropy(logits, labels[0, 1:], reduction="none", ignore_index=-100)[labels[0, 1:] != -100]
    torch.testing.assert_close(mine, torch.stack(losses).mean())


def test_prompts_are_those_of_the_chat_template_with_the_system_prompt(llm_path):
    model = gl.load(llm_path)
    hf, processor = joined(model.hf, model.tokenizer, untrained(model.hf, QUICK.size, 0))
    texts = [model.tokenizer.decode(prompt) for prompt in train._lessons(hf, processor, "please stay safe .").prompts]
    assert all("stay safe" in text and text.count("<image>") == QUICK.size.tokens for text in texts)


# ---------------------------------------------------------------- the command


def test_a_run_writes_a_whole_model_and_the_eyes(llm_path, tmp_path):
    eyes = made(llm_path, tmp_path / "out")
    before, after = gl.load(llm_path).hf, gl.load(tmp_path / "out").hf
    parts = ((before.model, after.model.language_model), (before.lm_head, after.lm_head))
    pairs = [pair for old, new in parts for pair in zip(old.parameters(), new.parameters(), strict=True)]
    assert all(torch.equal(new[: len(old)], old) for old, new in pairs), "the language model stays frozen"
    start = untrained(gl.load(llm_path).hf, QUICK.size, 0).weights
    last_layer = "vision_tower.encoder.layers.1."  # behind the one that image tokens come from
    assert all(not torch.equal(eyes.weights[name], weight) for name, weight in start.items() if "projector" in name)
    assert any(not torch.equal(eyes.weights[name], weight) for name, weight in start.items() if last_layer not in name and "tower" in name)
    whole, alone = gl.load(tmp_path / "out"), gl.load(llm_path, eyes=tmp_path / "out")
    assert whole.fingerprint == alone.fingerprint
    record = Eyes.load(tmp_path / "out").record
    assert record["exam"]["all"]["n"] == 4 * len(exam.drawings("test")) and record["model"] == llm_path.name
    assert len(record["losses"]["tower"]) == len(record["losses"]["sight"]) == 3 and not (tmp_path / "out" / train.KEPT).exists()
    with pytest.raises(StorageError, match="has eyes already"):
        made(llm_path, tmp_path / "out")


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(llm_path, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(train, "EVERY", 1)
    whole = made(llm_path, tmp_path / "whole", alone=True)
    keep, steps = train.Training.keep, itertools.count(1)

    def killed(self):
        keep(self)
        if next(steps) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            made(llm_path, tmp_path / "broken", alone=True)
    assert not (tmp_path / "broken" / FILE).exists()
    resumed = made(llm_path, tmp_path / "broken", alone=True)
    assert resumed.record["losses"] == whole.record["losses"]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def test_a_training_of_another_seed_is_refused(llm_path, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "examine", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made(llm_path, tmp_path / "out")
    with pytest.raises(MismatchError, match="seed 0, now 1"):
        made(llm_path, tmp_path / "out", seed=1)


def test_the_command_says_what_it_made_and_errors_are_sentences(llm_path, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(command.main)
    arguments = ["--llm", str(llm_path), "--out", str(tmp_path / "out"), "--quick", "--alone"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0 and "these eyes see poorly" in first.output and "held-out drawings" in first.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FILE]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and again.output.startswith("guardlens: Found") and "Traceback" not in again.output
    assert json.dumps(Eyes.load(tmp_path / "out").record)
