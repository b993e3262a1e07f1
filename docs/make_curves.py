"""Draws docs/images/quality.png from the TensorBoard events of runs; needs the extra `docs`.

    python docs/make_curves.py RUN [RUN ...]

Each RUN is a run directory whose tokenizer was trained. Prints the table of docs/quality.md besides.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqscale.config.layout import RunLayout

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).with_name("images") / "quality.png"
ERROR = "reconstruction/mse_over_variance"
LAST = 5  # log lines whose mean stands in the table

Curve = tuple[list[int], list[float]]


def curves(run: Path) -> dict[str, Curve]:
    """Scalars of a run's tokenizer: name → steps and values."""
    events = EventAccumulator(str(RunLayout(run).tensorboard / "tokenizer"), size_guidance={"scalars": 0})
    events.Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    return {name: ([point.step for point in line], [point.value for point in line]) for name, line in found.items()}


def draw(runs: dict[str, dict[str, Curve]]) -> None:
    """The normalised error of all runs, and the perplexity of all their levels."""
    figure, (error, perplexity) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, found in runs.items():
        error.plot(*found[ERROR], label=name)
        for level in levels(found):
            perplexity.plot(*found[f"{level}/batch_perplexity"], label=f"{name}, {level}")
    error.set(title="error / variance, last 100 steps", xlabel="step", yscale="log")
    perplexity.set(title="perplexity of a batch, last 100 steps", xlabel="step", ylim=(0, None))
    for axes in (error, perplexity):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def levels(found: dict[str, Curve]) -> list[str]:
    """Names of a tokenizer's levels."""
    return sorted(name.removesuffix("/batch_perplexity") for name in found if name.endswith("/batch_perplexity"))


def table(runs: dict[str, dict[str, Curve]]) -> str:
    """Means over the last log lines, in Markdown."""
    head = "| recipe | level | error / variance | perplexity, batch | perplexity, window | codes used |"
    rows = [head, "|---|---|---|---|---|---|"]
    for name, found in runs.items():
        for level in levels(found):
            keys = (ERROR, f"{level}/batch_perplexity", f"{level}/perplexity", f"{level}/used")
            error, batch, window, used = (sum(found[key][1][-LAST:]) / LAST for key in keys)
            rows.append(f"| {name} | {level} | {error:.4f} | {batch:.0f} | {window:.0f} | {used:.1%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    found = {RunLayout(Path(run)).read_recipe().name: curves(Path(run)) for run in sys.argv[1:]}
    draw(found)
    print(table(found))
