"""The benchmarks by name: one module each, loaded when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

from benchmarks.harness import Bench
from benchmarks.result import Goal
from vqscale.arguments import did_you_mean
from vqscale.errors import UserError


class Entry(NamedTuple):
    """A benchmark that can be asked for."""

    module: str
    about: str


BENCHMARKS = {
    "checkpoint": Entry("benchmarks.checkpoint", "saves in the background and blocking: ours, torch's DCP; floors"),
    "codes": Entry("benchmarks.codes", "code shards: size, shuffled reading against .npy files, extraction; floors"),
    "loader": Entry("benchmarks.loader", "image shards to batches: ours, webdataset, LitData, image folder; floors"),
    "prior": Entry("benchmarks.prior", "training step of the transformer: ours, x-transformers; ceiling"),
    "quantizer": Entry("benchmarks.quantizer", "nearest codes and EMA: ours, vector-quantize-pytorch, faiss; floors"),
    "sample": Entry("benchmarks.sample", "drawing codes: ours, without cache, x-transformers; floor"),
    "tokenizer": Entry(
        "benchmarks.tokenizer", "training step of the tokenizer: ours, the same in plain torch; ceiling"
    ),
}


class Benchmark(Protocol):
    """What the module of a benchmark has."""

    GOALS: Mapping[str, Goal]
    """Goals of its ratios."""
    PACKAGES: Sequence[str]
    """Packages whose versions belong to its result."""
    run: Callable[[Bench], None]
    """Measures, and leaves what it finds in the `Bench`."""


def require(names: Sequence[str]) -> list[str]:
    """The names, or all benchmarks where none is named.

    Raises:
        UserError: there is no such benchmark; names the nearest.
    """
    for name in names:
        if name not in BENCHMARKS:
            hint = did_you_mean(name, list(BENCHMARKS))
            raise UserError(
                f"unknown benchmark '{name}'", where="vqscale bench", mend=f"{hint}benchmarks: {', '.join(BENCHMARKS)}"
            )
    return list(dict.fromkeys(names)) or list(BENCHMARKS)


def load(name: str) -> Benchmark:
    """The module of a benchmark."""
    return cast(Benchmark, importlib.import_module(BENCHMARKS[name].module))
