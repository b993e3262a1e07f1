"""Memory of batches, used again and again: fresh memory costs a page fault for every 4 KB that is written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.data.memory import aligned
from vqscale.data.source import Fields, Spec

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""Makes an array of a shape and dtype, such as one in pinned memory."""


class BatchBuffers:
    """Hands out arrays for batches; an array is used again when nobody holds it any more.

    Nobody has to give anything back, and nobody's batch changes under his hands: an array that is referred to, also
    through a view or a tensor over the same memory, is left alone and another one is made.

    Args:
        spec: fields of a sample.
        samples: samples of a batch.
        allocate: makes the arrays.
    """

    def __init__(self, spec: Mapping[str, Spec], samples: int, allocate: Allocate = aligned) -> None:
        self._shapes = {name: ((samples, *field.shape), field.dtype) for name, field in spec.items()}
        self._allocate = allocate
        self._made: dict[str, list[NDArray[Any]]] = {name: [] for name in spec}
        self._unheld = _references([np.empty(0)])

    def take(self) -> Fields:
        """Arrays for one batch, with any content."""
        return {name: self._take(name) for name in self._shapes}

    def _take(self, name: str) -> NDArray[Any]:
        made = self._made[name]
        for place in range(len(made)):
            if _references(made, place) <= self._unheld:
                return made[place]
        shape, dtype = self._shapes[name]
        made.append(self._allocate(shape, dtype))
        return made[-1]


def _references(arrays: list[NDArray[Any]], place: int = 0) -> int:
    """References to an array of a list; counted here alone, so that every count includes the same ones."""
    return sys.getrefcount(arrays[place])
