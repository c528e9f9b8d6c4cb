"""Presentations of queries: as text only, with a blank, noisy or own image, inside a sentence, or inside a conversation."""

from guardlens.data.presentations.protocol import Presentation, Prompt, TextOnly, text_only
from guardlens.data.presentations.with_image import Blank, Noise, OwnImages, blank, noise, own_images
from guardlens.data.presentations.wrappers import Chat, Framed, WithoutImages, chat, framed

__all__ = [
    "Blank",
    "Chat",
    "Framed",
    "Noise",
    "OwnImages",
    "Presentation",
    "Prompt",
    "TextOnly",
    "WithoutImages",
    "blank",
    "chat",
    "framed",
    "noise",
    "own_images",
    "text_only",
]
