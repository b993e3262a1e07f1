"""What TensorBoard opens on, and a run's settings beside what came of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Charts = dict[str, list[Any]]
"""Chart → kind and the tags (regular expressions) on it, as TensorBoard's custom scalars have it."""
Layout = dict[str, Charts]
"""Category → its charts."""

_SPEED: Charts = {
    "images a second": ["Multiline", ["speed/images_per_second"]],
    "tokens a second": ["Multiline", ["speed/tokens_per_second"]],
    "share of the time that waits for data": ["Multiline", ["speed/data_wait"]],
    "TFLOP/s of a device": ["Multiline", ["speed/tflops"]],
    "memory in GiB": ["Multiline", [r"memory/.*"]],
    "seconds of a save, and of them stalled": ["Multiline", [r"checkpoint/.*"]],
    "bad samples": ["Multiline", [r"data/bad.*"]],
}
_PEAK: Charts = {"share of the device's peak": ["Multiline", ["speed/share_of_peak"]]}
_RANKS: Charts = {
    "seconds a step in all-reduces, and of them exposed": ["Multiline", [r"speed/all_reduce.*"]],
    "slowest rank's own time, over the median's": ["Multiline", ["speed/slowest_over_median"]],
}
_OPTIMIZER: Charts = {
    "learning rate": ["Multiline", ["optim/learning_rate"]],
    "gradient norm": ["Multiline", ["optim/gradient_norm"]],
}


def layout(stage: str, charts: Charts, world: int = 1, peak: bool = False) -> Layout:
    """The charts of a stage, what matters most first; those that would stay empty are left out.

    Args:
        stage: name of the stage.
        charts: its own; may be empty.
        world: number of ranks.
        peak: whether the device's peak is known.
    """
    speed = _SPEED | (_PEAK if peak else {}) | (_RANKS if world > 1 else {})
    first: Layout = {stage: charts} if charts else {}
    return {**first, f"{stage}: optimizer": _OPTIMIZER, f"{stage}: speed": speed}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """The single settings of a tree by dotted name; what is unset is left out."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield from leaves({str(number): item for number, item in enumerate(value)}, f"{name}.")
        elif value is not None:
            yield name, value
