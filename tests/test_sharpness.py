"""Gradient energy and radial spectrum, by images whose figures can be worked out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from vqscale.evaluation.sharpness import gradient_energy, radial_spectrum, sharpness_figures


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


def test_blur_is_seen_and_the_same_images_are_as_sharp() -> None:
    originals = noise()
    same = sharpness_figures(grey(originals), grey(originals))
    assert same == {"gradient_energy": 1.0, "high_frequencies": 1.0}
    before = same
    for width in (0.5, 1.0, 2.0):
        blurred = sharpness_figures(grey(originals), grey(gaussian_filter(originals, (0, width, width))))
        assert all(blurred[name] < before[name] for name in blurred)
        before = blurred
    assert before["gradient_energy"] < 0.05
    assert before["high_frequencies"] < 0.05


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="8 × 4 pixels"):
        radial_spectrum(np.zeros((1, 8, 4, 3), np.uint8))
