"""The command line: help, tables, exit codes, and errors as sentences."""

import json
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import guardlens as gl
from guardlens import cli
from guardlens.cli import demo
from guardlens.models import checks


@pytest.fixture
def guardlens(monkeypatch, capsys):
    """Runs the command line in this process; returns its exit code and what it printed."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "error" if "VERBOSITY" in name else "1")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["guardlens", *map(str, arguments)])
        code = None
        with pytest.raises(SystemExit) as caught:
            cli.app()
        code = caught.value.code
        printed = capsys.readouterr()
        message = code if isinstance(code, str) else ""  # what Python prints to stderr on the way out
        return (1 if message else code or 0), printed.out, printed.err + message

    return call


@pytest.fixture(scope="module")
def saved(hf_vlm, processor, llm, tmp_path_factory):
    """The tiny VLM and the tiny LLM as directories."""
    vlm, text = (tmp_path_factory.mktemp("models") / name for name in ("tiny-vlm", "tiny-llm"))
    hf_vlm.save_pretrained(vlm)
    processor.save_pretrained(vlm)
    llm.hf.save_pretrained(text)
    llm.processor.save_pretrained(text)
    return vlm, text


@pytest.fixture
def data(tmp_path):
    pairs = zip(gl.organism.pairs().harmful[:8], gl.organism.pairs().harmless[:8], strict=True)
    rows = [{"text": query.text, "label": query.label, "pair": query.pair} for pair in pairs for query in pair]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_python_m_guardlens():
    done = subprocess.run([sys.executable, "-m", "guardlens", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout and "check" in done.stdout and done.stderr == ""


def test_help_names_the_commands_and_their_options(guardlens):
    code, out, _ = guardlens("--help")
    assert code == 0 and "demo" in out and "check" in out
    code, out, _ = guardlens("demo", "--help")
    assert code == 0 and all(option in out for option in ("--out", "--model", "--data", "--dtype", "--device-map"))


def test_no_command_and_an_unknown_one(guardlens):
    assert guardlens()[0] == 2
    code, _, err = guardlens("mend")
    assert code == 2 and "No such command 'mend'" in err


def test_check_prints_a_table(guardlens, saved):
    code, out, _ = guardlens("check", saved[0])
    assert code == 0
    assert "HookedModel('tiny-vlm': LlavaForConditionalGeneration, VLM, 8 layers, d_model 128)" in out
    rows = {line.split("│")[2].strip(): line.split("│")[1].strip() for line in out.splitlines() if line.count("│") == 4}
    assert rows == dict.fromkeys(checks.CHECKS, "yes")


def test_check_of_a_text_only_model(guardlens, saved):
    code, out, _ = guardlens("check", saved[1])
    assert "LLM, 3 layers" in out and "a text-only model" in out
    assert code == 0


def test_check_fails_where_something_does_not_work(guardlens, saved, monkeypatch):
    monkeypatch.setitem(checks.CHECKS, "edits", lambda model: (False, "edits are lost"))
    code, out, _ = guardlens("check", saved[1])
    assert code == 1 and "edits are lost" in out


def assert_sentence(code, err, *parts):
    assert code == 1 and "Traceback" not in err
    err = err[err.index("guardlens: ") :]
    assert err.startswith("guardlens: ") and ("\nExpected " in err or "\nNext: " in err)
    for part in parts:
        assert part in err


def test_unknown_model(guardlens, tmp_path, data):
    code, _, err = guardlens("check", tmp_path / "nowhere")
    assert_sentence(code, err, "nowhere", "which transformers can't load", "correct the name")
    code, _, err = guardlens("demo", "--model", tmp_path / "nowhere", "--data", data, "--out", tmp_path / "out")
    assert_sentence(code, err, "nowhere", "which transformers can't load")
    assert not (tmp_path / "out").exists()


def test_our_errors_have_no_traceback_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "guardlens", "demo", "--model", "any", "--data", str(tmp_path / "data.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_sentence(done.returncode, done.stderr, "'data.txt'", "a .jsonl or .csv file")


@pytest.mark.parametrize("given", ["--model", "--data"])
def test_model_and_data_go_together(guardlens, given, tmp_path):
    code, _, err = guardlens("demo", given, "something", "--out", tmp_path / "out")
    assert code == 2 and "--model and --data go together" in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_data_that_cannot_be_read_names_the_line(guardlens, tmp_path, saved, data):
    lines = data.read_text(encoding="utf-8").splitlines()
    for line, why in (('{"text": "how to', "not JSON"), ('{"label": "harmful"}', "without a 'text'"), ('{"text": " "}', "an empty text")):
        data.write_text("\n".join([*lines[:2], line, *lines[2:]]), encoding="utf-8")
        code, _, err = guardlens("demo", "--model", saved[0], "--data", data, "--out", tmp_path / "out")
        assert_sentence(code, err, f"{data}, line 3: ", why, "mend that line")


def test_demo_of_a_text_only_model(guardlens, saved, data, tmp_path):
    code, _, err = guardlens("demo", "--model", saved[1], "--data", data, "--out", tmp_path / "out")
    assert_sentence(code, err, "the text-only model tiny-llm", "a vision-language model")


def test_demo_hands_everything_on_and_tells_the_finding(guardlens, saved, data, tmp_path, monkeypatch):
    seen = {}

    def fake(subject, out):
        seen.update(subject=subject, out=out)
        raise gl.errors.StorageError("the end", "an end", "stop")

    monkeypatch.setattr(demo, "run", fake)
    code, out, err = guardlens(
        "demo", "--model", saved[0], "--data", data, "--out", tmp_path / "out", "--max-new-tokens", 7, "--dtype", "float16"
    )
    assert_sentence(code, err, "the end")
    assert seen["out"] == tmp_path / "out" and seen["subject"].new_tokens == 7 and seen["subject"].model.name == "tiny-vlm"
    assert next(seen["subject"].model.hf.parameters()).dtype == torch.float16
    assert "guardlens demo on HookedModel('tiny-vlm'" in out


def test_version(guardlens):
    assert guardlens("--version")[:2] == (0, f"guardlens {metadata.version('guardlens')}\n")


@pytest.mark.parametrize("option", ["--max-new-tokens=8", "--dtype=float16", "--device-map=auto"])
def test_options_of_a_model_need_one(guardlens, option, tmp_path):
    code, _, err = guardlens("demo", option, "--out", tmp_path / "out")
    assert code == 2 and "go with --model" in " ".join(err.replace("│", " ").split())


def test_what_cannot_be_is_met_before_anything_is_loaded(guardlens, monkeypatch, tmp_path):
    for name in ("organism_subject", "own_subject"):
        monkeypatch.setattr(demo, name, lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("file", "file/below", "link"):
        code, _, err = guardlens("demo", "--out", tmp_path / out)
        assert_sentence(code, err, str(tmp_path / out), "which can't be written")
    assert_sentence(*guardlens("demo", "--out", "")[::2], "the path ''")
    assert guardlens("demo", "--model", "any", "--data", "any", "--max-new-tokens", 0)[0] == 2


@pytest.mark.parametrize("name", ["z[/red]", "z[bold]", "[link=x]z"])
def test_names_are_no_markup(guardlens, saved, monkeypatch, tmp_path, name):
    monkeypatch.setattr(demo, "organism_subject", lambda: SimpleNamespace(model=f"model {name}"))
    monkeypatch.setattr(demo, "run", lambda *_: None)
    monkeypatch.setattr("guardlens.cli.demo_report.short_table", lambda _: pd.DataFrame({"defence": [name]}))
    monkeypatch.setattr("guardlens.cli.demo_report.lead", lambda _: [name])
    code, out, _ = guardlens("demo", "--out", tmp_path / name)
    assert code == 0 and out.count(name) >= 4 and f"{name}/report.html" in "".join(out.split())
    monkeypatch.setattr(checks, "check", lambda _: [SimpleNamespace(works=True, name=name, detail=f"a detail {name}")])
    folder = tmp_path / f"model{name.replace('/', '')}"
    folder.symlink_to(saved[1])
    code, out, _ = guardlens("check", folder)
    assert code == 0 and f"a detail {name}" in out and folder.name in out


def test_demo_loads_the_model_as_asked(guardlens, tmp_path, monkeypatch):
    seen = {}

    def fake(source, data, new_tokens, **options):
        seen.update(options, source=source, new_tokens=new_tokens)
        raise gl.errors.StorageError("the end", "an end", "stop")

    monkeypatch.setattr(demo, "own_subject", fake)
    monkeypatch.chdir(tmp_path)
    guardlens("demo", "--model", "some", "--data", tmp_path / "pairs.csv", "--dtype", "bfloat16", "--device-map", "auto")
    assert seen == {"source": "some", "new_tokens": 64, "dtype": "bfloat16", "device_map": "auto"}
