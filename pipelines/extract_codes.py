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
from vqscale.data.bad import BadCount, check_budget
from vqscale.data.code_records import (
    CodeRecord,
    Views,
    manifest_from_records,
    read_record,
    read_records,
    write_record,
)
from vqscale.data.crops import Crops
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import MANIFEST, write_manifest
from vqscale.events import EventLog
from vqscale.extraction import DIFFERENCES, Extraction
from vqscale.files import clear_beside
from vqscale.loading import TrainedTokenizer, load_tokenizer
from vqscale.models.quantizer import usage_figures
from vqscale.quarantine import Quarantine

SPLITS = ("train", "validation")


def main(stage: Stage) -> dict[str, Any]:
    """Encode this rank's share of the training and the held-out images with the run's tokenizer."""
    tokenizer = load_tokenizer(stage.layout.root, stage.ranks.device)
    sources = {split: image_source(stage, split, crops_of(stage, split)) for split in SPLITS}
    require_room(stage.recipe, sources["train"].shards)
    events = stage.events("images/s", len(stage.share(len(sources["train"].manifest.shards))))
    for split, source in sources.items():
        extract_split(stage, tokenizer, source, split, events if split == "train" else None)
    if events:
        events.close()
    figures: dict[str, Any] = {"fingerprint": tokenizer.fingerprint}
    if tokenizer.bf16 and stage.ranks.first and not stage.layout.task:
        figures |= extraction(stage, tokenizer, "validation").difference_from_fp32(sources["validation"])
    return figures


def finish(stage: Stage, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the manifests from the records of all shards; the figures of the whole extraction.

    Raises:
        UserError: more bad images than the recipe's error budget, or a shard that is not finished.
    """
    # Task 0 has compared precisions.
    figures = {key: parts[0][key] for key in ("fingerprint", *DIFFERENCES) if key in parts[0]}
    for split in SPLITS:
        records = finish_split(stage, image_source(stage, split), split, figures["fingerprint"])
        figures |= {
            f"{split}_samples": sum(record.shard.samples for record in records),
            f"{split}_skipped": sum(record.skipped for record in records),
        }
        if split == "train":
            levels = [level.name for level in stage.recipe.levels if level.codes]
            used = {name: [record.usage[name] for record in records] for name in levels}
            figures |= usage_figures({name: torch.tensor(counts).sum(dim=0) for name, counts in used.items()})
    return figures


def extract_split(
    stage: Stage, tokenizer: TrainedTokenizer, source: ImageSource, split: str, events: EventLog | None
) -> None:
    """Write this rank's code shards and their records."""
    folder, how = str(stage.layout.codes(split)), extraction(stage, tokenizer, split)
    names, mine, views = source.shards.flat_names, stage.share(len(source.manifest.shards)), how.views
    count = BadCount(stage.recipe.data.error_budget, stage.ranks.world)
    missing = [shard for shard in mine if not read_record(folder, names[shard], tokenizer.fingerprint, views)]
    _clear(folder, [names[shard] for shard in mine])
    done = len(mine) - len(missing)
    if events and done:
        events.log(done)
    for number, record in enumerate(how.shards(source, missing, folder, count)):
        write_record(folder, record)
        if events:
            events.log(done + number + 1)
    # From the records: those of an earlier attempt are counted too.
    records = read_records(folder, [names[shard] for shard in mine], tokenizer.fingerprint, views)
    bad = _bad(source, mine, records)
    read = sum(source.manifest.counts[shard] for shard in mine)
    stage.judge(Counter(kind for _, _, kind in bad), read, bad)


def finish_split(stage: Stage, source: ImageSource, split: str, fingerprint: str) -> list[CodeRecord]:
    """Judge the bad images of all tasks together, and write the manifest; returns the records of all shards."""
    folder, views = str(stage.layout.codes(split)), views_of(stage, split)
    records = read_records(folder, source.shards.flat_names, fingerprint, views)
    bad = _bad(source, range(len(records)), records)
    Quarantine(stage.layout.whole.quarantine(stage.name)).add(bad)
    check_budget(Counter(kind for _, _, kind in bad), sum(source.manifest.counts), stage.recipe.data.error_budget)
    if stage.tasks == 1:  # another task may be writing it now
        _clear(folder, [MANIFEST])
    finished = manifest_from_records(
        records,
        levels=stage.recipe.levels,
        classes=source.manifest.classes,
        image_size=stage.recipe.data.image_size,
        fingerprint=fingerprint,
        source={"images": source.shards.spec, **views._asdict()},
    )
    write_manifest(folder, finished)
    return records


def _bad(source: ImageSource, shards: Sequence[int], records: Sequence[CodeRecord]) -> list[tuple[str, str, str]]:
    """(shard, key, kind) of the bad images, as a quarantine list has them."""
    each = zip(shards, records, strict=True)
    return [(source.name(shard), key, kind) for shard, record in each for key, kind in record.bad]


def _clear(folder: str, names: Sequence[str]) -> None:
    """Remove what a killed attempt left half-written."""
    place = storage.local_path(folder)
    if place is not None:
        for name in names:
            clear_beside(place / name)


def extraction(stage: Stage, tokenizer: TrainedTokenizer, split: str) -> Extraction:
    """How the recipe wants a split extracted; held-out images count once."""
    wanted, data = stage.recipe.extract, stage.recipe.data
    return Extraction(tokenizer, stage.recipe.levels, wanted.batch, wanted.block, data.threads, views_of(stage, split))


def crops_of(stage: Stage, split: str) -> Crops | None:
    """The squares that the recipe wants cut from the images of a split; None for the centre square alone."""
    count = stage.recipe.extract.crops
    return Crops(count, stage.recipe.seed) if count > 1 and split == "train" else None


def views_of(stage: Stage, split: str) -> Views:
    """What of each image of a split has codes."""
    crops = crops_of(stage, split)
    return Views(stage.recipe.extract.flips and split == "train", *((crops.count, crops.seed) if crops else ()))


if __name__ == "__main__":
    run_stage("extract", main, finish)
