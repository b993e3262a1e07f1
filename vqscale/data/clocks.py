"""Analog clock faces, drawn procedurally: the data set that every machine has.

A clock varies in size, offset and in the colours of background, face, rim and both hands. Its class is the hour.
The hour hand is short, thick and warm (dark in blue); the minute hand is long, thin and cool (dark in red).
Minutes stay between 10 and 50, so that the hour is never in doubt. `vqscale.data.clock_reader` reads them back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLASSES = tuple(f"{hour:02d}" for hour in range(12))
"""Class names; the index is the hour, 00 is twelve o'clock."""

MINUTES = (10, 50)
"""Range of the minute hand."""


@dataclass(frozen=True)
class Clocks:
    """Parameters of n clocks; lengths are fractions of the image's side, colours lie in [0, 1]."""

    hour: NDArray[np.int64]
    minute: NDArray[np.float64]
    centre: NDArray[np.float64]
    """[n, 2], x to the right, y down."""
    radius: NDArray[np.float64]
    background: NDArray[np.float64]
    """[n, 3], as the other colours."""
    face: NDArray[np.float64]
    rim: NDArray[np.float64]
    hour_hand: NDArray[np.float64]
    minute_hand: NDArray[np.float64]


def draw(first: int, count: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw clocks number `first` to `first + count - 1`; clock i depends on (seed, i, size) alone.

    Returns:
        images uint8 [count, size, size, 3] and hours int64 [count], 0 to 11.
    """
    clocks = parameters(first, count, seed)
    return render(clocks, size), clocks.hour


def parameters(first: int, count: int, seed: int) -> Clocks:
    """The parameters of clocks number `first` to `first + count - 1`."""
    unit = np.stack([np.random.default_rng((seed, first + i)).random(10) for i in range(count)])
    radius = 0.37 + 0.09 * unit[:, 2]
    slack = 0.48 - radius  # the rim stays inside the image
    return Clocks(
        hour=np.minimum((unit[:, 0] * 12).astype(np.int64), 11),
        minute=MINUTES[0] + (MINUTES[1] - MINUTES[0]) * unit[:, 1],
        centre=0.5 + (2 * unit[:, 3:5] - 1) * slack[:, None],
        radius=radius,
        background=_hue(unit[:, 5], middle=0.5, reach=0.25),
        face=_hue(unit[:, 6], middle=0.91, reach=0.08),
        rim=_between(unit[:, 7], (0.0, 0.0, 0.05), (0.25, 0.25, 0.3)),
        hour_hand=_between(unit[:, 8], (0.75, 0.05, 0.1), (0.95, 0.4, 0.1)),
        minute_hand=_between(unit[:, 9], (0.1, 0.1, 0.7), (0.1, 0.45, 0.9)),
    )


def hand_angles(
    hour: NDArray[np.int64], minute: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Angles of the hour and the minute hand in degrees, clockwise from twelve."""
    return 30.0 * hour + 0.5 * minute, 6.0 * minute


def render(clocks: Clocks, size: int) -> NDArray[np.uint8]:
    """Draw the clocks with antialiased edges: uint8 [n, size, size, 3]."""
    grid: NDArray[np.float32] = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    centre = clocks.centre.astype(np.float32)
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    radius = clocks.radius[:, None, None].astype(np.float32)
    distance = np.hypot(x, y) - radius
    image = np.broadcast_to(clocks.background[:, None, None].astype(np.float32), (*distance.shape, 3)).copy()
    _paint(image, distance, clocks.rim, size)
    _paint(image, distance + 0.055, clocks.face, size)
    hour_angle, minute_angle = hand_angles(clocks.hour, clocks.minute)
    _paint(image, _hand(x, y, minute_angle, 0.78 * radius, 0.034), clocks.minute_hand, size)
    _paint(image, _hand(x, y, hour_angle, 0.52 * radius, 0.052), clocks.hour_hand, size)
    return (image * 255 + 0.5).astype(np.uint8)


def _hue(turn: NDArray[np.float64], middle: float, reach: float) -> NDArray[np.float64]:
    """Colours [n, 3] around the colour circle; `turn` in [0, 1)."""
    return middle + reach * np.cos(2 * np.pi * (turn[:, None] + np.arange(3) / 3))


def _between(unit: NDArray[np.float64], low: tuple[float, ...], high: tuple[float, ...]) -> NDArray[np.float64]:
    """Colours [n, 3] on the line between two."""
    return np.asarray(low) + (np.asarray(high) - np.asarray(low)) * unit[:, None]


def _hand(
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    angle: NDArray[np.float64],
    length: NDArray[np.float32],
    half: float,
) -> NDArray[np.float32]:
    """Signed distance to a bar with round ends from the centre outwards."""
    turn = np.deg2rad(angle).astype(np.float32)[:, None, None]
    right, up = np.sin(turn), -np.cos(turn)
    along = np.clip(x * right + y * up, 0, length)
    return np.hypot(x - along * right, y - along * up) - np.float32(half)


def _paint(image: NDArray[np.float32], distance: NDArray[np.float32], colour: NDArray[np.float64], size: int) -> None:
    """Blend a colour over the inside of a shape, in place, with an edge of one pixel."""
    cover = np.clip(0.5 - distance * size, 0, 1)[..., None]
    image += cover * (colour[:, None, None].astype(np.float32) - image)
