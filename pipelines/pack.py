"""Stage `pack`: generated images into lossless shards, each rank its share of the shards."""

from __future__ import annotations

import time
from typing import Any

from pipelines.stage import Stage, run_stage
from vqscale import storage
from vqscale.data import clocks
from vqscale.data.manifest import MANIFEST, read_manifest
from vqscale.data.pack import PackPlan, finish, plan_pack, write_shard
from vqscale.data.scan import scan
from vqscale.data.shards import check_shards, open_shards
from vqscale.errors import UserError
from vqscale.events import EventLog

SPLITS = ("train", "validation")


def main(stage: Stage) -> dict[str, Any]:
    """Pack the generated images of a run; a split whose manifest is there is finished."""
    if stage.recipe.data.clocks is None:
        raise UserError("the recipe names shards and packs nothing", where="data.clocks")
    plans = {split: plan_split(stage, split) for split in SPLITS}
    events = stage.events("images/s", sum(len(plan.order) for plan in plans.values()))
    began, before = time.time(), 0
    for plan in plans.values():
        # Rank 0 decides for all, so that no rank skips what another one packs.
        finished = any(stage.ranks.gather(stage.ranks.first and is_packed(plan)))
        if not finished:
            pack_split(stage, plan, events, began, before)
        before += len(plan.order)
        if events:
            events.log(before, rate=None)
    if events:
        events.close()
    stage.ranks.barrier()
    return {f"{split}_samples": read_manifest(plan.dest).samples for split, plan in plans.items()}


def plan_split(stage: Stage, split: str) -> PackPlan:
    """The plan of a split; the same on every rank."""
    recipe = stage.recipe
    assert recipe.data.clocks is not None
    return plan_pack(
        scan(stage.layout.images(split), clocks.CLASSES),
        str(stage.layout.shards(recipe, split)),
        size=recipe.data.image_size,
        format="png",
        shards=recipe.data.clocks.shards if split == "train" else None,
        seed=recipe.seed,
        origin="clocks",
    )


def is_packed(plan: PackPlan) -> bool:
    """Whether the split is finished; what an unfinished attempt or a lost file left is written again."""
    if storage.size(storage.join(plan.dest, MANIFEST)) is None:
        return False
    try:
        check_shards(open_shards(plan.dest))
    except UserError as error:
        print(f"packing again: {error}", flush=True)
        return False
    return True


def pack_split(stage: Stage, plan: PackPlan, events: EventLog | None, began: float, before: int) -> None:
    """Write this rank's shards; rank 0 then writes the manifest."""
    ranks = stage.ranks
    mine, done = {}, before
    for number in range(ranks.rank, plan.shards, ranks.world):
        mine[number] = write_shard(plan, number)
        done += mine[number].shard.samples * ranks.world
        if events:
            events.log(min(done, before + len(plan.order)), rate=done / (time.time() - began))
    everyone = {number: shard for part in ranks.gather(mine) for number, shard in part.items()}
    if ranks.first:
        finish(plan, [everyone[number] for number in range(plan.shards)])


if __name__ == "__main__":
    run_stage("pack", main)
