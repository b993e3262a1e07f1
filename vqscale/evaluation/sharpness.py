"""How sharp images are beside the originals: the blur of Gaussian VAEs as figures.

A decoder of means blurs what its latents leave open, which takes power at high frequencies and contrast between
neighbours. Noise adds both, so sharp is near 1, not high.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vqscale.evaluation.metrics import Doubles

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def luminance(images: NDArray[np.uint8]) -> Doubles:
    """[n, H, W] in [0, 1] of images uint8 [n, H, W, 3]."""
    return np.asarray(images @ _LUMA / 255)


def gradient_energy(images: NDArray[np.uint8]) -> Doubles:
    """Mean squared difference [n] of luminance between neighbours, down plus along, of images uint8 [n, H, W, 3]."""
    grey = luminance(images)
    down, along = (np.square(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2))
    return np.asarray(down + along)


def radial_spectrum(images: NDArray[np.uint8]) -> Doubles:
    """Mean power of the luminance by frequency, [n, S // 2], of square images uint8 [n, S, S, 3].

    Entry k is the mean over the frequencies between k + 1/2 and k + 3/2 cycles an image; the mean luminance is left
    out, and the corners of the spectrum beyond S / 2 cycles too. A Hann window keeps the jump between opposite borders
    from filling high frequencies. For white noise of variance v all entries are v.

    Raises:
        ValueError: the images are not square.
    """
    side = images.shape[1]
    if images.shape[2] != side:
        raise ValueError(f"images of {side} × {images.shape[2]} pixels are not square")
    grey = luminance(images)
    window = np.outer(*[np.hanning(side + 2)[1:-1]] * 2)
    window /= np.sqrt(np.square(window).sum())
    centred = grey - (grey * window).sum((1, 2), keepdims=True) / window.sum()
    power = np.square(np.abs(np.fft.fft2(centred * window)))
    cycles = np.fft.fftfreq(side, 1 / side)
    rings = np.round(np.hypot(cycles[:, None], cycles[None])).astype(int)
    return np.stack([power[:, rings == ring].mean(axis=1) for ring in range(1, side // 2 + 1)], axis=1)


def sharpness_figures(originals: NDArray[np.uint8], others: NDArray[np.uint8]) -> dict[str, float]:
    """Figures of reconstructions or samples, each as a share of that of the originals; both uint8 [n, S, S, 3].

    `gradient_energy` of all; `high_frequencies` is the power in the upper half of the radial spectrum. Means over the
    images come first, so the two sets need not have the same images, nor as many.
    """
    gradients = [gradient_energy(images).mean() for images in (originals, others)]
    high = [radial_spectrum(images)[:, images.shape[1] // 4 :].mean() for images in (originals, others)]
    return {"gradient_energy": _share(gradients), "high_frequencies": _share(high)}


def _share(pair: list[np.floating]) -> float:
    """The second by the first; NaN where the originals have nothing."""
    return float(pair[1] / pair[0]) if pair[0] else float("nan")
