"""Image metrics, one value an image; images in [0, 1], so the peak is 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def mse(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> Doubles:
    """Mean squared error [n] of images uint8 [n, H, W, C], on the scale of [0, 1]."""
    difference = (images.astype(np.float64) - others) / 255
    return np.square(difference).reshape(len(images), -1).mean(axis=1)


def psnr(error: Doubles) -> Doubles:
    """Peak signal-to-noise ratio in decibels of mean squared errors; equal images count as 100 dB."""
    return -10 * np.log10(np.maximum(error, 1e-10))
