"""What TensorBoard opens on, and a run's settings beside what came of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Layout = dict[str, dict[str, list[Any]]]
"""Category → chart → kind and the tags (regular expressions) on it, as TensorBoard's custom scalars have it."""

_SPEED: dict[str, list[Any]] = {
    "throughput": ["Multiline", [r"speed/.*_per_second"]],
    "waiting": ["Multiline", ["speed/data_wait", "speed/all_reduce_s", "speed/all_reduce_exposed_s"]],
    "compute": ["Multiline", ["speed/tflops", "speed/share_of_peak"]],
    "memory in GiB": ["Multiline", [r"memory/.*"]],
    "seconds of a save, and of them stalled": ["Multiline", [r"checkpoint/.*"]],
    "bad samples": ["Multiline", [r"data/bad.*"]],
}
_OPTIMIZER: dict[str, list[Any]] = {
    "learning rate": ["Multiline", ["optim/learning_rate"]],
    "gradient norm": ["Multiline", ["optim/gradient_norm"]],
}


def layout(stage: str, levels: Sequence[str]) -> Layout:
    """The charts of a stage, what matters most first.

    Args:
        stage: `tokenizer` or `prior`; any other has the speed alone.
        levels: level names.
    """
    first: dict[str, Layout] = {"tokenizer": {stage: _tokenizer(levels)}, "prior": {stage: _prior(levels)}}
    return {**first.get(stage, {}), f"{stage}: optimizer": _OPTIMIZER, f"{stage}: speed": _SPEED}


def _tokenizer(levels: Sequence[str]) -> dict[str, list[Any]]:
    def every(figure: str) -> list[Any]:
        return ["Multiline", [f"{name}/{figure}" for name in levels]]

    return {
        "loss": ["Multiline", [r"loss/.*"]],
        "held-out PSNR": ["Multiline", ["validation/psnr"]],
        "share of codes used": every("used"),
        "perplexity": every("perplexity"),
        "dead codes": every("dead"),
        "codes restarted a step": every("restarted"),
    }


def _prior(levels: Sequence[str]) -> dict[str, list[Any]]:
    return {
        "nats a code, training": ["Multiline", [r"loss/.*"]],
        "nats a code, held out": ["Multiline", [r"validation/nats.*"]],
    }


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
