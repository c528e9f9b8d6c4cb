import contextlib
import inspect
import pickle
import textwrap

import numpy as np
import pytest
import torch

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


def test_a_site_error_reads_the_same_though_it_is_a_key_error():
    error = errors.SiteError("layer 12", "a layer from 0 to 7", "choose one")
    assert isinstance(error, KeyError) and str(error).startswith("Found layer 12.\n")


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_of_numpy_and_torch_count(three):
    number = errors.as_count(three, "draws", errors.NumericsError, "leave it out")
    assert number == 3 and type(number) is int


@pytest.mark.parametrize("odd", [True, np.True_, 2.5, 3.0, float("nan"), "3", None, [3], -1, 0, np.float64(3)])
def test_other_counts_are_refused(odd):
    with pytest.raises(errors.NumericsError, match=r"Found draws=.*\nExpected a whole number, 1 or more\.\nNext: leave it out\."):
        errors.as_count(odd, "draws", errors.NumericsError, "leave it out")


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int8(2), np.array(2.0), torch.tensor(2), torch.tensor(2.0)], ids=repr)
def test_a_number_of_any_kind_becomes_pythons_own(value):
    number = errors.as_number(value, "alpha", errors.InterventionError, "leave it out")
    assert (number, type(number)) == (2.0, float)


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), "2", None, 2j, float("nan"), float("-inf"), 10**400, [2], torch.ones(1)], ids=repr
)
def test_what_is_no_finite_number(value):
    with pytest.raises(errors.InterventionError, match=r"Found alpha=[\s\S]*\nExpected a finite number\.\nNext: leave it out\."):
        errors.as_number(value, "alpha", errors.InterventionError, "leave it out")
    with pytest.raises(errors.InterventionError, match="a whole number, 1 or more"):
        errors.as_count(torch.tensor(True), "draws", errors.InterventionError, "leave it out")


def test_a_warning_names_the_line_of_the_user(recwarn):
    inside = {"__name__": "guardlens.somewhere", "warn": inspect.unwrap(errors.warn), "contextmanager": contextlib.contextmanager}
    source = """
        @contextmanager
        def ready():
            warn("mind the hook")
            yield

        def verb():
            with ready():
                pass
        """
    exec(textwrap.dedent(source), inside)
    inside["verb"]()
    (found,) = recwarn
    assert (found.filename, found.lineno) == (__file__, inspect.currentframe().f_lineno - 2) and found.category is UserWarning


def test_a_sentence_is_shown_as_it_is_and_empty_parts_are_left_out():
    error = errors.InterventionError("These interventions can't run as branches.", next_step="choose layout='auto'")
    assert str(error) == "These interventions can't run as branches.\nNext: choose layout='auto'."
    assert str(errors.InterventionError("seeds 0, 1, ...", "", "")) == "Found seeds 0, 1, ...."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
