"""Preprocessing a common image once gives the batch that preprocessing it for every prompt gives, in every family."""

import pytest
import torch
from PIL import Image

from guardlens import presentations
from guardlens.data.queries import Query
from guardlens.models.processing import image_batching
from tests.models.architectures.test_families import BY_NAME, loaded
from tests.zoo.family import TEXTS

FAMILIES = [name for name, family in BY_NAME.items() if family.vision]


def counted(monkeypatch, model):
    """How many images each call of the image processor gets."""
    seen, image_processor = [], model.processor.image_processor
    real = type(image_processor).preprocess

    def preprocess(self, images, *args, **kwargs):
        seen.append(len(images))
        return real(self, images, *args, **kwargs)

    monkeypatch.setattr(type(image_processor), "preprocess", preprocess)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_are_the_same(name, monkeypatch):
    family, model = BY_NAME[name], loaded(name)
    shown = presentations.blank("#3060c0", family.images[0][0])
    again = model.batch([*TEXTS, *TEXTS], shown)
    image_batching._CAN_REPEAT.clear()
    first = model.batch([*TEXTS, *TEXTS], shown)
    monkeypatch.setattr(image_batching, "_share_one_image", lambda images: False)
    whole = model.batch([*TEXTS, *TEXTS], shown)
    for batch in (first, again):
        assert batch.inputs.keys() == whole.inputs.keys() and batch.image_digests == whole.image_digests
        for key, value in whole.inputs.items():
            assert torch.equal(batch.inputs[key], value) and batch.inputs[key].is_contiguous(), key


def test_one_image_is_enough(vlm, monkeypatch):
    image_batching._CAN_REPEAT.clear()
    seen = counted(monkeypatch, vlm)
    vlm.batch([*TEXTS, *TEXTS], presentations.blank("grey", 32))
    assert seen == [2, 1, 1]
    vlm.batch([*TEXTS, *TEXTS], presentations.blank("white", 32))
    assert seen == [2, 1, 1, 1]


def test_different_images_are_all_seen(vlm, monkeypatch):
    seen = counted(monkeypatch, vlm)
    own = [Query(text, images=(Image.new("RGB", (32, 32), (row, 0, 0)),)) for row, text in enumerate(TEXTS)]
    found = vlm.batch(own, presentations.own_images)
    assert seen == [len(TEXTS)] and len(set(found.image_digests)) == len(TEXTS)
    equal = [Query(text, images=(Image.new("RGB", (32, 32), "red"),)) for text in TEXTS]
    assert len(set(vlm.batch(equal, presentations.own_images).image_digests)) == 1 and seen[-1] == 1


def test_a_processor_that_joins_its_images_is_left_alone(vlm, monkeypatch):
    """One whose result for two is not twice that for one: here, it centres each image on the mean of all."""
    image_batching._CAN_REPEAT.clear()
    real = type(vlm.processor.image_processor).preprocess

    def joining(self, images, *args, **kwargs):
        found = real(self, images, *args, **kwargs)
        found["pixel_values"] = found["pixel_values"] / len(images)
        return found

    monkeypatch.setattr(type(vlm.processor.image_processor), "preprocess", joining)
    shown = presentations.blank("white", 32)
    found = vlm.batch([*TEXTS, *TEXTS], shown).inputs["pixel_values"]
    monkeypatch.setattr(image_batching, "_share_one_image", lambda images: False)
    assert torch.equal(found, vlm.batch([*TEXTS, *TEXTS], shown).inputs["pixel_values"])
    image_batching._CAN_REPEAT.clear()


def times_two(pixels):
    pixels.mul_(2)


def times_two_row_by_row(pixels):
    """Nothing is raised, but a row that all share is doubled as often as there are rows."""
    for row in pixels:
        row.mul_(2)


def seen_flat(pixels):
    pixels.view(-1)


@pytest.mark.parametrize("change", [times_two, times_two_row_by_row, seen_flat])
def test_a_processor_that_does_not_take_views_is_left_alone(vlm, monkeypatch, change):
    image_batching._CAN_REPEAT.clear()
    real = type(vlm.processor).__call__

    def changing(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        change(found["pixel_values"])
        return found

    monkeypatch.setattr(type(vlm.processor), "__call__", changing)
    shown = presentations.blank("white", 32)
    found = vlm.batch([*TEXTS, *TEXTS], shown).inputs["pixel_values"]
    assert image_batching._CAN_REPEAT[vlm.processor.image_processor] is False
    monkeypatch.setattr(image_batching, "_share_one_image", lambda images: False)
    assert torch.equal(found, vlm.batch([*TEXTS, *TEXTS], shown).inputs["pixel_values"])
    image_batching._CAN_REPEAT.clear()


def test_an_image_that_was_changed_is_seen_anew(vlm):
    """Even if it is the same object: nothing is remembered from batch to batch."""
    image = Image.new("RGB", (32, 32), "red")
    queries = [Query(text, images=(image,)) for text in TEXTS]
    red = vlm.batch(queries, presentations.own_images)
    image.paste("blue", (0, 0, 32, 16))
    blue = vlm.batch(queries, presentations.own_images)
    assert red.image_digests != blue.image_digests
    for batch, whole in ((blue, image), (red, Image.new("RGB", (32, 32), "red"))):
        expected = vlm.processor.image_processor([whole] * len(TEXTS), return_tensors="pt")["pixel_values"]
        assert torch.equal(batch.inputs["pixel_values"], expected)


def test_rows_are_written_out_when_they_are_read():
    row = torch.rand(1, 3, 4)
    kept = image_batching.moved(row.expand(5, 3, 4), torch.device("cpu"), torch.bfloat16)
    assert kept.untyped_storage().nbytes() == 2 * 12
    inputs = image_batching.RowsWrittenOut({"pixels": kept, "ids": torch.arange(6)})
    assert list(inputs) == ["pixels", "ids"]
    more = inputs | {"ids": torch.arange(7)}
    assert all(image_batching.repeats_one_row(each.data["pixels"]) for each in (inputs, more))
    assert dict(more)["pixels"].is_contiguous()
    read = inputs["pixels"]
    assert read.is_contiguous() and torch.equal(read, torch.cat([row] * 5).bfloat16())
    read[0] += 1
    assert torch.equal(read[1:], torch.cat([row] * 4).bfloat16()) and torch.equal(kept[0], row[0].bfloat16())


@pytest.mark.parametrize("rows", [torch.rand(3, 4), torch.rand(1, 4).expand(1, 4), torch.tensor(1.0), torch.rand(4, 1).expand(4, 3)])
def test_only_views_of_one_row_repeat_it(rows):
    assert not image_batching.repeats_one_row(rows)


def test_the_users_processor_is_not_changed(vlm):
    before = dict(vars(vlm.processor)), dict(vars(vlm.processor.image_processor))
    found = image_batching._repeating(vlm.processor, 3)
    assert found is not vlm.processor and type(found) is type(vlm.processor)
    assert (dict(vars(vlm.processor)), dict(vars(vlm.processor.image_processor))) == before
