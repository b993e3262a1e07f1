"""What a run has left for TensorBoard, read as TensorBoard reads it."""

from __future__ import annotations

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2


def board(run: Path, stage: str = "tokenizer") -> EventAccumulator:
    """All that a stage has written."""
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(run / "tensorboard" / stage), size_guidance=everything).Reload()


def charts_shown(run: Path, stage: str = "tokenizer") -> dict[str, dict[str, list[str]]]:
    """A stage's layout: category → chart → tags; empty if it has none."""
    if "custom_scalars__config__" not in (events := board(run, stage)).Tags()["tensors"]:
        return {}
    (words,) = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val
    categories = layout_pb2.Layout.FromString(words).category
    return {one.title: {chart.title: list(chart.multiline.tag) for chart in one.chart} for one in categories}


def empty_charts(run: Path, *stages: str) -> list[str]:
    """Charts of these stages' layouts on which none of them has a curve."""
    scalars = {tag for stage in stages for tag in board(run, stage).Tags()["scalars"]}
    charts = [item for stage in stages for category in charts_shown(run, stage).values() for item in category.items()]
    return [title for title, tags in charts if not any(re.match(tag, scalar) for tag in tags for scalar in scalars)]
