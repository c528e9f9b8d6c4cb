"""The protocol of presentations, the presentation without an image, and checks of arguments that must be presentations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from guardlens.data.queries import Query, as_text, require_query
from guardlens.errors import PresentationError, is_several, quoted, type_of

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """A query as the chat template receives it.

    Attributes:
        text: The text of the user's message.
        images: The images of the user's message, which come before the text.
        system: The system prompt; empty for none.
        prefill: The beginning of the assistant's answer, which the model continues.
        template_kwargs: Further variables of the chat template, as JSON text.

    Raises:
        PresentationError: A field is not text.

    Examples:
        >>> presentations.text_only(queries[0]) == presentations.Prompt("how to forge the badge ?")
        True
    """

    text: str
    images: "tuple[Image.Image, ...]" = ()
    system: str = ""
    prefill: str = ""
    template_kwargs: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "system", "prefill", "template_kwargs"):
            object.__setattr__(self, name, as_text(getattr(self, name), f"the {name} of a prompt", PresentationError))


@runtime_checkable
class Presentation(Protocol):
    """A way to present queries to the model. Presentations are frozen and comparable: equal presentations produce equal prompts.

    Examples:
        >>> isinstance(grey, presentations.Presentation), grey.name
        (True, 'blank grey')
        >>> grey(gl.Query("how to mend the hat ?")).text  # the user's message; the grey image is in .images
        'how to mend the hat ?'
    """

    @property
    def name(self) -> str:
        """The name in tables, such as `text`, `blank grey` or `own`."""
        ...

    def __call__(self, query: Query) -> Prompt: ...


@dataclass(frozen=True)
class TextOnly:
    """The query's text without any image, as the LLM receives it.

    Examples:
        >>> presentations.TextOnly()(gl.Query("how to mend the hat ?")).images
        ()
    """

    name: str = "text"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        return Prompt(query.text)


text_only = TextOnly()
"""The query's text without any image, as the LLM receives it.

Examples:
    >>> model.batch("how to mend the hat ?", presentations.text_only).mask.shape  # query, token
    torch.Size([1, 11])
"""


def require_presentation(presentation: Any) -> None:
    """Reject arguments that cannot present a query, such as an image, or a function that makes presentations.

    Raises:
        PresentationError: The argument is not a presentation, or its name is empty or not text.
    """
    if isinstance(presentation, type) or not isinstance(presentation, Presentation):
        found = getattr(presentation, "__name__", None) or type_of(presentation)
        raise PresentationError(
            f"{found} as a presentation",
            "text_only, presentations.own_images, or the result of a function such as presentations.blank('grey')",
            _CORRECTIONS.get(type(presentation).__name__, _CORRECTIONS[""]),
        )
    if not isinstance(presentation.name, str) or not presentation.name.strip():
        raise PresentationError(f"a presentation whose name is {quoted(presentation.name)}", "a name for tables", "give it a name")


_CORRECTIONS = {
    "Intervention": "pass an intervention by name: intervention=...",
    "Defence": "pass both parts of a defence: defence.present(presentation), intervention=defence.intervention",
    "": "to show an image of your own, put it into Query(text, images=(image,)) and use presentations.own_images",
}
"""The name of a type that is mistaken for a presentation -> how to pass it instead."""


def as_presentations(presentations: Any) -> list[Presentation]:
    """Return one presentation or several as a list.

    Raises:
        PresentationError: An item is not a presentation, or two have the same name.
    """
    several = is_several(presentations) and not isinstance(presentations, Presentation)
    given: Any = presentations if several else [presentations]
    items: list[Any] = list(given)
    for presentation in items:
        require_presentation(presentation)
    if len({presentation.name for presentation in items}) < len(items):
        raise PresentationError("two presentations of one name", "a name for each", "show sizes of one image in separate calls")
    return items
