"""How sharp images are beside the originals: the blur of Gaussian VAEs as figures.

A decoder of means blurs what its latents leave open, which takes power at high frequencies and contrast between
neighbours. Noise adds both, so sharp is near 1, not high.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.evaluation.measures import Shown, Together
from vqscale.evaluation.metrics import Doubles

FIRST = 2_048
"""Images of each set that are taken, by their number: means settle long before a large set has passed."""

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


class MeanSharpness:
    """Means over images of all ranks: the gradient energy, and the power in the upper half of the radial spectrum."""

    def __init__(self) -> None:
        self._sums = np.zeros(3)  # of both, and how many images

    def add(self, images: NDArray[np.uint8]) -> None:
        """Take in images uint8 [n, S, S, 3]."""
        high = radial_spectrum(images)[:, images.shape[1] // 4 :].mean(axis=1)
        self._sums += gradient_energy(images).sum(), high.sum(), len(images)

    def figures(self, ranks: Together) -> dict[str, float]:
        """By name; nothing without images. Collective."""
        *sums, count = np.sum(ranks.gather(self._sums), axis=0).tolist()
        names = ("gradient_energy", "high_frequencies")
        return {name: total / count for name, total in zip(names, sums, strict=True)} if count else {}


class Sharpness:
    """How sharp held-out images are, and their reconstructions beside them."""

    def __init__(self) -> None:
        self._images, self._rebuilt = MeanSharpness(), MeanSharpness()
        self._seen = 0

    def add(self, shown: Shown) -> None:
        """Take in some images, as long as they are among the first `FIRST`."""
        first = shown.numbers < FIRST
        if first.any():
            self._images.add(shown.images[first])
            self._rebuilt.add(shown.pixels[first])
            self._seen += int(first.sum())

    def figures(self, ranks: Together) -> dict[str, Any]:
        """Of the images, and of the reconstructions as a share of these; collective."""
        images = self._images.figures(ranks)
        found: dict[str, Any] = {"sharpness_images": sum(ranks.gather(self._seen))}
        found |= {f"sharpness_{name}_images": value for name, value in images.items()}
        return found | shares("reconstructions", self._rebuilt.figures(ranks), found)


def shares(what: str, means: Mapping[str, float], figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures of `MeanSharpness` as a share of those of the held-out images, which `Sharpness` has found.

    Means over the images come first, so the two sets need not have the same images, nor as many. Of plain images, which
    have nothing, there are no shares.
    """
    originals = {name: figures[f"sharpness_{name}_images"] for name in means}
    return {f"sharpness_{name}_{what}": own / originals[name] for name, own in means.items() if originals[name]}
