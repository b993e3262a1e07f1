"""The benchmarks by name: one module each, loaded when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol, cast

from benchmarks.harness import Bench
from benchmarks.result import Goal
from vqscale.arguments import did_you_mean
from vqscale.errors import UserError


class Entry(NamedTuple):
    """A benchmark that can be asked for."""

    module: str
    about: str
    ours: Sequence[str] = ("ours*",)
    """Patterns of the names that our contenders have in its races."""


BENCHMARKS = {
    "checkpoint": Entry(
        "benchmarks.checkpoint",
        "saves in the background and blocking: ours, torch's DCP; floors",
        ours=("blocking", "async"),
    ),
    "codes": Entry(
        "benchmarks.codes",
        "code shards: size, shuffled reading against .npy files, extraction; floors",
        ours=("ours*", "extract", "load", "encode"),
    ),
    "loader": Entry("benchmarks.loader", "image shards to batches: ours, webdataset, LitData, image folder; floors"),
    "prior": Entry("benchmarks.prior", "training step of the transformer: ours, x-transformers; ceiling"),
    "quantizer": Entry(
        "benchmarks.quantizer",
        "nearest codes and EMA: ours, vector-quantize-pytorch, faiss; floors",
        ours=("search", "train", "gpu_train*", "gpu_search"),
    ),
    "sample": Entry(
        "benchmarks.sample", "drawing codes: ours, without cache, x-transformers; floor", ours=("ours*", "bottom_*")
    ),
    "scaling": Entry(
        "benchmarks.scaling",
        "the tokenizer's step on 1, 2 and 4 processes, its collectives, and a model of 8 to 1,024 GPUs",
        ours=("one", "two", "four", "threads"),
    ),
    "tokenizer": Entry(
        "benchmarks.tokenizer", "training step of the tokenizer: ours, the same in plain torch; ceiling"
    ),
}
ALL = "all"
"""Name that stands for all benchmarks."""


class Benchmark(Protocol):
    """What the module of a benchmark has."""

    GOALS: Mapping[str, Goal]
    """Goals of its ratios."""
    PACKAGES: Sequence[str]
    """Packages whose versions belong to its result."""
    run: Callable[[Bench], None]
    """Measures, and leaves what it finds in the `Bench`."""


def require(names: Sequence[str]) -> list[str]:
    """The names, or all benchmarks where none or `all` is named.

    Raises:
        UserError: there is no such benchmark; names the nearest.
    """
    known = [*BENCHMARKS, ALL]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(
                f"unknown benchmark '{name}'", where="vqscale bench", mend=f"{hint}benchmarks: {', '.join(known)}"
            )
    return list(BENCHMARKS) if ALL in names or not names else list(dict.fromkeys(names))


def load(name: str) -> Benchmark:
    """The module of a benchmark."""
    return cast(Benchmark, importlib.import_module(BENCHMARKS[name].module))


def is_ours(name: str, contender: str) -> bool:
    """Whether a contender in the races of a benchmark is ours, not a peer, a floor or the pace."""
    return name in BENCHMARKS and any(fnmatchcase(contender, pattern) for pattern in BENCHMARKS[name].ours)
