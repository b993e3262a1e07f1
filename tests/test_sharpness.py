"""Gradient energy and radial spectrum, by images whose figures can be worked out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from vqscale.evaluation.measures import Shown
from vqscale.evaluation.sharpness import FIRST, Sharpness, gradient_energy, radial_spectrum


def grey(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Luminance [n, S, S] in [0, 1] as images."""
    return np.repeat((values * 255).round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def noise(count: int = 64, side: int = 32) -> NDArray[np.floating]:
    return np.random.default_rng(0).normal(0.5, 0.1, (count, side, side))


def test_gradient_energy_of_stripes_is_known() -> None:
    stripes = np.zeros((1, 8, 8))
    stripes[:, :, ::2] = 1.0
    assert gradient_energy(grey(stripes)) == pytest.approx(1)
    assert gradient_energy(grey(np.ones((2, 8, 8)))) == pytest.approx(0)
    ramp = np.arange(8)[None, :, None] * np.ones((1, 8, 8)) * 10 / 255
    assert gradient_energy(grey(ramp)) == pytest.approx((10 / 255) ** 2)


def test_white_noise_has_its_variance_at_every_frequency() -> None:
    spectrum = radial_spectrum(grey(noise(256))).mean(axis=0)
    assert spectrum.shape == (16,)
    assert spectrum[1:] == pytest.approx(np.full(15, 0.01), rel=0.08)


@pytest.mark.parametrize("cycles", [3, 8, 13])
def test_a_wave_stands_at_its_frequency(cycles: int) -> None:
    x = np.arange(32) / 32
    wave = 0.5 + 0.4 * np.sin(2 * np.pi * cycles * (x[None, :, None] + 0 * x[None, None]))
    (spectrum,) = radial_spectrum(grey(wave))
    assert spectrum.argmax() == cycles - 1
    near = spectrum[max(0, cycles - 2) : cycles + 1].sum()
    assert near > 0.97 * spectrum.sum()


class Alone:
    """One rank."""

    device = torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def measured(images: NDArray[np.uint8], rebuilt: NDArray[np.uint8], first: int = 0) -> dict[str, Any]:
    """Both sets, in two parts of which each counts as its images do."""
    measure = Sharpness()
    for part in (slice(0, 5), slice(5, None)):
        numbers = first + np.arange(len(images))[part]
        nothing = np.zeros(len(numbers))
        means = rebuilt[part].astype(np.float32)
        measure.add(Shown(numbers, nothing.astype(np.int64), images[part], {}, {}, nothing, means))
    return measure.figures(Alone())


def test_blur_is_seen_and_the_same_images_are_as_sharp() -> None:
    originals = noise()
    before = measured(grey(originals), grey(originals))
    names = ("sharpness_gradient_energy_reconstructions", "sharpness_high_frequencies_reconstructions")
    assert [before[name] for name in names] == [1.0, 1.0]
    assert before["sharpness_images"] == 64
    assert before["sharpness_gradient_energy_images"] == pytest.approx(4 * 0.01, rel=0.05), "of white noise"
    assert before["sharpness_high_frequencies_images"] == pytest.approx(0.01, rel=0.1)
    for width in (0.5, 1.0, 2.0):
        blurred = measured(grey(originals), grey(gaussian_filter(originals, (0, width, width))))
        assert all(blurred[name] < before[name] for name in names)
        before = blurred
    assert all(before[name] < 0.05 for name in names)


def test_plain_images_have_no_share_and_later_images_do_not_count() -> None:
    plain = grey(np.full((8, 8, 8), 0.5))
    found = measured(plain, grey(noise(8, 8)))
    assert found["sharpness_gradient_energy_images"] == 0
    assert "sharpness_gradient_energy_reconstructions" not in found
    assert measured(plain, plain, FIRST - 3)["sharpness_images"] == 3


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="8 × 4 pixels"):
        radial_spectrum(np.zeros((1, 8, 4, 3), np.uint8))
