"""Image metrics, contact sheets, and how hours are counted."""

from __future__ import annotations

import numpy as np
import pytest

from vqscale.data import clocks
from vqscale.data.sheet import code_colours, colour_codes, labelled_sheet, tile
from vqscale.evaluation.hours import HourCounts
from vqscale.evaluation.metrics import mse, psnr


def flat(value: int, count: int = 1, size: int = 4) -> np.ndarray:
    return np.full((count, size, size, 3), value, np.uint8)


def test_mse_and_psnr_by_hand() -> None:
    black = np.concatenate([flat(0), flat(0), flat(0)])
    other = np.concatenate([flat(255), flat(51), flat(0)])
    error = mse(black, other)
    np.testing.assert_allclose(error, [1.0, 0.04, 0.0])
    np.testing.assert_allclose(mse(other, black), error)  # no wrap-around of uint8
    np.testing.assert_allclose(psnr(error), [0.0, 13.9794, 100.0], atol=1e-4)


def test_one_pixel_counts_as_its_share() -> None:
    image = flat(0)
    image[0, 1, 2, 0] = 255
    assert mse(image, flat(0))[0] == pytest.approx(1 / 48)


def test_tile() -> None:
    images = np.stack([flat(n * 10)[0] for n in range(5)])
    sheet = tile(images, columns=3)
    assert sheet.shape == (4 + 1 + 4, 4 + 1 + 4 + 1 + 4, 3)
    assert (sheet[:4, 5:9] == 10).all()
    assert (sheet[5:, :4] == 30).all()
    assert (sheet[:, 4] == 255).all()
    assert (sheet[5:, 10:] == 255).all()
    assert tile(images, columns=5, pad=0).shape == (4, 20, 3)


def test_labelled_sheet() -> None:
    rows = {"00": flat(10, 3, 16), "a longer name": flat(20, 2, 16)}
    sheet = labelled_sheet(rows, side=64)
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] == 2 * 68 + 4
    margin = sheet.shape[1] - 3 * 68
    assert margin > 40
    assert (sheet[4:68, margin : margin + 64] == 10).all()
    assert (sheet[72:136, margin + 68 : margin + 132] == 20).all()
    assert (sheet[72:136, margin + 136 :] == 255).all(), "the second row is shorter"
    assert (sheet[:, : margin - 8] < 128).any(), "the names are written"


def test_large_images_are_not_enlarged() -> None:
    assert labelled_sheet({"x": flat(0, 2, 100)}).shape[0] == 100 + 2 * 4


def test_codes_have_colours_of_their_own() -> None:
    codes, vectors = np.arange(8).reshape(2, 2, 2), np.random.default_rng(0).normal(size=(8, 5))
    colours = code_colours(vectors)
    picture = colour_codes(codes, colours, 8)
    assert picture.shape == (2, 8, 8, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 8
    assert (colour_codes(codes[:1], colours, 8)[0] == picture[0]).all(), "independent of the codes in use"


def test_codes_that_lie_close_together_look_alike() -> None:
    line = np.arange(256.0)[:, None] * np.array([[1.0, 2.0, -3.0, 0.5]])
    line += np.random.default_rng(0).normal(size=line.shape)
    red = code_colours(line)[:, 0].astype(int)
    assert np.abs(np.diff(red)).max() <= 3
    assert (red.min(), red.max()) == (0, 255)
    assert code_colours(np.ones((1, 1))).shape == (1, 3), "a codebook of one"


def test_hour_counts() -> None:
    images, hours = clocks.draw(0, 48, 32, seed=5)
    counts = HourCounts()
    counts.add(images[:24], hours[:24])
    counts.add(images[24:], (hours[24:] + 1) % 12)
    assert counts.images.sum() == 48
    assert 0.45 < counts.accuracy <= 0.5
    empty = HourCounts()
    empty.add(np.full((6, 32, 32, 3), 90, np.uint8), np.arange(6))
    assert (empty.accuracy, empty.unreadable.sum()) == (0.0, 6)
    both = HourCounts().merge([counts, empty])
    assert both.images.sum() == 54
    assert both.right.sum() == counts.right.sum()
    assert len(both.by_hour()) == 12
    assert HourCounts().merge([]).images.sum() == 0
