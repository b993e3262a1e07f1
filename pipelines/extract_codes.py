"""Stage `extract`: image shards to code shards, one for one.

Images are decoded in threads ahead of the tokenizer. Each code shard is written beside, renamed and recorded; a shard
that is recorded is skipped. Killed and started again at any time, the stage finishes with every sample exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.sources import image_source
from pipelines.stage import Stage, run_stage
from vqscale import storage
from vqscale.data.ahead import ShardPart, read_ahead
from vqscale.data.bad import BadCount, BadPick
from vqscale.data.code_records import CodeRecord, manifest_from_records, read_record, read_records, write_record
from vqscale.data.codes import CodeBlock, write_code_shard
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import CodeLevel, Manifest, read_manifest, write_manifest
from vqscale.data.order import evaluation_shards
from vqscale.events import EventLog
from vqscale.export import TrainedTokenizer, load_tokenizer
from vqscale.models.quantizer import usage_figures

FLIPPED = "~flip"
"""End of the key of a mirrored sample."""

_COMPARED = 256  # images whose codes are compared with those of fp32


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
    if tokenizer.bf16 and stage.ranks.first:
        figures["codes_differ_from_fp32"] = difference_from_fp32(stage, tokenizer, sources["validation"])
    return figures


def evaluation_shards_of(manifest: Manifest, stage: Stage) -> range:
    """This rank's shards."""
    return evaluation_shards(len(manifest.shards), stage.ranks.rank, stage.ranks.world)


def extract_split(
    stage: Stage, tokenizer: TrainedTokenizer, source: ImageSource, split: str, events: EventLog | None
) -> dict[str, torch.Tensor]:
    """Write this rank's code shards, then (rank 0) the manifest; returns the use of the codes over the whole split."""
    folder, flips = str(stage.layout.codes(split)), _flips(stage, split)
    names, mine = source.shards.flat_names, evaluation_shards_of(source.manifest, stage)
    missing = [shard for shard in mine if not read_record(folder, names[shard], tokenizer.fingerprint, flips=flips)]
    for number, record in enumerate(extract_shards(stage, tokenizer, source, missing, split)):
        write_record(folder, record)
        if events:
            events.log(len(mine) - len(missing) + number + 1)
    stage.ranks.barrier()
    records = read_records(folder, names, tokenizer.fingerprint, flips=flips)
    # From the records: those of an earlier attempt are counted too.
    bad = [(source.name(shard), key, kind) for shard in mine for key, kind in records[shard].bad]
    read = sum(source.manifest.counts[shard] for shard in mine)
    stage.judge(Counter(kind for _, _, kind in bad), read, bad)
    if stage.ranks.first:
        finished = manifest_from_records(
            records,
            levels=code_levels(stage),
            classes=source.manifest.classes,
            image_size=stage.recipe.data.image_size,
            fingerprint=tokenizer.fingerprint,
            source={"images": source.shards.spec, "flips": flips},
        )
        write_manifest(folder, finished)
    stage.ranks.barrier()
    return {name: torch.tensor([record.usage[name] for record in records]).sum(dim=0) for name in tokenizer.levels}


def code_levels(stage: Stage) -> list[CodeLevel]:
    """The levels of the recipe's code grids."""
    levels = zip(stage.recipe.grids, stage.recipe.tokenizer.levels, strict=True)
    return [CodeLevel(name=level.name, grid=side, codes=level.codes) for side, level in levels]


def extract_shards(
    stage: Stage, tokenizer: TrainedTokenizer, source: ImageSource, shards: Sequence[int], split: str
) -> Iterator[CodeRecord]:
    """Write code shards one after the other, and give each one's record; bad images are left out.

    Raises:
        UserError: more bad images than the recipe's error budget.
    """
    data, count = stage.recipe.data, BadCount(stage.recipe.data.error_budget, stage.ranks.world)
    parts = read_ahead(source, source.manifest.counts, shards, batch=stage.recipe.extract.batch, threads=data.threads)
    for shard, found in groupby(parts, key=lambda part: part.shard):
        yield _extract_shard(stage, tokenizer, source.shards.flat_names[shard], found, split, count)


