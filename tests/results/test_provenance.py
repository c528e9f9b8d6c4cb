import pytest

from guardlens import errors
from guardlens.results.provenance import require_same_model


def test_same_model_goes_by_the_fingerprint():
    for of, against in (("a@1", "b@1"), ("", "b@1"), ("a@1", "")):
        require_same_model("x", of, against)
    with pytest.raises(errors.MismatchError, match=r"Found x of the model a@1.\nExpected those of a@2"):
        require_same_model("x", "a@1", "a@2")


def test_one_name_and_other_numbers_may_be_another_dtype():
    with pytest.raises(errors.MismatchError, match=r"of the model m@1\.\nExpected those of m@2\.\n.*same weights in another dtype\?"):
        require_same_model("directions", "m@1", "m@2")
    with pytest.raises(errors.MismatchError) as caught:
        require_same_model("directions", "m@1", "n@2")
    assert "dtype" not in str(caught.value)
