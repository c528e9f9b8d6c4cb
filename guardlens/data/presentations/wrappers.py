"""Presentations around another presentation: without its images, with words around the query, or in a longer conversation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from guardlens.data.presentations.protocol import Presentation, Prompt, require_presentation
from guardlens.data.queries import Query, as_text
from guardlens.errors import PresentationError

WITHOUT_IMAGES = "without images"


@dataclass(frozen=True)
class WithoutImages:
    """What another presentation shows, its images taken away: the words around the query stay.

    Examples:
        >>> presentations.WithoutImages(grey)(queries[0]).images
        ()
    """

    inner: Presentation

    @property
    def name(self) -> str:
        return f"{self.inner.name} | {WITHOUT_IMAGES}"

    def __call__(self, query: Query) -> Prompt:
        return replace(self.inner(query), images=())


@dataclass(frozen=True)
class Framed:
    """Another presentation with words before and after the query's text (a reminder, a filler, a template).

    Raises:
        PresentationError: `inner` is no presentation, or the words are no text.

    Examples:
        >>> presentations.Framed(grey, before="please stay safe . ", label="reminded").name
        'blank grey | reminded'
    """

    inner: Presentation
    before: str = ""
    after: str = ""
    label: str = "framed"

    def __post_init__(self) -> None:
        _set_words(self, "before", "after", "label")

    @property
    def name(self) -> str:
        return f"{self.inner.name} | {self.label}"

    def __call__(self, query: Query) -> Prompt:
        prompt = self.inner(query)
        return replace(prompt, text=f"{self.before}{prompt.text}{self.after}")


def _set_words(shown: "Framed | Chat", *names: str) -> None:
    require_presentation(shown.inner)
    for name in names:
        object.__setattr__(shown, name, as_text(getattr(shown, name), name, PresentationError))
    if not shown.label.strip():
        raise PresentationError("an empty label", "a name for tables", "leave it out, or name what is added")


def framed(inner: Presentation, before: str = "", after: str = "", label: str = "framed") -> Framed:
    """Words before and after the text of another presentation.

    Examples:
        >>> framed = presentations.framed(grey, before="please stay safe . ")
        >>> framed(queries[0]).text
        'please stay safe . how to forge the badge ?'
    """
    return Framed(inner, before, after, label)


RENDERING = ("add_generation_prompt", "chat_template", "conversation", "messages", "tokenize")
"""Arguments of `apply_chat_template` that guardlens gives itself."""


@dataclass(frozen=True)
class Chat:
    """Another presentation inside a longer conversation: after a system prompt, before the beginning of the answer.

    What the inner one says of these stays, where this one says nothing.

    Attributes:
        inner: How the query itself is shown.
        system: The system prompt; none if empty.
        prefill: Words that the answer begins with.
        label: As it appears in tables.
        template_kwargs: Variables of the chat template, such as `{"enable_thinking": False}`; kept as JSON text with sorted keys, so that
            equal ones are equal.

    Raises:
        PresentationError: `inner` is no presentation, words are no text, or `template_kwargs` nothing that JSON can hold by name. When a
            query is shown: another system prompt, prefill or value of a variable than that of `inner`.

    Examples:
        >>> presentations.Chat(grey, prefill=" sure :").name
        'blank grey | chat'
        >>> presentations.Chat(grey, template_kwargs={"enable_thinking": False}).template_kwargs
        '{"enable_thinking": false}'
    """

    inner: Presentation
    system: str = ""
    prefill: str = ""
    label: str = "chat"
    template_kwargs: str | Mapping[str, Any] = ""

    def __post_init__(self) -> None:
        _set_words(self, "system", "prefill", "label")
        object.__setattr__(self, "template_kwargs", _as_json(self.template_kwargs))

    @property
    def name(self) -> str:
        return f"{self.inner.name} | {self.label}"

    def __call__(self, query: Query) -> Prompt:
        prompt = self.inner(query)
        inner, mine = ({name: getattr(each, name) for name in ("system", "prefill") if getattr(each, name)} for each in (prompt, self))
        variables = (json.loads(str(each.template_kwargs) or "{}") for each in (prompt, self))
        return replace(prompt, **self._united(inner, mine), template_kwargs=_as_json(self._united(*variables)))

    def _united(self, inner: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
        """What the inner presentation says and what this one says, by name."""
        for name in inner.keys() & mine.keys():
            if json.dumps(inner[name], sort_keys=True) != json.dumps(mine[name], sort_keys=True):
                raise PresentationError(
                    f"{name}={mine[name]!r} around {self.inner.name!r}, which says {inner[name]!r}", "one of them", f"say {name} once"
                )
        return {**inner, **mine}


def _as_json(named: Any) -> str:
    """Variables of a chat template as text that is the same for equal ones; empty where there is none."""
    try:
        values = json.loads(named or "{}") if isinstance(named, str) else dict(named)
        text = json.dumps(values, sort_keys=True, allow_nan=False)
        wrong = None if isinstance(values, dict) else "no names"
    except (TypeError, ValueError) as error:
        raise _no_variables(str(error)) from None
    wrong = wrong or next(
        (repr(name) for name in values if not isinstance(name, str) or not name.isidentifier() or name in RENDERING), None
    )
    if wrong:
        raise _no_variables(wrong)
    return text if values else ""


def _no_variables(found: str) -> PresentationError:
    return PresentationError(
        f"template_kwargs with {found}", "names and values of variables that JSON can hold", "such as {'enable_thinking': False}"
    )


def chat(
    inner: Presentation, system: str = "", prefill: str = "", label: str = "chat", template_kwargs: Mapping[str, Any] | str = ""
) -> Chat:
    """A system prompt before another presentation, and words that the answer begins with (the model goes on after them).

    `template_kwargs` are handed to the chat template, and part of what the presentation is: `{"enable_thinking": False}` where a model's
    template can leave the thinking out. A variable that the template does not read is refused when a query is shown.

    Examples:
        >>> begun = presentations.chat(presentations.text_only, prefill=" sure :")
        >>> model.generate("how to mend the hat ?", begun).split()[0]  # the answer goes on after the prefill
        'first'
    """
    return Chat(inner, system, prefill, label, template_kwargs)
