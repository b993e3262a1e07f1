"""Stage `tokenizer`: image shards to a trained tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines.sources import image_source
from pipelines.stage import Stage, run_stage
from pipelines.training import train_stage
from vqscale.training.tasks import tokenizer_task

FIXED_IMAGES = 16


def main(stage: Stage) -> dict[str, Any]:
    """Train the tokenizer; goes on from the newest checkpoint of the run."""
    recipe = stage.recipe
    source, held_out = image_source(stage, "train"), image_source(stage, "validation")

    def read_held_out() -> Iterator[np.ndarray]:
        for batch in stage.read_once(held_out, held_out.shards.counts):
            yield batch.fields["image"]

    torch.manual_seed(recipe.seed)
    fixed = next(held_out.read_shard(0, FIXED_IMAGES, []))[0]["image"]
    task = tokenizer_task(recipe, stage.ranks, read_held_out, fixed)
    return train_stage(stage, task, source, source.shards.counts, recipe.tokenizer.training, "images/s")


if __name__ == "__main__":
    run_stage("tokenizer", main)
