"""A picture that all prompts of a batch show is preprocessed once, where the processor's own results say that this changes nothing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

_REPEATS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Of an image processor: whether two equal images give twice what one gives."""


@contextmanager
def preprocessed_once(processor: Any, images: Sequence[Sequence[Any]]) -> Iterator[None]:
    """Inside, the image processor sees one of the prompts' images, if all prompts show one and the same, and its results are repeated.

    The first time, two are compared with twice one; a processor for which these differ is left alone.

    Args:
        processor: A VLM's processor.
        images: Of each prompt.
    """
    eye = getattr(processor, "image_processor", None)
    if eye is None or len(images) < 3 or not _all_alike(images):
        yield
        return
    whole = eye.preprocess

    def once(images_: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(images_, list) or len(images_) != len(images):
            return whole(images_, *args, **kwargs)
        one = whole(images_[:1], *args, **kwargs)
        if eye not in _REPEATS:
            _REPEATS[eye] = _equal(whole(images_[:2], *args, **kwargs), _repeated(one, 2))
        return _repeated(one, len(images)) if _REPEATS[eye] else whole(images_, *args, **kwargs)

    eye.preprocess = lambda images, *args, **kwargs: once(images, *args, **kwargs)
    try:
        yield
    finally:
        del eye.preprocess


def _all_alike(images: Sequence[Sequence[Any]]) -> bool:
    first = images[0][0] if images[0] else None
    return first is not None and all(len(each) == 1 and (each[0] is first or each[0] == first) for each in images)


def _repeated(value: Any, times: int) -> Any:
    """Features of so many equal images, one behind the other, from those of one."""
    if isinstance(value, Tensor) and value.ndim:
        return torch.cat([value] * times)  # not expanded: some families can't view what is
    if isinstance(value, np.ndarray) and value.ndim:
        return np.concatenate([value] * times)
    if isinstance(value, list | tuple):
        return value * times
    kind: Any = type(value)
    return kind({name: _repeated(part, times) for name, part in value.items()}) if isinstance(value, Mapping) else value


def _equal(mine: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor | np.ndarray):
        return type(mine) is type(expected) and np.array_equal(np.asarray(mine), np.asarray(expected))
    if isinstance(expected, list | tuple):
        return len(mine) == len(expected) and all(map(_equal, mine, expected))
    if isinstance(expected, Mapping):
        return mine.keys() == expected.keys() and all(_equal(mine[name], expected[name]) for name in expected)
    return mine == expected
