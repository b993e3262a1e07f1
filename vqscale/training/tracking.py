"""What a run shows: TensorBoard and the stage's events, written by rank 0 and silent elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.events import EventLog
from vqscale.training.dashboard import METRICS, VARIED, Layout


class Tracker:
    """Figures and pictures of one stage on rank 0.

    One directory a stage, continued over attempts: what an earlier attempt wrote behind the step that this one
    starts from is purged; that step itself was logged before its checkpoint was committed.

    Args:
        folder: TensorBoard's directory of the stage.
        events: the stage's event log.
        start: step that this attempt starts from.
    """

    def __init__(self, folder: Path, events: EventLog, start: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
        self._events = events

    def layout(self, layout: Layout) -> None:
        """The charts that TensorBoard's custom scalars open on."""
        self._writer.add_custom_scalars(layout)

    def outcome(self, settings: Mapping[str, bool | float | str]) -> None:
        """Settings beside what came of them, for TensorBoard's table of hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        # Not by `add_hparams`, which opens a run of its own; the figures are those that the curves end with, so their
        # values here are not looked at.
        experiment, *session = hparams(dict(settings), dict.fromkeys(METRICS, 0.0))
        _varied_first(experiment.value[0].metadata.plugin_data)
        for summary in (experiment, *session):
            self._writer._get_file_writer().add_summary(summary)

    def figures(self, step: int, figures: Mapping[str, float], *, rate: float | None = None) -> None:
        """Scalars of a step, all of them for TensorBoard and a few for the events."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        if rate is not None:
            self._writer.add_scalar(f"speed/{self._events.unit.replace('/s', '')}_per_second", rate, step)
        self._events.log(step, rate=rate, **{_IN_EVENTS[k]: v for k, v in figures.items() if k in _IN_EVENTS})
        self._writer.flush()

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Scalars for TensorBoard alone."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """A line in the stage's events about something beside the progress."""
        self._events.note(kind, step, **facts)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """An image uint8 [H, W, 3]."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: NDArray[Any]) -> None:
        """A distribution."""
        self._writer.add_histogram(name, values, step)

    def embedding(
        self, step: int, name: str, vectors: NDArray[np.float32], labels: list[list[str]], columns: list[str]
    ) -> None:
        """Vectors fp32 [n, D] for the projector, each with its labels."""
        self._writer.add_embedding(vectors, metadata=labels, metadata_header=columns, tag=name, global_step=step)

    def text(self, name: str, text: str, *, kind: str = "yaml") -> None:
        """A text, such as the recipe, in a block of its own."""
        self._writer.add_text(name, f"```{kind}\n{text}\n```", 0)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
        self._events.close()


_IN_EVENTS = {"loss/total": "loss", "speed/data_wait": "data_wait", "data/bad_samples": "bad_samples"}
"""What `status` and the progress display show, by its name in TensorBoard."""


def _varied_first(plugin_data: Any) -> None:
    """TensorBoard's table has what differs between runs first, then all by name, and shows five columns of it.

    torch says of nothing that it differs; then the five are whatever the alphabet has first.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    told = HParamsPluginData.FromString(plugin_data.content)
    for setting in told.experiment.hparam_infos:
        setting.differs = setting.name in VARIED
    plugin_data.content = told.SerializeToString()
