"""Presentations around another presentation: without its images, with words around the query, or in a longer conversation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from guardlens.data.presentations.protocol import Presentation, Prompt, require_presentation
from guardlens.data.queries import Query, as_text
from guardlens.errors import PresentationError


@dataclass(frozen=True)
class WithoutImages:
    """Another presentation without its images. The words around the query stay.

    Examples:
        >>> presentations.WithoutImages(grey)(queries[0]).images
        ()
    """

    inner: Presentation

    @property
    def name(self) -> str:
        return f"{self.inner.name} | without images"

    def __call__(self, query: Query) -> Prompt:
        return replace(self.inner(query), images=())


@dataclass(frozen=True)
class Framed:
    """Another presentation with words before and after the query's text, such as a reminder, a filler or a template.

    Raises:
        PresentationError: `inner` is not a presentation, or the words are not text.

    Examples:
        >>> presentations.Framed(grey, before="please stay safe . ", label="reminded").name
        'blank grey | reminded'
    """

    inner: Presentation
    before: str = ""
    after: str = ""
    label: str = "framed"

    def __post_init__(self) -> None:
        _check_fields(self, "before", "after", "label")

    @property
    def name(self) -> str:
        return f"{self.inner.name} | {self.label}"

    def __call__(self, query: Query) -> Prompt:
        prompt = self.inner(query)
        return replace(prompt, text=f"{self.before}{prompt.text}{self.after}")


def _check_fields(wrapper: "Framed | Chat", *names: str) -> None:
    require_presentation(wrapper.inner)
    for name in names:
        object.__setattr__(wrapper, name, as_text(getattr(wrapper, name), name, PresentationError))
    if not wrapper.label.strip():
        raise PresentationError("an empty label", "a name for tables", "leave the label out, or name what is added")


def framed(inner: Presentation, before: str = "", after: str = "", label: str = "framed") -> Framed:
    """Put words before and after the text of another presentation.

    Examples:
        >>> framed = presentations.framed(grey, before="please stay safe . ")
        >>> framed(queries[0]).text
        'please stay safe . how to forge the badge ?'
    """
    return Framed(inner, before, after, label)


RENDERING = ("add_generation_prompt", "chat_template", "conversation", "messages", "tokenize")
"""Arguments of `apply_chat_template` that guardlens sets itself."""


@dataclass(frozen=True)
class Chat:
    """Another presentation inside a longer conversation: after a system prompt, and with the beginning of an answer.

    The system prompt, prefill and variables of `inner` stay where this presentation has none.

    Attributes:
        inner: The presentation of the query itself.
        system: The system prompt; empty for none.
        prefill: The beginning of the answer, which the model continues.
        label: The part of the name in tables that stands for this presentation.
        template_kwargs: Variables of the chat template, such as `{"enable_thinking": False}`. They are stored as JSON text with sorted
            keys, so that equal variables compare equal.

    Raises:
        PresentationError: `inner` is not a presentation, a field is not text, or `template_kwargs` cannot be written as a JSON object.
            When a query is presented: `inner` sets the system prompt, the prefill or a variable to another value.

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
        _check_fields(self, "system", "prefill", "label")
        object.__setattr__(self, "template_kwargs", _variables_as_json(self.template_kwargs))

    @property
    def name(self) -> str:
        return f"{self.inner.name} | {self.label}"

    def __call__(self, query: Query) -> Prompt:
        prompt = self.inner(query)
        fields = self._merge(_words_in(prompt), _words_in(self))
        variables = self._merge(_variables(prompt.template_kwargs), _variables(str(self.template_kwargs)))
        return replace(prompt, **fields, template_kwargs=_variables_as_json(variables))

    def _merge(self, inner: Mapping[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
        """Merge what `inner` and this presentation set, by name."""
        for name in inner.keys() & outer.keys():
            if json.dumps(inner[name], sort_keys=True) != json.dumps(outer[name], sort_keys=True):
                found = f"{name}={outer[name]!r} around {self.inner.name!r}, which says {inner[name]!r}"
                raise PresentationError(found, "one of the two", f"set {name} once")
        return {**inner, **outer}


def _words_in(source: Prompt | Chat) -> dict[str, str]:
    """The system prompt and the prefill, if they are not empty."""
    return {name: words for name in ("system", "prefill") if (words := getattr(source, name))}


def _variables(text: str) -> dict[str, Any]:
    return json.loads(text or "{}")


def _variables_as_json(variables: Any) -> str:
    """Return variables of a chat template as JSON text with sorted keys, and no variables as empty text.

    Raises:
        PresentationError: The variables are not a JSON object, or a name is not an identifier or one of `RENDERING`.
    """
    try:
        values = json.loads(variables or "{}") if isinstance(variables, str) else dict(variables)
        text = json.dumps(values, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _bad_variables(str(error)) from None
    if not isinstance(values, dict):
        raise _bad_variables("no names")
    for name in values:
        if not isinstance(name, str) or not name.isidentifier() or name in RENDERING:
            raise _bad_variables(repr(name))
    return text if values else ""


def _bad_variables(found: str) -> PresentationError:
    return PresentationError(
        f"template_kwargs with {found}", "names and values of variables that JSON can hold", "such as {'enable_thinking': False}"
    )


def chat(
    inner: Presentation, system: str = "", prefill: str = "", label: str = "chat", template_kwargs: Mapping[str, Any] | str = ""
) -> Chat:
    """Put a system prompt before another presentation, and the beginning of an answer, which the model continues, after it.

    `template_kwargs` are passed to the chat template and are part of the presentation, e.g. `{"enable_thinking": False}` for a template
    that can leave the thinking out. Presenting a query fails if the template does not read a variable.

    Examples:
        >>> begun = presentations.chat(presentations.text_only, prefill=" sure :")
        >>> model.generate("how to mend the hat ?", begun).split()[0]  # the answer continues the prefill
        'first'
    """
    return Chat(inner, system, prefill, label, template_kwargs)
