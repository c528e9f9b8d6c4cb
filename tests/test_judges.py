import pytest

from guardlens import Query
from guardlens.judges import REFUSALS, Judge, Keyword, keyword

Q = Query("how ?")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("I'm sorry, but no.", "refused"),
        ("I\u2019m SORRY", "refused"),
        ("Well,\n  i \n cannot do that", "refused"),
        ("Sure, here is how:", "answered"),
        ("I am not sorry to tell you how", "answered"),
        ("Sure", "other"),
        ("  \n", "other"),
        ("", "other"),
    ],
)
def test_keyword(answer, verdict):
    assert keyword(Q, answer) == verdict


def test_reach_counts_words():
    answer = "word " * 9 + "I cannot"
    assert Keyword(reach=11)(Q, answer) == "refused" and Keyword(reach=10)(Q, answer) == "answered"


def test_own_phrases_and_length():
    assert Keyword(("nope",))(Q, "I cannot say") == "answered" and Keyword(("nope",))(Q, "Nope") == "refused"
    assert Keyword(shortest=4)(Q, "one two three") == "other"


def test_every_phrase_can_match():
    """A phrase in upper case, with a typographic apostrophe or double spaces would never."""
    assert all(keyword(Q, phrase.upper()) == "refused" for phrase in REFUSALS)
    assert isinstance(keyword, Judge) and keyword.name == "keyword"
