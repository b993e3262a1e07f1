"""Image metrics, one value an image; images in [0, 1], so the peak is 1."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

Doubles = NDArray[np.float64]

SMALLEST_SSIM = 11
"""Pixels of SSIM's window; smaller images have none."""


def mse(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> Doubles:
    """Mean squared error [n] of images uint8 [n, H, W, C], on the scale of [0, 1]."""
    difference = (images.astype(np.float64) - others) / 255
    return np.square(difference).reshape(len(images), -1).mean(axis=1)


def l1(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> Doubles:
    """Mean absolute error [n] of images uint8 [n, H, W, C], on the scale of [0, 1]."""
    difference = (images.astype(np.float64) - others) / 255
    return np.abs(difference).reshape(len(images), -1).mean(axis=1)


def psnr(error: Doubles) -> Doubles:
    """Peak signal-to-noise ratio in decibels of mean squared errors; equal images count as 100 dB."""
    return -10 * np.log10(np.maximum(error, 1e-10))


def ssim(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> Doubles:
    """Structural similarity [n] of images uint8 [n, H, W, C], a mean over pixels and channels (Wang et al. 2004).

    With the paper's Gaussian window of 11 pixels and sigma 1.5, over the pixels where it lies inside the image.

    Raises:
        ValueError: the images are smaller than the window.
    """
    if min(images.shape[1:3]) < SMALLEST_SSIM:
        raise ValueError(f"SSIM needs images of {SMALLEST_SSIM} pixels, these have {images.shape[1:3]}")
    first, second = (torch.from_numpy(part).permute(0, 3, 1, 2).double() / 255 for part in (images, others))
    # The mean that torchmetrics gives counts the border too, where the window lies over mirrored pixels.
    _, everywhere = structural_similarity_index_measure(
        first, second, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    border = SMALLEST_SSIM // 2
    return everywhere[..., border:-border, border:-border].mean(dim=(1, 2, 3)).numpy()
