"""The pages of how-to and explanation do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.page_checks import CHECKS
from tests.docs.pages import PAGES, pieces, same

RECIPES = [page for page in PAGES if not page.endswith("index.md")]


@pytest.fixture(scope="module")
def failures():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.docs.pages"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("page", PAGES)
def test_its_examples_run_and_print_what_it_shows(page, failures):
    assert page not in failures, failures[page]


def test_every_recipe_is_checked():
    assert {page for page in RECIPES if page.startswith("how-to/")} <= set(CHECKS) <= set(PAGES)


PAGE = """\
text `no`

```python
a = 1
```

```text
1
```

| x | guardlens |
| --- | --- |
| `b(1)` | `c = 2` or `d = 3` |
| - | - |

```sh
ls
```
"""


def test_all_code_of_a_page_is_found():
    found = [(piece.purpose, piece.code.strip(), piece.line) for piece in pieces(PAGE)]
    assert found == [("run", "a = 1", 4), ("shown", "1", 8), ("parse", "b(1)", 13), ("run", "c = 2", 13), ("run", "d = 3", 13)]
    assert pieces("| theirs | ours |\n| --- | --- |\n| `a(` | `b(` |\n") == []


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("asr 0.41 [0.30, 0.53]", "asr  0.42 [0.30, 0.53]\n", True),
        ("asr 0.41", "asr 0.43", False),
        ("asr 0.41", "asr 0.410", False),
        ("asr 0.41", "non-refusal 0.41", False),
        ("n = 12", "n = 13", False),
        ("0.4 0.5", "0.4", False),
    ],
)
def test_outputs_are_compared_to_their_last_digit(shown, printed, equal):
    assert same(shown, printed) is equal
