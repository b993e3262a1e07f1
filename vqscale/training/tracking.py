"""What a run shows: TensorBoard and the stage's events, written by rank 0 and silent elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.events import EventLog


class Tracker:
    """Figures and pictures of one stage on rank 0.

    One directory a stage, continued over attempts: what an earlier attempt wrote behind the step that this one
    starts from is purged.

    Args:
        folder: TensorBoard's directory of the stage.
        events: the stage's event log.
        start: step that this attempt starts from.
    """

    def __init__(self, folder: Path, events: EventLog, start: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start)
        self._events = events

    def figures(self, step: int, figures: Mapping[str, float], *, rate: float | None = None) -> None:
        """Scalars of a step, all of them for TensorBoard and a few for the events."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        if rate is not None:
            self._writer.add_scalar("speed/rate", rate, step)
        self._events.log(step, rate=rate, **{_IN_EVENTS[k]: v for k, v in figures.items() if k in _IN_EVENTS})
        self._writer.flush()

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Scalars for TensorBoard alone."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """An image uint8 [H, W, 3]."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: NDArray[Any]) -> None:
        """A distribution."""
        self._writer.add_histogram(name, values, step)

    def text(self, name: str, text: str) -> None:
        """A text, such as the recipe."""
        self._writer.add_text(name, f"```yaml\n{text}\n```", 0)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
        self._events.close()


_IN_EVENTS = {"loss/total": "loss", "speed/data_wait": "data_wait", "data/bad_samples": "bad_samples"}
"""What `status` and the progress display show, by its name in TensorBoard."""


def tile(images: NDArray[np.uint8], columns: int, pad: int = 1) -> NDArray[np.uint8]:
    """Images uint8 [n, H, W, 3] side by side, row by row, on white: uint8 [H', W', 3]."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + pad) - pad, columns * (width + pad) - pad, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + pad), i % columns * (width + pad)
        sheet[top : top + height, left : left + width] = image
    return sheet


def colour_codes(codes: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Code grids [n, side, side] as pictures uint8 [n, size, size, 3]; a fixed colour for each code."""
    palette = np.random.default_rng(0).integers(0, 256, (int(codes.max()) + 1, 3), dtype=np.uint8)
    scale = max(1, size // codes.shape[1])
    return palette[codes].repeat(scale, axis=1).repeat(scale, axis=2)
