"""Pictures beside a query: what is taken for one, and how it is read, so that a model sees what a viewer shows."""

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens.errors import PresentationError, warn

if TYPE_CHECKING:
    from PIL import Image


def as_images(images: Any, whose: str) -> tuple[Any, ...]:
    """Pictures and paths as a tuple: of none, of one, or of a list or tuple of them. Arrays `height width 3` of bytes become pictures.

    Args:
        images: What a user gave.
        whose: The query, for errors.

    Raises:
        PresentationError: Something else, a URL, an empty path or one that no file can have, or a picture without a pixel.
    """
    several = images if isinstance(images, list | tuple) else (images,)
    return tuple(_image(image, whose) for image in several)


def _image(image: Any, whose: str) -> Any:
    from PIL import Image

    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise _no_picture(f"an image of {image.size[0]} x {image.size[1]} pixels", whose)
        return image
    path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
    if not isinstance(path, str):
        raise _no_picture(f"something of type {type(image).__name__} as an image", whose)
    if "://" in path or path.startswith("data:"):
        raise _no_picture(f"the address {path[:80]!r} as an image", whose, "download it, and give the path of the file")
    if not path.strip() or any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in path):
        raise _no_picture(f"the path {path!r} of an image", whose, "give the path of a file")
    return image if isinstance(image, Path) else path


def opened(image: Any, whose: str) -> "Image.Image":
    """A picture in RGB, as viewers and transformers' `load_image` show it: turned as its EXIF data say, transparency on white, 16 bits
    scaled to 8.

    Args:
        image: A PIL image, or a path.
        whose: The query, for errors.

    Raises:
        PresentationError: Pillow can't read it, or it holds numbers whose black and white nobody knows.
    """
    from PIL import Image

    try:
        if isinstance(image, Image.Image):
            return _in_rgb(image, whose)
        with Image.open(image) as file:
            return _in_rgb(file, whose)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        named = f"{type(image).__name__} in memory" if isinstance(image, Image.Image) else str(image)
        raise PresentationError(f"the image {named} of {whose} ({error})", "one that Pillow opens", "check its path and its file") from None


def _in_rgb(image: "Image.Image", whose: str) -> "Image.Image":
    from PIL import ExifTags, Image, ImageOps

    image.load()
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo of many phones, which viewers show as one picture
        warn(f"an image of {whose} has {image.n_frames} frames, of which one is shown")  # type: ignore[attr-defined]
    if image.mode in ("I", "F"):
        raise _no_picture(f"an image of mode {image.mode!r}, whose black and white are not known", whose, "scale it to 0..255 as uint8")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        return page.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _no_picture(found: str, whose: str, next_step: str = "open it: PIL.Image.open(...), or Image.fromarray(pixels)") -> PresentationError:
    return PresentationError(f"{found} of {whose}", "a PIL image, a path, or an array `height width 3` of uint8", next_step)
