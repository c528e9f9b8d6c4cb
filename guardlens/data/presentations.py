"""How a query reaches the model: text only, beside a blank, noisy or its own image, or inside a sentence."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from guardlens.data.images import opened
from guardlens.data.queries import Presentation, Prompt, Query, TextOnly, as_text, require_presentation, require_query, text_only
from guardlens.errors import PresentationError, as_count, quoted

LARGEST = 8192
"""Pixels a side of an image that is made here."""

__all__ = ["Blank", "Chat", "Framed", "Noise", "Own", "Presentation", "TextOnly", "blank", "chat", "framed", "noise", "own", "text_only"]


@dataclass(frozen=True)
class Blank:
    """One flat image of a colour beside every query.

    Raises:
        PresentationError: Not an opaque colour that Pillow knows, or a size that is no number of pixels from 1 to 8192.

    Examples:
        >>> presentations.Blank("white", 8)(queries[0]).images[0].size
        (8, 8)
    """

    colour: str = "grey"
    size: int = 336

    def __post_init__(self) -> None:
        try:
            rgb = ImageColor.getrgb(as_text(self.colour, "a colour", PresentationError))
        except ValueError:
            rgb = None
        if rgb is None or len(rgb) > 3:
            raise PresentationError(
                f"the colour {quoted(self.colour)}", "an opaque colour that Pillow knows by name or code", "try 'grey', or '#808080'"
            )
        _set_size(self)

    @property
    def name(self) -> str:
        return f"blank {self.colour}"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        return Prompt(query.text, (_flat(self.colour, self.size),))


def _set_size(shown: "Blank | Noise") -> None:
    size = as_count(shown.size, "size", PresentationError, "give the model's own image size, model.cfg.image_size")
    if size > LARGEST:
        raise PresentationError(f"size={size}", f"at most {LARGEST} pixels a side", "models scale images down to a few hundred")
    object.__setattr__(shown, "size", size)


@lru_cache(maxsize=8)
def _flat(colour: str, size: int) -> Image.Image:
    """One object for all prompts, by which they are known to show the same."""
    return Image.new("RGB", (size, size), colour)


@dataclass(frozen=True)
class Noise:
    """An image of uniform noise beside every query, drawn anew for each from the seed and the query's id.

    Raises:
        PresentationError: A size that is no number of pixels from 1 to 8192, or a seed that is no whole number from 0 up.

    Examples:
        >>> noise = presentations.Noise(seed=1, size=8)
        >>> [noise(query).images == noise(queries[0]).images for query in queries[:3]]
        [True, False, False]
    """

    seed: int = 0
    size: int = 336

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_count(self.seed, "seed", PresentationError, "noise(seed=0)", least=0))
        _set_size(self)

    @property
    def name(self) -> str:
        return f"noise {self.seed}" if self.seed else "noise"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        generator = np.random.default_rng([self.seed, zlib.crc32(query.id.encode())])
        pixels = generator.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Prompt(query.text, (Image.fromarray(pixels),))


@dataclass(frozen=True)
class Own:
    """The query's own images, in RGB: turned as their EXIF data say, transparency on white, 16 bits scaled to 8.

    Raises:
        PresentationError: A query without an image, or with one that Pillow can't read or whose black and white are not known.

    Examples:
        >>> presentations.Own()(queries[0]).images == queries[0].images
        True
    """

    name: str = "own"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        if not query.images:
            raise PresentationError(
                f"query {query.id!r} without an own image", "at least one in Query(images=...)", "add it, or show a blank image"
            )
        return Prompt(query.text, tuple(opened(image, f"query {query.id!r}") for image in query.images))


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


def blank(colour: str = "grey", size: int = 336) -> Blank:
    """A flat image of a colour: any name or code that Pillow knows, `"grey"`, `"white"`, `"black"`, `"#3060c0"`.

    Raises:
        PresentationError: Not a colour, or no size.

    Examples:
        >>> model.batch("how to mend the hat ?", presentations.blank("#3060c0")).image.sum()  # image tokens
        tensor(16)
    """
    return Blank(colour, size)


def noise(seed: int = 0, size: int = 336) -> Noise:
    """Uniform noise. Give the model's own image size, or resizing averages the noise away (`model.cfg.image_size`).

    Examples:
        >>> noise = presentations.noise(seed=1, size=model.cfg.image_size)
        >>> noise.name
        'noise 1'
    """
    return Noise(seed, size)


own = Own()
"""The query's own images. Asking for it with a query that has none is an error.

Examples:
    >>> model.generate(queries[-1], presentations.own).split()[0]
    'sure'
"""


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
