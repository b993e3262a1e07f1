"""Stage `extract`: image shards to code shards, one for one.

Each code shard is written beside, renamed and recorded; a shard that is recorded is skipped. Killed and started
again at any time, the stage finishes with every sample exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines.sources import image_source
from pipelines.stage import Stage, run_stage
from vqscale import storage
from vqscale.data.bad import BadCount, BadPick
from vqscale.data.codes import (
    CodeBlock,
    CodeRecord,
    manifest_from_records,
    read_record,
    read_records,
    write_code_shard,
    write_record,
)
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import CodeLevel, Manifest, read_manifest, write_manifest
from vqscale.data.order import evaluation_shards
from vqscale.events import EventLog
from vqscale.export import TrainedTokenizer, load_tokenizer
from vqscale.models.quantizer import usage_figures


def main(stage: Stage) -> dict[str, Any]:
    """Encode the training and the held-out images with the run's tokenizer."""
    tokenizer = load_tokenizer(stage.layout.root, stage.ranks.device)
    sources = {split: image_source(stage, split) for split in ("train", "validation")}
    events = stage.events("images/s", len(evaluation_shards_of(sources["train"].manifest, stage)))
    figures: dict[str, Any] = {}
    for split, source in sources.items():
        counted = extract_split(stage, tokenizer, source, split, events if split == "train" else None)
        finished = read_manifest(stage.layout.codes(split))
        figures |= {f"{split}_samples": finished.samples, f"{split}_skipped": finished.skipped}
        if split == "train":
            figures |= usage_figures(counted)
    if events:
        events.close()
    return figures


def evaluation_shards_of(manifest: Manifest, stage: Stage) -> range:
    """This rank's shards."""
    return evaluation_shards(len(manifest.shards), stage.ranks.rank, stage.ranks.world)


def extract_split(
    stage: Stage, tokenizer: TrainedTokenizer, source: ImageSource, split: str, events: EventLog | None
) -> dict[str, torch.Tensor]:
    """Write this rank's code shards, then (rank 0) the manifest; returns the use of the codes over the whole split."""
    folder = str(stage.layout.codes(split))
    manifest, count = source.manifest, BadCount(stage.recipe.data.error_budget, stage.ranks.world)
    for number, shard in enumerate(evaluation_shards_of(manifest, stage)):
        record = read_record(folder, source.shards.flat_names[shard], tokenizer.fingerprint)
        if record is None:
            write_record(folder, extract_shard(stage, tokenizer, source, shard, folder, count))
        if events:
            events.log(number + 1)
    stage.ranks.barrier()
    records = read_records(folder, source.shards.flat_names, tokenizer.fingerprint)
    # From the records: those of an earlier attempt are counted too.
    bad = [
        (source.name(shard), key, kind)
        for shard in evaluation_shards_of(manifest, stage)
        for key, kind in records[shard].bad
    ]
    read = sum(manifest.counts[shard] for shard in evaluation_shards_of(manifest, stage))
    stage.judge(Counter(kind for _, _, kind in bad), read, bad)
    if stage.ranks.first:
        levels = zip(stage.recipe.grids, stage.recipe.tokenizer.levels, strict=True)
        finished = manifest_from_records(
            records,
            levels=[CodeLevel(name=level.name, grid=side, codes=level.codes) for side, level in levels],
            classes=manifest.classes,
            image_size=stage.recipe.data.image_size,
            fingerprint=tokenizer.fingerprint,
            source={"images": source.shards.spec},
        )
        write_manifest(folder, finished)
    stage.ranks.barrier()
    return {name: torch.tensor([record.usage[name] for record in records]).sum(dim=0) for name in tokenizer.levels}


def extract_shard(
    stage: Stage, tokenizer: TrainedTokenizer, source: ImageSource, shard: int, folder: str, count: BadCount
) -> CodeRecord:
    """Write one code shard and return its record; bad images are left out, counted and judged by `count`."""
    bad: list[BadPick] = []
    usage = {level.name: np.zeros(level.codes, np.int64) for level in stage.recipe.tokenizer.levels}

    def blocks() -> Iterator[CodeBlock]:
        for fields, keys in source.read_shard(shard, stage.recipe.extract.block, bad):
            if keys:
                codes = _encode(tokenizer, fields["image"], stage.recipe.extract.batch)
                for name, grid in codes.items():
                    usage[name] += np.bincount(grid.ravel(), minlength=len(usage[name]))
                yield CodeBlock(codes, fields["label"], keys)

    where = storage.join(folder, source.shards.flat_names[shard])
    written = write_code_shard(where, blocks())
    count.add(source.manifest.counts[shard], bad)
    use = {name: counts.tolist() for name, counts in usage.items()}
    named = tuple((pick.key, pick.kind) for pick in bad)
    return CodeRecord(shard=written, fingerprint=tokenizer.fingerprint, skipped=len(bad), bad=named, usage=use)


def _encode(tokenizer: TrainedTokenizer, images: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    parts = [tokenizer.encode(images[start : start + batch]) for start in range(0, len(images), batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in tokenizer.levels}


if __name__ == "__main__":
    run_stage("extract", main)
