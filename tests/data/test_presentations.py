import numpy as np
import pytest
from PIL import Image

from guardlens import Query, errors, presentations
from guardlens.data.presentations import Presentation, Prompt, blank, chat, framed, noise, own_images, text_only
from guardlens.data.presentations.protocol import require_presentation

Q = Query("how ?", id="a")
RED = Image.new("RGBA", (3, 2), (255, 0, 0, 128))


def pixels(presentation, query=Q):
    return np.asarray(presentation(query).images[0])


def test_names():
    named = {
        "text": text_only,
        "blank #3060c0": blank("#3060c0"),
        "noise": noise(),
        "own": own_images,
        "blank grey | tip": framed(blank(), label="tip"),
    }
    assert {presentation.name: presentation for presentation in named.values()} == named
    assert all(isinstance(presentation, Presentation) for presentation in named.values())


def test_blank_is_flat():
    image = pixels(blank("#3060c0", 5))
    assert image.shape == (5, 5, 3) and (image == (0x30, 0x60, 0xC0)).all() and blank()(Q).text == "how ?"
    assert (pixels(blank("grey", 2)) == 128).all()


def test_bad_colour():
    with pytest.raises(errors.PresentationError, match=r"Found the colour 'greyy'\.\nExpected an opaque colour[\s\S]*Next: try 'grey'"):
        blank("greyy")


def test_noise_is_of_the_seed_and_the_query():
    first = pixels(noise(0, 64))
    assert np.array_equal(first, pixels(noise(0, 64)))
    assert not np.array_equal(first, pixels(noise(1, 64))) and not np.array_equal(first, pixels(noise(0, 64), Query("how ?", id="b")))
    assert abs(first.mean() - 127.5) < 2 and abs(first.std() - 256 / 12**0.5) < 2


def test_own_images_from_memory_and_disk(tmp_path):
    RED.save(tmp_path / "red.png")
    images = own_images(Query("x", images=(RED, str(tmp_path / "red.png"), tmp_path / "red.png"))).images
    assert [image.mode for image in images] == ["RGB"] * 3 and all(np.array_equal(image, images[0]) for image in images)
    assert np.asarray(images[0])[0, 0].tolist() == [255, 127, 127]  # half transparent red, on white


def test_missing_images(tmp_path):
    with pytest.raises(errors.PresentationError, match=r"query 'a' without an own image[\s\S]*Next: add it, or show a blank image"):
        own_images(Q)
    (tmp_path / "text.png").write_text("no")
    for name in ("none.png", "text.png"):
        with pytest.raises(errors.PresentationError, match=rf"the image .*{name} of query 'a'[\s\S]*Next: check its path"):
            own_images(Query("x", id="a", images=(tmp_path / name,)))


def test_framed_keeps_images_and_nests():
    outer = framed(framed(blank("white", 2), "a ", " b"), "[", "]")
    assert outer(Q).text == "[a how ? b]" and len(outer(Q).images) == 1 and framed(text_only, "a ")(Q).images == ()


class TestChatWithinChat:
    """Words that are asked for are shown, whichever of the two says them."""

    @pytest.mark.parametrize("between", [lambda inner: inner, lambda inner: framed(inner, "[", "]")], ids=["beside", "frame between"])
    def test_each_adds_its_own(self, between):
        inner = chat(blank("white", 2), system="be short .", template_kwargs={"thinking": False, "date": None})
        prompt = chat(between(inner), prefill=" sure", template_kwargs={"thinking": False, "lang": "en"})(Q)
        assert (prompt.system, prompt.prefill) == ("be short .", " sure") and len(prompt.images) == 1
        assert prompt.template_kwargs == '{"date": null, "lang": "en", "thinking": false}'

    def test_one_of_ones_own_keeps_what_it_says(self):
        class Mine:
            name = "mine"

            def __call__(self, query):
                return Prompt(query.text, system="be kind .", template_kwargs='{"a": 1}')

        assert chat(Mine(), prefill="so")(Q) == Prompt(Q.text, (), "be kind .", "so", '{"a": 1}')

    @pytest.mark.parametrize(
        ("inner", "outer"),
        [
            ({"system": "a"}, {"system": "b"}),
            ({"prefill": "a"}, {"prefill": "b"}),
            ({"template_kwargs": {"system": True}}, {"template_kwargs": {"system": 1}}),
        ],
    )
    def test_two_of_one_kind_are_refused(self, inner, outer):
        with pytest.raises(errors.PresentationError, match=r"(system|prefill)=.* around 'text \| chat', which says"):
            chat(chat(text_only, **inner), **outer)(Q)


def test_equal_presentations_are_one_key():
    assert (
        len(
            {
                blank("white"),
                blank("white"),
                blank("white", 8),
                noise(0),
                noise(0),
                noise(1),
                own_images,
                text_only,
                framed(own_images),
                framed(own_images),
            }
        )
        == 7
    )


@pytest.mark.parametrize(
    "wrong",
    [presentations.blank, presentations.OwnImages, "grey", None, Image.new("RGB", (4, 4))],
    ids=["factory", "class", "name", "none", "image"],
)
def test_what_is_no_presentation(wrong):
    with pytest.raises(
        errors.PresentationError, match=r"as a presentation\.\nExpected text_only, presentations\.own_images, or the result"
    ):
        require_presentation(wrong)
    require_presentation(presentations.own_images)
    require_presentation(presentations.blank())
