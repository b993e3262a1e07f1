"""How many clocks show the hour that they should."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vqscale.data.clock_reader import UNREADABLE, read_clocks

HOURS = 12


@dataclass
class HourCounts:
    """Counts by true hour: [12] images, right readings, images that show no clock."""

    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(HOURS, np.int64))
    right: NDArray[np.int64] = field(default_factory=lambda: np.zeros(HOURS, np.int64))
    unreadable: NDArray[np.int64] = field(default_factory=lambda: np.zeros(HOURS, np.int64))

    def add(self, images: NDArray[np.uint8], hours: NDArray[np.int64]) -> None:
        """Read images uint8 [n, S, S, 3] whose hours should be `hours` [n]."""
        read = read_clocks(images).hour
        self.images += np.bincount(hours, minlength=HOURS)
        self.right += np.bincount(hours[read == hours], minlength=HOURS)
        self.unreadable += np.bincount(hours[read == UNREADABLE], minlength=HOURS)

    def merge(self, others: Iterable[HourCounts]) -> HourCounts:
        """The sum with other ranks' counts."""
        parts = list(others)
        return HourCounts(
            sum((p.images for p in parts), self.images.copy()),
            sum((p.right for p in parts), self.right.copy()),
            sum((p.unreadable for p in parts), self.unreadable.copy()),
        )

    @property
    def accuracy(self) -> float:
        """Share of all images that show their hour."""
        return float(self.right.sum() / self.images.sum())

    def by_hour(self) -> list[float]:
        """Accuracy of each hour, 0 (twelve o'clock) to 11."""
        return [round(float(r / n), 4) if n else float("nan") for r, n in zip(self.right, self.images, strict=True)]
