"""Benchmark `codes`: extraction against the slower of its two halves, then the size and the reading of code shards.

Photographs, stored at the size of recipe `imagenet256`, go through its tokenizer, whose weights are random and whose
codes lie among the latents. What a training would change of the codes is their distribution, so sizes are a proxy.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import codes_read, loader_data
from benchmarks.harness import Bench
from benchmarks.machine import ROOT, threads
from benchmarks.result import at_least, at_most
from benchmarks.timing import Contender
from vqscale.config.load import load_recipe
from vqscale.config.recipe import Recipe
from vqscale.data.bad import BadCount
from vqscale.data.codes import read_code_shard
from vqscale.data.image_source import ImageSource
from vqscale.data.images import decode
from vqscale.data.manifest import CodeLevel
from vqscale.data.reader import EvaluationReader
from vqscale.data.shards import open_shards
from vqscale.extraction import Extraction
from vqscale.loading import TrainedTokenizer
from vqscale.models.pixels import from_uint8
from vqscale.models.quantizer import Donors
from vqscale.models.vqvae import VQVAE
from vqscale.training.build import build_tokenizer
from vqscale.training.heap import keep_heap

GOALS = {
    "bytes_vs_uint16": at_most(0.5625),
    "read_vs_npy": at_least(7.0),
    "extract_fraction_of_limit": at_least(0.95),
}
PACKAGES = ("zstandard", "simplejpeg", "litdata")

RECIPE = ROOT / "pipelines" / "recipes" / "imagenet256.yaml"
SMALL = ("data.image_size=32", "tokenizer.hidden=16", "tokenizer.residual_hidden=8")
"""What `--quick` changes in the recipe."""

_QUALITY, _UNIT = 90, "images/s"
_FIRST = 32  # images whose latents are the first codes


@dataclass(frozen=True)
class Sizes:
    """How much is extracted."""

    photographs: int
    """Generated ones, where none are given."""
    shards: int
    per_shard: int
    batch: int
    """Images that are encoded at once."""
    threads: int
    """Threads that decode."""


CPU, QUICK = Sizes(128, 2, 64, 32, 1), Sizes(12, 2, 6, 4, 1)
GPU = Sizes(200, 8, 2_048, 256, 16)


def run(bench: Bench) -> None:
    """Extract, then read what was extracted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = QUICK if bench.quick else GPU if device.type == "cuda" else CPU
    recipe = load_recipe(RECIPE, SMALL if bench.quick else ())
    photographs = loader_data.photographs(bench.options.data, generated=sizes.photographs)
    size = recipe.data.image_size
    files = loader_data.presized(photographs.files[: sizes.photographs], bench.folder / "packing", size, _QUALITY)
    if device.type == "cpu":
        keep_heap()  # as the stages do
    bench.config |= {"size": size, "images": photographs.facts(), "device": device.type, **vars(sizes)}
    with threads(1):
        levels, extracted = extraction(bench, recipe, files, sizes, device)
    codes_read.measure(bench, levels, extracted)


def extraction(
    bench: Bench, recipe: Recipe, files: Sequence[bytes], sizes: Sizes, device: torch.device
) -> tuple[list[CodeLevel], Mapping[str, NDArray[np.uint16]]]:
    """Check and race the extraction with its halves; returns levels, and the codes of the different images."""
    stored = loader_data.write_shards(files, bench.folder / "images", sizes.shards, sizes.per_shard)
    images = np.stack([decode(file, recipe.data.image_size) for file in files])
    tokenizer = untrained(recipe, images[:_FIRST], device)
    levels = list(recipe.levels)
    how = Extraction(tokenizer, levels, sizes.batch, recipe.extract.block, sizes.threads)
    source, folder = ImageSource(open_shards(stored.url), recipe.data.image_size), bench.folder / "codes"

    def extract() -> float:
        records = list(how.shards(source, range(sizes.shards), str(folder), BadCount(0.0)))
        return sum(record.shard.samples for record in records)

    def load() -> float:
        reader = EvaluationReader(source, source.manifest.counts, 0, 1, sizes.batch, threads=sizes.threads)
        return sum(len(batch.index) for batch in reader)

    rows = np.arange(min(stored.samples, 4 * sizes.batch)) % len(images)
    batches = [images[rows[start : start + sizes.batch]] for start in range(0, len(rows), sizes.batch)]

    def encode() -> float:
        done = 0
        for batch in itertools.cycle(batches):
            tokenizer.encode(batch)
            done += len(batch)
            if done >= stored.samples:
                break
        return done

    bench.report("extraction, checks", 0, 1)
    extract()
    found = check(bench, tokenizer, images, [folder / path.name for path in stored.paths], sizes)
    bench.report("extraction, checks", 1, 1)
    halves = (Contender("load", load), Contender("encode", encode))
    race = bench.race("extraction", (Contender("extract", extract, after=lambda: shutil.rmtree(folder)), *halves))
    for name in ("extract", "load", "encode"):
        bench.figure(f"{name}_images_per_s", race.rates(name), _UNIT)
    limit = [min(pair) for pair in zip(race.rates("load"), race.rates("encode"), strict=True)]
    bench.floor("extract_limit", limit, _UNIT, "the slower of loading alone and encoding alone in each round")
    bench.ratio("extract_fraction_of_limit", race.rates("extract"), limit)
    return levels, found


def untrained(recipe: Recipe, images: NDArray[np.uint8], device: torch.device) -> TrainedTokenizer:
    """The recipe's tokenizer with random weights, whose codes are latents of some images; in fp32 on a CPU."""
    torch.manual_seed(0)
    network = build_tokenizer(recipe.tokenizer)
    with torch.no_grad():
        donors = Donors(torch.arange(len(images)), len(images), 0)
        assert isinstance(network, VQVAE)
        network.initialise_codebooks(from_uint8(images, torch.device("cpu")), donors, lambda tensor: tensor)
    network.to(device)
    network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    names = tuple(level.name for level in recipe.levels)
    return TrainedTokenizer(network, names, recipe.data.image_size, "bench", device, device.type == "cuda")


def check(
    bench: Bench, tokenizer: TrainedTokenizer, images: NDArray[np.uint8], paths: Sequence[Path], sizes: Sizes
) -> dict[str, NDArray[np.uint16]]:
    """Compare what was extracted with what the tokenizer gives; returns the codes of the different images."""
    shards = [read_code_shard(path) for path in paths]
    labels = np.concatenate([shard["label"] for shard in shards])
    missing = np.abs(np.bincount(labels, minlength=sizes.shards * sizes.per_shard) - 1).sum()
    bench.check("extract_samples", "samples that are missing or there twice", int(missing), 0)
    differing = total = 0
    for shard in shards:
        for start in range(0, sizes.per_shard, sizes.batch):  # in the same batches, since others may round otherwise
            rows = slice(start, start + sizes.batch)
            expected = tokenizer.encode(images[shard["label"][rows] % len(images)])
            differing += sum(int((shard[name][rows] != codes).sum()) for name, codes in expected.items())
            total += sum(codes.size for codes in expected.values())
    bench.check("extract_codes", "share of codes that differ from the tokenizer's", differing / total, 1e-3)
    return {name: np.concatenate([shard[name] for shard in shards])[: len(images)] for name in tokenizer.levels}
