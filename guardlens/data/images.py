"""The images of queries: which types are accepted, and how they are opened, so that a model receives what an image viewer shows."""

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens.errors import PresentationError, warn

if TYPE_CHECKING:
    from PIL import Image


def as_images(images: Any, whose: str) -> tuple[Any, ...]:
    """Return one image, or a list or tuple of images, as a tuple of PIL images and paths. Uint8 arrays `height width 3` become PIL images.

    Args:
        images: The image or images.
        whose: The owner of the images in error messages, such as "query 'q7'".

    Raises:
        PresentationError: An image is of another type, has no pixels, is a URL, or is a path that no file can have.
    """
    several = images if isinstance(images, list | tuple) else (images,)
    return tuple(_image(image, whose) for image in several)


def _image(image: Any, whose: str) -> Any:
    from PIL import Image

    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise _not_an_image(f"an image of {image.size[0]} x {image.size[1]} pixels", whose)
        return image
    path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
    if not isinstance(path, str):
        raise _not_an_image(f"something of type {type(image).__name__} as an image", whose)
    if "://" in path or path.startswith("data:"):
        raise _not_an_image(f"the address {path[:80]!r} as an image", whose, "download it, and give the path of the file")
    if not path.strip() or any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in path):
        raise _not_an_image(f"the path {path!r} of an image", whose, "give the path of a file")
    return image if isinstance(image, Path) else path


def opened(image: Any, whose: str) -> "Image.Image":
    """Open an image in RGB, as image viewers and `load_image` of transformers do.

    The image is rotated as its EXIF data say, transparent parts become white, and 16 bits are scaled to 8.

    Args:
        image: A PIL image or a path.
        whose: The owner of the image in error messages, such as "query 'q7'".

    Warns:
        UserWarning: The image has several frames, of which one is shown.

    Raises:
        PresentationError: Pillow cannot read the image, or its mode does not say which values are black and white.
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
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo of many phones, which viewers show as one image
        warn(f"an image of {whose} has {image.n_frames} frames, of which one is shown")  # type: ignore[attr-defined]
    if image.mode in ("I", "F"):
        raise _not_an_image(f"an image of mode {image.mode!r}, whose black and white are not known", whose, "scale it to 0..255 as uint8")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        return page.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _not_an_image(found: str, whose: str, next_step: str = "open it: PIL.Image.open(...), or Image.fromarray(pixels)") -> PresentationError:
    return PresentationError(f"{found} of {whose}", "a PIL image, a path, or an array `height width 3` of uint8", next_step)
