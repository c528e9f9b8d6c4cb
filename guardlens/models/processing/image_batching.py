"""Preprocess an image that all prompts of a batch share only once, if the processor's own results show that this changes nothing."""

import copy
from collections import UserDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

_CAN_REPEAT: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Image processor -> whether its processor makes the same of two equal images as of the features of one, repeated."""


class RowsWrittenOut(UserDict[str, Tensor]):
    """Input tensors, of which those that repeat one row (views with a stride of 0) are written out when they are first read.

    So a batch beside one blank image holds one image, until the vision encoder asks for all. Prompts that continue from a KV cache never
    do. Models see no views: some families call `view()`, which needs contiguous memory.
    """

    def __getitem__(self, name: str) -> Tensor:
        if repeats_one_row(value := self.data[name]):
            self.data[name] = value.contiguous()
        return self.data[name]


def repeats_one_row(value: Tensor) -> bool:
    """Whether all rows of a tensor lie in the same memory."""
    return value.ndim > 0 and len(value) > 1 and value.stride(0) == 0


def moved(value: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor on a device and in a precision. One that repeats a row is still a view."""
    return value[:1].to(device, dtype).expand_as(value) if repeats_one_row(value) else value.to(device, dtype)


def processed(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]], **options: Any) -> Mapping[str, Any]:
    """Call a processor, and preprocess an image which all prompts share once.

    The tensors are those that the processor itself makes. Pixels may be a view of one row. The first time, the result for two prompts is
    compared with that of the processor itself; if they differ, all images are preprocessed. The user's processor is not changed.

    Args:
        processor: A VLM's processor.
        texts: The prompts as text.
        images: The images of each prompt.
        options: More arguments of the processor.
    """
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None or len(images) < 3 or not _share_one_image(images):
        return processor(text=texts, images=images, **options)
    if image_processor not in _CAN_REPEAT:
        _CAN_REPEAT[image_processor] = _makes_the_same(processor, texts[:2], images[:2], options)
    able = _repeating(processor, len(images)) if _CAN_REPEAT[image_processor] else processor
    return able(text=texts, images=images, **options)


def _makes_the_same(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]], options: Mapping[str, Any]) -> bool:
    """Whether a processor that repeats the features of one image gives what the processor itself gives."""
    expected = processor(text=texts, images=images, **options)
    try:
        found = _repeating(processor, len(images))(text=texts, images=images, **options)
    except RuntimeError:  # it writes to the pixels, or calls view() on them
        return False
    return _equal(found, expected)


def _repeating(processor: Any, count: int) -> Any:
    """A shallow copy of a processor, which preprocesses the first of `count` images and repeats its features."""
    repeating = copy.copy(processor.image_processor)
    repeating.preprocess = partial(_preprocess_once, processor.image_processor, count)
    found = copy.copy(processor)
    found.image_processor = repeating
    return found


def _preprocess_once(image_processor: Any, count: int, images: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(images, list) or len(images) != count:
        return image_processor.preprocess(images, *args, **kwargs)
    return _repeated(image_processor.preprocess(images[:1], *args, **kwargs), count)


def _share_one_image(images: Sequence[Sequence[Any]]) -> bool:
    first = images[0][0] if images[0] else None
    return first is not None and all(len(each) == 1 and (each[0] is first or each[0] == first) for each in images)


def _repeated(value: Any, times: int) -> Any:
    """The features of `times` equal images in a row, made from the features of one."""
    if isinstance(value, Tensor) and value.ndim:
        is_one_row = len(value) == 1 and value.is_floating_point()
        return value.expand(times, *value.shape[1:]) if is_one_row else torch.cat([value] * times)
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
