"""Stage `prior`: code shards to a trained transformer over the codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pipelines.stage import Stage, run_stage
from pipelines.training import train_stage
from vqscale.data.codes import CodeSource
from vqscale.data.manifest import read_manifest
from vqscale.errors import UserError
from vqscale.export import load_tokenizer
from vqscale.sampling import preview
from vqscale.training.build import build_prior, grid_shapes
from vqscale.training.engine import Engine
from vqscale.training.prior_task import CodeFields, PriorTask


def main(stage: Stage) -> dict[str, Any]:
    """Train the prior; goes on from the newest checkpoint of the run."""
    recipe, ranks, layout = stage.recipe, stage.ranks, stage.layout
    train_url, held_out_url = str(layout.codes("train")), str(layout.codes("validation"))
    manifest, held_out = read_manifest(train_url), read_manifest(held_out_url)
    tokenizer = load_tokenizer(layout.root, ranks.device)
    for url, codes in ((train_url, manifest), (held_out_url, held_out)):
        if codes.fingerprint != tokenizer.fingerprint:
            raise UserError(
                "these codes were made by another tokenizer", where=url, mend="run the stage 'extract' again"
            )
    held_out_source = CodeSource(held_out_url, held_out)

    def read_held_out() -> Iterator[CodeFields]:
        for batch in stage.read_once(held_out_source, held_out.counts):
            yield batch.fields

    torch.manual_seed(recipe.seed)
    network = build_prior(recipe.prior, grid_shapes(recipe), len(manifest.classes))
    engine = Engine(network, recipe.prior.training, ranks, recipe.resources.strategy)
    levels = [level.name for level in recipe.tokenizer.levels][::-1]
    task = PriorTask(
        engine,
        recipe.prior,
        levels,
        recipe.seed,
        read_held_out,
        lambda prior: preview(prior, tokenizer, recipe.sample),
    )
    return train_stage(
        stage, task, CodeSource(train_url, manifest), manifest.counts, recipe.prior.training, "samples/s"
    )


if __name__ == "__main__":
    run_stage("prior", main)
