"""Public verbs given wrong values: a result comes out, an error of ours, or Python's own about the signature (tests/fuzz.py)."""

import json
import subprocess
import sys

EXAMPLES = 15
"""For each verb; `python -m tests.fuzz 0` tries every value for every argument, in two minutes."""


def test_what_comes_out_of_wrong_arguments():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz", str(EXAMPLES)], stdout=subprocess.PIPE, text=True, check=True, timeout=600
    )
    assert json.loads(done.stdout) == {}
