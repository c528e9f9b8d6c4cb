"""Preprocess an image that all prompts of a batch share only once, if the processor's own results show that this changes nothing."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

_CAN_REPEAT: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Image processor -> whether its result for two equal images is twice its result for one."""


def preprocessing_once(processor: Any, images: Sequence[Sequence[Any]]) -> Any:
    """Return a processor that preprocesses the image which all prompts share once and repeats the result.

    The returned processor is a shallow copy: neither the user's processor nor its image processor is changed. If the prompts do not share a
    single image, the processor itself is returned. The first time, the result for two images is compared with twice the result for one; if
    they differ, all images are preprocessed.

    Args:
        processor: A VLM's processor.
        images: The images of each prompt.
    """
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None or len(images) < 3 or not _share_one_image(images):
        return processor
    repeating = copy.copy(image_processor)
    repeating.preprocess = partial(_preprocess_once, image_processor, len(images))
    found = copy.copy(processor)
    found.image_processor = repeating
    return found


def _preprocess_once(image_processor: Any, count: int, images: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(images, list) or len(images) != count:
        return image_processor.preprocess(images, *args, **kwargs)
    one = image_processor.preprocess(images[:1], *args, **kwargs)
    if image_processor not in _CAN_REPEAT:
        two = image_processor.preprocess(images[:2], *args, **kwargs)
        _CAN_REPEAT[image_processor] = _equal(two, _repeated(one, 2))
    if _CAN_REPEAT[image_processor]:
        return _repeated(one, count)
    return image_processor.preprocess(images, *args, **kwargs)


def _share_one_image(images: Sequence[Sequence[Any]]) -> bool:
    first = images[0][0] if images[0] else None
    return first is not None and all(len(each) == 1 and (each[0] is first or each[0] == first) for each in images)


def _repeated(value: Any, times: int) -> Any:
    """The features of `times` equal images in a row, made from the features of one."""
    if isinstance(value, Tensor) and value.ndim:
        return torch.cat([value] * times)  # not expanded: some families call view(), which needs contiguous memory
    if isinstance(value, np.ndarray) and value.ndim:
        return np.concatenate([value] * times)
    if isinstance(value, list | tuple):
        return value * times
    if isinstance(value, Mapping):
        kind: Any = type(value)
        return kind({name: _repeated(part, times) for name, part in value.items()})
    return value


def _equal(mine: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor | np.ndarray):
        return type(mine) is type(expected) and np.array_equal(np.asarray(mine), np.asarray(expected))
    if isinstance(expected, list | tuple):
        return len(mine) == len(expected) and all(map(_equal, mine, expected))
    if isinstance(expected, Mapping):
        return mine.keys() == expected.keys() and all(_equal(mine[name], expected[name]) for name in expected)
    return mine == expected
