"""What a presentation is, the one without an image, and the checks for arguments that must be presentations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from guardlens.data.queries import Query, as_text, require_query
from guardlens.errors import PresentationError, is_several, quoted

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """A query as it is shown: what goes into the chat template.

    Attributes:
        text: What the user says.
        images: What they show, before the text.
        system: The system prompt; none if empty.
        prefill: How the assistant's answer begins, the model going on from there.
        template_kwargs: What else the chat template is told, as JSON text.

    Raises:
        PresentationError: A field that is no text.

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
    """How a query reaches the model. Frozen and comparable: equal presentations show equal prompts.

    Examples:
        >>> isinstance(grey, presentations.Presentation), grey.name
        (True, 'blank grey')
        >>> grey(gl.Query("how to mend the hat ?")).text  # what the user says; .images is what they show
        'how to mend the hat ?'
    """

    @property
    def name(self) -> str:
        """As it appears in tables, such as `text`, `blank grey`, `own`."""
        ...

    def __call__(self, query: Query) -> Prompt: ...


@dataclass(frozen=True)
class TextOnly:
    """The query's text without any image: what the LLM sees.

    Examples:
        >>> presentations.TextOnly()(gl.Query("how to mend the hat ?")).images
        ()
    """

    name: str = "text"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        return Prompt(query.text)


text_only = TextOnly()
"""A query's text without any image: what the LLM sees.

Examples:
    >>> model.batch("how to mend the hat ?", presentations.text_only).mask.shape  # query, token
    torch.Size([1, 11])
"""


def require_presentation(presentation: Any) -> None:
    """Refuse what can't show a query, such as an image or a function that makes presentations.

    Raises:
        PresentationError: As said.
    """
    named = not isinstance(presentation, type) and isinstance(presentation, Presentation)
    if named and not (isinstance(presentation.name, str) and presentation.name.strip()):
        raise PresentationError(f"a presentation whose name is {quoted(presentation.name)}", "a name for tables", "give it one")
    if not named:
        shown = getattr(presentation, "__name__", None) or f"something of type {type(presentation).__name__}"
        raise PresentationError(
            f"{shown} as a presentation",
            "text_only, presentations.own_images, or what presentations.blank('grey') and its like give",
            _INSTEAD.get(type(presentation).__name__, _INSTEAD[""]),
        )


_INSTEAD = {
    "Intervention": "name an intervention: intervention=intervention",
    "Defence": "take both of its parts: defence.present(presentation), intervention=defence.intervention",
    "": "put an image of your own into Query(text, images=(image,)), and show it with presentations.own_images",
}


def as_presentations(presentations: Any) -> list[Presentation]:
    """One presentation, several or none as a list, each with a name of its own.

    Raises:
        PresentationError: Something else is among them, or two have one name.
    """
    several = is_several(presentations) and not isinstance(presentations, Presentation)
    given: Any = presentations if several else [presentations]
    shown: list[Any] = list(given)
    for presentation in shown:
        require_presentation(presentation)
    if len({presentation.name for presentation in shown}) < len(shown):
        raise PresentationError("two presentations of one name", "a name for each", "show sizes of one image in separate calls")
    return shown
