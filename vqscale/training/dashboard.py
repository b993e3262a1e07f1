"""What TensorBoard opens on, and a run's settings beside what came of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Charts = dict[str, list[Any]]
"""Chart → kind and the tags (regular expressions) on it, as TensorBoard's custom scalars have it."""
Layout = dict[str, Charts]
"""Category → its charts."""

_SPEED: Charts = {
    "throughput": ["Multiline", [r"speed/.*_per_second"]],
    "waiting": ["Multiline", ["speed/data_wait", "speed/all_reduce_s", "speed/all_reduce_exposed_s"]],
    "compute": ["Multiline", ["speed/tflops", "speed/share_of_peak"]],
    "memory in GiB": ["Multiline", [r"memory/.*"]],
    "seconds of a save, and of them stalled": ["Multiline", [r"checkpoint/.*"]],
    "bad samples": ["Multiline", [r"data/bad.*"]],
}
_OPTIMIZER: Charts = {
    "learning rate": ["Multiline", ["optim/learning_rate"]],
    "gradient norm": ["Multiline", ["optim/gradient_norm"]],
}


def layout(stage: str, charts: Charts) -> Layout:
    """The charts of a stage, what matters most first.

    Args:
        stage: name of the stage.
        charts: its own; may be empty.
    """
    first: Layout = {stage: charts} if charts else {}
    return {**first, f"{stage}: optimizer": _OPTIMIZER, f"{stage}: speed": _SPEED}


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
