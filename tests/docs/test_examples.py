"""Every public name has an example, and every example of the docs' reference runs: in docstrings, and on its pages."""

import doctest
import inspect
import json
import os
import re
import subprocess
import sys
import traceback
import typing
import warnings
from pathlib import Path

import griffe
import pytest
from matplotlib import pyplot

import guardlens as gl

API = Path(__file__).parents[2] / "docs" / "api"
BEGIN, *_ = re.findall(r"```python\n(.*?)```", (API / "index.md").read_text(encoding="utf-8"), flags=re.DOTALL)
"""What every example begins from; readers find it on the first page of the reference."""


def public_members(module):
    """What a public module offers: its `__all__`, or else the functions, classes and instances that it defines."""
    listed = [name for name, member in module.members.items() if member.is_public and not member.is_alias and not name[0].isupper()]
    classes = [name for name, member in module.members.items() if member.is_public and not member.is_alias and member.is_class]
    return module.exports or [*classes, *listed]


def result_types():
    """The classes that public functions give back."""
    for name in gl.__all__:
        value = getattr(gl, name)
        given = typing.get_type_hints(value).get("return") if inspect.isfunction(value) else None
        if inspect.isclass(given) and given.__module__.startswith("guardlens."):
            yield f"{given.__module__}.{given.__qualname__}"


def documented(path):
    """A name of the package where it is defined."""
    found = PACKAGE[path.removeprefix("guardlens.")]
    return found.final_target if found.is_alias else found


def required():
    modules = {name: documented(f"{module.__name__}") for name in gl.__all__ if inspect.ismodule(module := getattr(gl, name))}
    names = [documented(f"guardlens.{gl._HOMES[name]}.{name}") for name in gl.__all__ if name not in modules]
    names += [documented(f"{module.path}.{name}") for module in modules.values() for name in public_members(module)]
    names += [documented(path) for path in result_types()]
    return sorted({found.path for found in names if not found.is_module})


def objects(owner):
    for member in owner.members.values():
        if not member.is_alias:
            yield member
            if member.is_module or member.is_class:
                yield from objects(member)


def examples(found):
    """The examples of a docstring, by the parser that the docs are built with."""
    sections = found.docstring.parse("google", warnings=False) if found.docstring else []
    texts = [part for section in sections if section.kind is griffe.DocstringSectionKind.examples for part in section.value]
    return "\n\n".join(text for kind, text in texts if kind is griffe.DocstringSectionKind.examples)


PACKAGE = typing.cast(griffe.Module, griffe.load("guardlens", search_paths=[Path(gl.__file__).parents[1]], resolve_aliases=True))
DOCUMENTED = {found.path: found for found in objects(PACKAGE)}
EXAMPLES = {path: text for path, found in DOCUMENTED.items() if (text := examples(found))}


PAGES = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in API.glob("*.md")}


def failures():
    """What each example did wrong, empty where nothing; they share the objects of the first page and nothing else."""
    space = {}
    exec(compile(BEGIN, "docs/api/index.md", "exec"), space)
    found = {path: failures_of_docstring(path, dict(space)) for path in EXAMPLES}
    return found | {page: failure_of_page(page, dict(space)) for page in PAGES}


def failures_of_docstring(path, space):
    said = []
    test = doctest.DocTestParser().get_doctest(EXAMPLES[path], space, path, str(DOCUMENTED[path].filepath), 0)
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    pyplot.close("all")
    return "".join(said) if result.attempted else "nothing to run"


def failure_of_page(page, space):
    try:
        for block in PAGES[page]:
            exec(compile(block, f"docs/api/{page}", "exec"), space)
    except Exception:
        return traceback.format_exc()
    return ""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """In a process of their own, without the tests' type checks, as users run them; every warning is an error."""
    command = [sys.executable, __file__]
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("examples"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", required())
def test_every_public_name_has_an_example(path):
    assert path in EXAMPLES, f"{path} has no section 'Examples:' in its docstring ({DOCUMENTED[path].filepath})"


@pytest.mark.parametrize("where", [*EXAMPLES, *sorted(PAGES)])
def test_examples_do_as_they_say(where, outcomes):
    assert not outcomes[where], outcomes[where]


def test_no_example_is_prose():
    """`Example:` would be shown as a note, and not be run."""
    said = {path: found.docstring.value for path, found in DOCUMENTED.items() if found.docstring}
    assert not [path for path, text in said.items() if re.search(r"^ *Example:", text, flags=re.MULTILINE)]


def test_every_public_name_is_on_a_page():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in API.glob("*.md"))
    entries = re.findall(r"^::: (\S+)\n(    options:\n      members: false)?", f"{pages}\n", flags=re.MULTILINE)
    whole = [path for path, is_alone in entries if not is_alone]
    named = {path for path, _ in entries}
    assert not [path for path in required() if path not in named and not any(f"{path}.".startswith(f"{entry}.") for entry in whole)]


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps(failures()))
