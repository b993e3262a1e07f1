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


def layout(own: Layout, stage: str, *, trained: bool = True, world: int = 1, peak: bool = False) -> Layout:
    """The charts of a stage and of those before it, what matters most first; those that would stay empty are left out.

    A chart shows the curves of all stages that have its tags, and TensorBoard shows once what the layouts of several
    stages have in common. It takes them in the order of their names, so a layout begins with what stages before show.

    Args:
        own: the stages' own charts up to this stage, which may be empty.
        stage: name of this stage.
        trained: whether this stage takes any steps.
        world: number of ranks.
        peak: whether the device's peak is known.
    """
    speed = _SPEED | (_PEAK if peak else {}) | (_RANKS if world > 1 else {})
    shown = own if trained else {**own, stage: {name: chart for name, chart in own[stage].items() if _measured(chart)}}
    common: Layout = {"optimizer": _OPTIMIZER, "speed": speed} if trained else {}
    return {category: charts for category, charts in {**shown, **common}.items() if charts}


def _measured(chart: list[Any]) -> bool:
    """Whether a chart shows what is measured without a step."""
    return all(tag.startswith("validation/") for tag in chart[1])


_TRAINING = ("learning_rate", "global_batch", "steps")
VARIED = tuple(f"{stage}.training.{name}" for stage in ("tokenizer", "prior") for name in _TRAINING)
"""What is most often varied, so that TensorBoard's table begins with it."""

METRICS = (
    *("report/psnr", "report/bits_per_dim", "report/fid", "report/rfid", "report/cas_samples", "report/hour_accuracy"),
    *("validation/psnr", "validation/mse", "validation/nats_per_code", "validation/bits_per_sample"),
)
"""Final figures in the table of hyperparameters; a stage has its own of them.

The same for all stages, as the settings are: TensorBoard takes the columns of all rows from one of them.
"""


def hyperparameters(recipe: Mapping[str, Any], resources: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """A run's settings by dotted name.

    Args:
        recipe: plain values of all settings.
        resources: what the stage really runs on, in the place of the recipe's.
    """
    return dict(leaves({**recipe, "resources": {**recipe["resources"], **resources}}))


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
