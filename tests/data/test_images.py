"""Pictures reach a model as a viewer shows them, whatever their mode; Pillow and transformers' `load_image` are the reference."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers.image_utils import load_image

from guardlens import Query, errors, presentations
from guardlens.data.images import opened
from guardlens.data.presentations import Prompt

RAMP = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(32, 32)


def shown(*images):
    return [np.asarray(image) for image in presentations.own_images(Query("x y", id="q", images=images)).images]


def saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_exif_says(tmp_path, orientation):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = saved(tmp_path, picture, "e.png", exif=exif)
    expected = np.asarray(load_image(str(path)))
    assert all(np.array_equal(found, expected) for found in shown(path, str(path), Image.open(path)))
    assert expected.shape[:2] == ((20, 40) if orientation < 5 else (40, 20))


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bits_are_scaled(tmp_path, mode):
    deep = Image.frombytes(mode, (32, 32), RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    for found in shown(deep, saved(tmp_path, deep, "g.png"), saved(tmp_path, deep, "g.tiff")):
        assert np.array_equal(found, np.repeat(np.rint(RAMP / 257).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_black_and_white_are_refused(tmp_path, mode):
    values = np.random.default_rng(0).random((8, 8)).astype(np.float32) if mode == "F" else np.arange(64, dtype=np.int32).reshape(8, 8)
    for image in (Image.fromarray(values), saved(tmp_path, Image.fromarray(values), "n.tiff")):
        with pytest.raises(errors.PresentationError, match=rf"mode '{mode}', whose black and white are not known of query 'q'"):
            shown(image)


def _page(mode):
    page = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    ImageDraw.Draw(page).rectangle((2, 2, 20, 9), fill=(0, 0, 0, 255))
    return page.convert(mode)


def _palette(colour):
    image = Image.new("P", (8, 8))
    image.putpalette([*colour, *[0] * 765])
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_on_white(tmp_path, mode):
    page = _page(mode)
    images = [page] if mode == "PA" else [page, saved(tmp_path, page, "t.png")]
    for found in shown(*images):
        assert {0, 255} <= set(found.ravel().tolist()) and found[0, 0].tolist() == [255] * 3
        alpha = np.asarray(page.convert("RGBA"))[..., 3]
        assert np.array_equal(found, np.repeat((255 - alpha)[..., None], 3, axis=2))


def test_a_transparent_colour_is_white(tmp_path):
    for mode, clear in (("P", 0), ("L", 0), ("RGB", (0, 0, 0))):
        path = saved(tmp_path, Image.new("RGB", (4, 4)).convert(mode), f"{mode}.png", transparency=clear)
        (found,) = shown(path)
        assert (found == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"])
def test_other_modes_as_pillow_has_them(mode):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture = picture.convert(mode) if mode != "LAB" else Image.frombytes("LAB", (8, 8), picture.tobytes())
    assert np.array_equal(shown(picture)[0], np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_one_frame_of_several_is_said(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    path = saved(tmp_path, frames[0], f"a.{ending}", save_all=True, append_images=frames[1:], duration=100)
    with pytest.warns(UserWarning, match="of query 'q' has 2 frames, of which one is shown"):
        (found,) = shown(path)
    assert found[0, 0, 0] > 200 and found[0, 0, 1] < 50


class TestUnreadable:
    def test_a_bomb(self, tmp_path, monkeypatch):
        path = saved(tmp_path, Image.new("1", (40, 40)), "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(errors.PresentationError, match=r"bomb.png of query 'q' \(Image size \(1600 pixels\) exceeds limit"):
            shown(path)

    def test_a_closed_picture(self, tmp_path):
        path = saved(tmp_path, Image.new("RGB", (4, 4)), "c.png")
        lazy, loaded = Image.open(path), Image.new("RGB", (4, 4))
        lazy.close()
        loaded.close()
        for image in (lazy, loaded):
            with pytest.raises(errors.PresentationError, match="in memory of query 'q'"):
                shown(image)

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
    def test_a_broken_file(self, tmp_path, ending):
        """Cut off at any place, or with bytes that are others: a picture or an error of ours."""
        whole = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(whole, format={"jpg": "jpeg"}.get(ending, ending))
        content, draw = whole.getvalue(), np.random.default_rng(2)
        for number in range(40):
            broken = bytearray(content[: draw.integers(1, len(content))] if number % 2 else content)
            broken[draw.integers(len(broken))] ^= int(draw.integers(1, 256))
            path = tmp_path / f"{number}.{ending}"
            path.write_bytes(broken)
            try:
                assert shown(path)[0].ndim == 3
            except errors.PresentationError as error:
                assert len(str(error)) < 600


@dataclass(frozen=True)
class _Mine:
    """A presentation of the user's own."""

    images: object
    name: str = "mine"

    def __call__(self, query):
        return Prompt(query.text, self.images)


def test_palettes_are_told_apart(vlm, unchecked):
    """Prompts beside equal indices and unlike palettes shared the first one's states."""
    red, blue = (_palette(colour) for colour in ((255, 0, 0), (0, 0, 255)))
    batches = [vlm.batch("how to mend the hat ?", _Mine((image,))) for image in (red, blue, red.convert("RGB"))]
    assert batches[0].image_digests == batches[2].image_digests != batches[1].image_digests
    assert (batches[0].inputs["pixel_values"] == batches[2].inputs["pixel_values"]).all()
    assert (batches[0].inputs["pixel_values"] != batches[1].inputs["pixel_values"]).any()


def test_presentations_of_ones_own_show_the_same(vlm, tmp_path, unchecked):
    path = saved(tmp_path, _page("RGBA"), "t.png")
    expected = vlm.batch(gl_query := Query("how to mend the hat ?", images=path), presentations.own_images)
    for images in ([path], (str(path),), path, _page("RGBA"), np.asarray(opened(path, "it"))):
        found = vlm.batch(gl_query, _Mine(images))
        assert found.image_digests == expected.image_digests and (found.inputs["pixel_values"] == expected.inputs["pixel_values"]).all()
    with pytest.raises(errors.PresentationError, match="something of type bytes as an image of query"):
        vlm.batch(gl_query, _Mine(b"GIF"))
