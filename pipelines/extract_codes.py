"""Stage `extract`: image shards to code shards, one for one.

Images are decoded in threads ahead of the tokenizer. Each code shard is written beside, renamed and recorded; a shard
that is recorded is skipped. Killed and started again at any time, the stage finishes with every sample exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from pipelines.sources import image_source
from pipelines.stage import Stage, run_stage
from vqscale import storage
from vqscale.config.inputs import require_room
from vqscale.data.bad import BadCount
from vqscale.data.code_records import Views, manifest_from_records, read_record, read_records, write_record
from vqscale.data.crops import Crops
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import CodeLevel, Manifest, read_manifest, write_manifest
from vqscale.data.order import evaluation_shards
from vqscale.events import EventLog
from vqscale.export import TrainedTokenizer, load_tokenizer
from vqscale.extraction import Extraction
from vqscale.files import clear_beside
from vqscale.models.quantizer import usage_figures


def main(stage: Stage) -> dict[str, Any]:
    """Encode the training and the held-out images with the run's tokenizer."""
    tokenizer = load_tokenizer(stage.layout.root, stage.ranks.device)
    sources = {split: image_source(stage, split, crops_of(stage, split)) for split in ("train", "validation")}
    require_room(stage.recipe, sources["train"].shards)
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
        how = extraction(stage, tokenizer, "validation")
        figures["codes_differ_from_fp32"] = how.difference_from_fp32(sources["validation"])
    return figures


def evaluation_shards_of(manifest: Manifest, stage: Stage) -> range:
    """This rank's shards."""
    return evaluation_shards(len(manifest.shards), stage.ranks.rank, stage.ranks.world)


def _clear(folder: str, names: Sequence[str], first: bool) -> None:
    """Remove what a killed attempt left half-written: of this rank's shards, and on rank 0 of the manifest."""
    place = storage.local_path(folder)
    if place is not None:
        for name in (*names, *(["manifest.json"] if first else [])):
            clear_beside(place / name)


def extract_split(
    stage: Stage, tokenizer: TrainedTokenizer, source: ImageSource, split: str, events: EventLog | None
) -> dict[str, torch.Tensor]:
    """Write this rank's code shards, then (rank 0) the manifest; returns the use of the codes over the whole split."""
    folder, how = str(stage.layout.codes(split)), extraction(stage, tokenizer, split)
    names, mine, views = source.shards.flat_names, evaluation_shards_of(source.manifest, stage), how.views
    count = BadCount(stage.recipe.data.error_budget, stage.ranks.world)
    missing = [shard for shard in mine if not read_record(folder, names[shard], tokenizer.fingerprint, views)]
    _clear(folder, [names[shard] for shard in mine], stage.ranks.first)
    done = len(mine) - len(missing)
    if events and done:
        events.log(done)
    for number, record in enumerate(how.shards(source, missing, folder, count)):
        write_record(folder, record)
        if events:
            events.log(done + number + 1)
    stage.ranks.barrier()
    records = read_records(folder, names, tokenizer.fingerprint, views)
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
            source={"images": source.shards.spec, **views._asdict()},
        )
        write_manifest(folder, finished)
    stage.ranks.barrier()
    return {name: torch.tensor([record.usage[name] for record in records]).sum(dim=0) for name in tokenizer.levels}


def code_levels(stage: Stage) -> list[CodeLevel]:
    """The levels of the recipe's code grids."""
    levels = zip(stage.recipe.grids, stage.recipe.tokenizer.levels, strict=True)
    return [CodeLevel(name=level.name, grid=side, codes=level.codes) for side, level in levels]


def extraction(stage: Stage, tokenizer: TrainedTokenizer, split: str) -> Extraction:
    """How the recipe wants a split extracted; held-out images count once."""
    wanted, data = stage.recipe.extract, stage.recipe.data
    crops = crops_of(stage, split)
    views = Views(wanted.flips and split == "train", *((crops.count, crops.seed) if crops else ()))
    return Extraction(tokenizer, code_levels(stage), wanted.batch, wanted.block, data.threads, views)


def crops_of(stage: Stage, split: str) -> Crops | None:
    """The squares that the recipe wants cut from the images of a split; None for the centre square alone."""
    count = stage.recipe.extract.crops
    return Crops(count, stage.recipe.seed) if count > 1 and split == "train" else None


if __name__ == "__main__":
    run_stage("extract", main)
