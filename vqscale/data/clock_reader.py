"""Reads the hour from the pixels of a clock face, without knowing how it was made.

The rim's circle is fitted first. From its centre, lines are scored in the colour channel in which each hand is
dark: blue for the hour hand, red for the minute hand. The hour follows from both angles, as people read it: the
minute hand says how far the hour hand has to be past its mark.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

UNREADABLE = -1
"""Hour of an image that shows no clock."""

_MIN_RIM_CONTRAST = 0.15
_MIN_HAND_CONTRAST = 0.12
_ANGLES = np.arange(0, 360, 3, dtype=np.float32)
_RING = np.deg2rad(np.arange(0, 360, 10, dtype=np.float32))


@dataclass(frozen=True)
class Reading:
    """What n images show; lengths in pixels, angles in degrees clockwise from twelve."""

    hour: NDArray[np.int64]
    """[n], 0 to 11, or UNREADABLE."""
    hour_angle: Floats
    minute_angle: Floats
    centre: Floats
    """[n, 2], x and y."""
    radius: Floats


def read_clocks(images: NDArray[np.uint8], batch: int = 64) -> Reading:
    """Read clocks.

    Args:
        images: uint8 [n, size, size, 3].
        batch: images that are read at once (bounds the memory).
    """
    parts = [_read(images[i : i + batch].astype(np.float32) / np.float32(255)) for i in range(0, len(images), batch)]
    return Reading(*(np.concatenate([getattr(part, name) for part in parts]) for name in Reading.__annotations__))


def _read(images: Floats) -> Reading:
    circle, rim_contrast = _fit_rim(images.mean(axis=3))
    hour_angle, hour_contrast = _find_hand(images, circle, channel=2, reach=(0.15, 0.5))
    # Only beyond the hour hand's end, which may lie over the minute hand.
    minute_angle, minute_contrast = _find_hand(images, circle, channel=0, reach=(0.58, 0.76))
    hour = np.rint((hour_angle - minute_angle / 12) / 30).astype(np.int64) % 12
    shown = (rim_contrast > _MIN_RIM_CONTRAST) & (np.minimum(hour_contrast, minute_contrast) > _MIN_HAND_CONTRAST)
    return Reading(np.where(shown, hour, UNREADABLE), hour_angle, minute_angle, circle[:, :2], circle[:, 2])


def _fit_rim(luminance: Floats) -> tuple[Floats, Floats]:
    """Circles [n, 3] (x, y, radius of the rim's middle) and the contrast of face against rim."""
    size = luminance.shape[1]
    step, reach = size / 32, size * 0.16
    offsets = np.arange(-reach, reach + 1e-3, 1.5 * step, dtype=np.float32)
    radii = np.arange(0.28, 0.47, 0.035, dtype=np.float32) * size
    circle = np.array([[size / 2, size / 2, 0]], np.float32).repeat(len(luminance), axis=0)
    circle, score = _best_circle(luminance, circle, offsets, radii)
    for fine in (0.75 * step, 0.375 * step, 0.19 * step):
        near = np.array([-fine, 0, fine], np.float32)
        circle, score = _best_circle(luminance, circle, near, near)
    return circle, score


def _best_circle(luminance: Floats, around: Floats, offsets: Floats, radii: Floats) -> tuple[Floats, Floats]:
    """The candidate around each circle whose ring is darkest against the face just inside it."""
    candidates = np.stack(np.meshgrid(offsets, offsets, radii, indexing="ij"), axis=-1).reshape(-1, 3)
    circles = around[:, None] + candidates[None]
    inside = 3.0 * luminance.shape[1] / 32
    x, y, radius = (circles[..., i, None] for i in range(3))
    face = _sample(luminance, x + (radius - inside) * np.cos(_RING), y + (radius - inside) * np.sin(_RING))
    ring = _sample(luminance, x + radius * np.cos(_RING), y + radius * np.sin(_RING))
    score = (face - ring).mean(axis=-1)
    best = score.argmax(axis=1)
    rows = np.arange(len(luminance))
    return circles[rows, best], score[rows, best]


def _find_hand(images: Floats, circle: Floats, channel: int, reach: tuple[float, float]) -> tuple[Floats, Floats]:
    """Angle [n] of the darkest line from the centre in one channel, and its contrast against the face."""
    values = images[..., channel]
    turn = np.deg2rad(_ANGLES)[None, :, None]
    along = np.linspace(*reach, 8, dtype=np.float32)[None, None, :] * circle[:, 2, None, None]
    x = circle[:, 0, None, None] + along * np.sin(turn)
    y = circle[:, 1, None, None] - along * np.cos(turn)
    line = _sample(values, x, y).mean(axis=-1)
    dark = np.median(line, axis=1, keepdims=True) - line
    best = dark.argmax(axis=1)
    contrast = dark[np.arange(len(dark)), best]
    # The darkness around the best line, as a weighted mean of directions: finer than the steps of the search.
    apart = np.abs((_ANGLES[None] - _ANGLES[best][:, None] + 180) % 360 - 180)
    weight = np.where(apart <= 24, np.maximum(dark - 0.3 * contrast[:, None], 0), 0)
    radians = np.deg2rad(_ANGLES)
    angle = np.arctan2((weight * np.sin(radians)).sum(axis=1), (weight * np.cos(radians)).sum(axis=1))
    return (np.rad2deg(angle) % 360).astype(np.float32), contrast


def _sample(values: Floats, x: Floats, y: Floats) -> Floats:
    """Bilinear values [n, ...] at pixel positions (pixel centres at .5), clamped to the image."""
    count, height, width = values.shape
    x, y = np.clip(x - 0.5, 0, width - 1.001), np.clip(y - 0.5, 0, height - 1.001)
    left, top = x.astype(np.int32), y.astype(np.int32)
    right, down = x - left, y - top
    flat = values.reshape(-1)
    start = np.arange(count, dtype=np.int32).reshape(count, *[1] * (x.ndim - 1)) * (height * width) + top * width + left
    above = flat[start] * (1 - right) + flat[start + 1] * right
    below = flat[start + width] * (1 - right) + flat[start + width + 1] * right
    return above * (1 - down) + below * down
