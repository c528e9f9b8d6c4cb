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
            assert torch.equal(batch.inputs[key], value), key


def test_one_image_is_enough(vlm, monkeypatch):
    image_batching._CAN_REPEAT.clear()
    seen = counted(monkeypatch, vlm)
    vlm.batch([*TEXTS, *TEXTS], presentations.blank("grey", 32))
    assert seen == [1, 2]
    vlm.batch([*TEXTS, *TEXTS], presentations.blank("white", 32))
    assert seen == [1, 2, 1]


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


def test_the_users_processor_is_not_changed(vlm):
    before = dict(vars(vlm.processor)), dict(vars(vlm.processor.image_processor))
    found = image_batching.preprocessing_once(vlm.processor, [[Image.new("RGB", (32, 32))]] * 3)
    assert found is not vlm.processor and type(found) is type(vlm.processor)
    assert (dict(vars(vlm.processor)), dict(vars(vlm.processor.image_processor))) == before
