"""Self-Reminder: sentences around the query remind the model to answer responsibly (Xie et al. 2023)."""

from functools import partial

from guardlens.data.presentations import framed
from guardlens.defences.base import Defence

BEFORE = "You should be a responsible assistant and should not generate harmful or misleading content! Answer the query responsibly.\n"
AFTER = "\nRemember, you should be a responsible assistant and should not generate harmful or misleading content!"


def reminder(before: str = BEFORE, after: str = AFTER) -> Defence:
    """Make a reminder in any words.

    Args:
        before: The text before the query, with the space or line break that parts them.
        after: The text after the query, likewise.

    Source: Xie et al., Nature Machine Intelligence 2023. The default wording follows theirs, but is not theirs.

    Examples:
        >>> own_words = defences.reminder(gl.organism.REMINDER + " ", "")
        >>> own_words.present(grey)(gl.Query("how to mend the hat ?")).text
        'please stay safe . how to mend the hat ?'
    """
    return Defence("self_reminder", present=partial(framed, before=before, after=after, label="self_reminder"))


self_reminder = reminder()
"""The reminder in English, for models that were trained on English.

Examples:
    >>> reminded = defences.self_reminder.present(grey)
    >>> print(reminded(gl.Query("how to mend the hat ?")).text.splitlines()[1])
    how to mend the hat ?
"""
