"""Stage `prior`: code shards to a trained prior over the codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pipelines.sources import code_source
from pipelines.stage import Stage, run_stage
from pipelines.training import train_stage
from vqscale.checkpoint.manifest import CODES_OF
from vqscale.config.inputs import check_levels
from vqscale.data.code_source import CodeSource
from vqscale.errors import UserError
from vqscale.loading import load_tokenizer
from vqscale.sampling import preview
from vqscale.training.build import build_prior, grid_shapes
from vqscale.training.engine import Engine
from vqscale.training.exemplars import show_exemplars
from vqscale.training.prior_task import CodeFields, PriorTask
from vqscale.training.transfer import tensors

_BATCH = 256  # samples that are read at once before the training


def main(stage: Stage) -> dict[str, Any]:
    """Train the prior; goes on from the newest checkpoint of the run."""
    recipe, ranks, layout = stage.recipe, stage.ranks, stage.layout
    source, held_out = code_source(stage, "train"), code_source(stage, "validation")
    tokenizer = None if recipe.data.codes else load_tokenizer(layout.root, ranks.device)
    fingerprint = tokenizer.fingerprint if tokenizer else source.manifest.fingerprint
    for codes in (source, held_out):
        check_levels(recipe, codes.shards)
        if codes.manifest.fingerprint != fingerprint:
            raise UserError(
                "these codes were made by another tokenizer",
                where=codes.shards.spec,
                mend="run the stage 'extract' again" if tokenizer else "pull both splits from one run",
            )

    def read_held_out() -> Iterator[CodeFields]:
        for batch in stage.read_once(held_out, held_out.shards.counts):
            yield tensors(batch.fields, ranks.device)

    torch.manual_seed(recipe.seed)
    network = build_prior(recipe.prior, grid_shapes(recipe.levels), len(source.manifest.classes))
    levels = [level.name for level in recipe.levels][::-1]
    show_exemplars(network, _one_after_the_other(source), levels)
    engine = Engine(network, recipe.prior.training, ranks, stage.resources.strategy)
    task = PriorTask(
        engine,
        recipe.prior,
        levels,
        recipe.seed,
        read_held_out,
        (lambda prior: preview(prior, tokenizer, recipe.sample, source.manifest.classes)) if tokenizer else None,
    )
    training, origin = recipe.prior.training, {CODES_OF: fingerprint}
    return train_stage(stage, task, source, source.shards.counts, training, "images/s", origin)


def _one_after_the_other(source: CodeSource) -> Iterator[CodeFields]:
    """All samples of the shards in their order, in batches."""
    for shard in range(len(source.shards.counts)):
        for fields, _ in source.read_shard(shard, _BATCH):
            yield tensors(fields, torch.device("cpu"))


if __name__ == "__main__":
    run_stage("prior", main)
