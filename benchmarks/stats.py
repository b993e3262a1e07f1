"""Medians, percentiles, and ratios with the interval in which they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.result import Figure

RESAMPLES = 10_000
"""Draws of the bootstrap."""


def figure(values: Sequence[float], unit: str) -> Figure:
    """Median, tenth and ninetieth percentile of the rounds' values."""
    low, middle, high = np.percentile(values, [10, 50, 90]).tolist()
    return Figure(median=middle, p10=low, p90=high, n=len(values), unit=unit)


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median over the rounds of the ratio within a round, and its 95 % interval.

    Dividing within a round takes out what slows both sides down alike. The interval is the percentile bootstrap over
    the rounds with a fixed seed (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).

    Args:
        over: a value a round.
        under: another one of the same rounds, in the same order.
    """
    ratios = np.divide(over, under)
    if len(ratios) != len(over) or len(ratios) != len(under):
        raise ValueError(f"{len(over)} and {len(under)} values are not of the same rounds")
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5]).tolist()
    return float(np.median(ratios)), (low, high)