def _extract_shard(
    stage: Stage, tokenizer: TrainedTokenizer, name: str, parts: Iterable[ShardPart], split: str, count: BadCount
) -> CodeRecord:
    """Write one code shard."""
    bad: list[BadPick] = []
    levels, flips = code_levels(stage), _flips(stage, split)
    usage = {level.name: np.zeros(level.codes, np.int64) for level in levels}

    def encoded() -> Iterator[CodeBlock]:
        for part in parts:
            bad.extend(part.bad)
            count.add(part.read, part.bad)
            block = _encode_part(tokenizer, part, stage.recipe.extract.batch, flips)
            for level, codes in block.codes.items():
                usage[level] += np.bincount(codes.ravel(), minlength=len(usage[level]))
            yield block

    where = storage.join(str(stage.layout.codes(split)), name)
    blocks = _recut(encoded(), stage.recipe.extract.block)
    return CodeRecord(
        shard=write_code_shard(where, blocks, levels, tokenizer.fingerprint),
        fingerprint=tokenizer.fingerprint,
        flips=flips,
        skipped=len(bad),
        bad=tuple((pick.key, pick.kind) for pick in bad),
        usage={name: counts.tolist() for name, counts in usage.items()},
    )


def _encode_part(tokenizer: TrainedTokenizer, part: ShardPart, batch: int, flips: bool) -> CodeBlock:
    """Codes of the images of a part; with `flips` each image is followed by its mirror image."""
    images, labels, keys = part.fields["image"], part.fields["label"], part.keys
    if flips:
        images = np.stack([images, images[:, :, ::-1]], axis=1).reshape(-1, *images.shape[1:])
        labels, keys = labels.repeat(2), [name for key in keys for name in (key, f"{key}{FLIPPED}")]
    return CodeBlock(_encode(tokenizer, images, batch), labels, keys)


def _encode(tokenizer: TrainedTokenizer, images: NDArray[np.uint8], batch: int) -> dict[str, NDArray[np.uint16]]:
    parts = [tokenizer.encode(images[start : start + batch]) for start in range(0, len(images), batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in tokenizer.levels} if parts else {}


def _recut(blocks: Iterable[CodeBlock], size: int) -> Iterator[CodeBlock]:
    """The same samples in blocks of `size`; the last one may have fewer."""
    held: list[CodeBlock] = []
    for block in blocks:
        if block.keys:
            held.append(block)
        while sum(len(one.keys) for one in held) >= size:
            whole = _joined(held)
            yield _part_of(whole, 0, size)
            held = [_part_of(whole, size, len(whole.keys))] if len(whole.keys) > size else []
    if held:
        yield _joined(held)


def _joined(blocks: Sequence[CodeBlock]) -> CodeBlock:
    codes = {name: np.concatenate([block.codes[name] for block in blocks]) for name in blocks[0].codes}
    labels = np.concatenate([block.labels for block in blocks])
    return CodeBlock(codes, labels, [key for block in blocks for key in block.keys])


def _part_of(block: CodeBlock, start: int, stop: int) -> CodeBlock:
    codes = {name: grids[start:stop] for name, grids in block.codes.items()}
    return CodeBlock(codes, block.labels[start:stop], block.keys[start:stop])


def _flips(stage: Stage, split: str) -> bool:
    """Whether mirrored images are extracted too; held-out images are counted once."""
    return stage.recipe.extract.flips and split == "train"


def difference_from_fp32(stage: Stage, tokenizer: TrainedTokenizer, source: ImageSource) -> float:
    """Share of the codes of some images that would be others if the networks ran in fp32."""
    shards = range(len(source.manifest.shards))
    parts = read_ahead(source, source.manifest.counts, shards, batch=_COMPARED, threads=stage.recipe.data.threads)
    held: list[NDArray[np.uint8]] = []
    for part in parts:
        held.append(part.fields["image"])
        if sum(map(len, held)) >= _COMPARED:
            break
    images = np.concatenate(held)[:_COMPARED]
    batch, exact = stage.recipe.extract.batch, replace(tokenizer, bf16=False)
    ours, theirs = (_encode(one, images, batch) for one in (tokenizer, exact))
    differing = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    return differing / sum(grid.size for grid in ours.values())


if __name__ == "__main__":
    run_stage("extract", main)
