import inspect
import pickle

import pytest

from guardlens import errors

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_message():
    error = errors.SiteError("layer 12", "a layer from 0 to 7", "choose one")
    assert str(error) == "Found layer 12.\nExpected a layer from 0 to 7.\nNext: choose one."
    assert (error.found, error.expected, error.next_step) == ("layer 12", "a layer from 0 to 7", "choose one")


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("a", "b", "c")))
    assert type(error) is kind and str(error) == str(kind("a", "b", "c")) and error.next_step == "c"


def test_the_tree_in_the_docstring_is_the_tree():
    lines = [line for line in errors.__doc__.splitlines() if "Error" in line]
    depths = [(next(i for i, c in enumerate(line) if c.isalpha()) // 4, line.split("Error")[0].strip("│├└─ ") + "Error") for line in lines]
    parents, tree = {}, {}
    for depth, name in depths:
        parents[depth] = name
        tree[name] = parents.get(depth - 1, "Exception")
    assert tree == {kind.__name__: kind.__base__.__name__ for kind in CLASSES}
