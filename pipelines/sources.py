"""The shards that a stage reads, opened as the recipe says."""

from __future__ import annotations

from pipelines.stage import Stage
from vqscale.data.code_source import CodeSource
from vqscale.data.crops import Crops
from vqscale.data.image_source import Decoder, ImageSource
from vqscale.data.images import decode_each
from vqscale.data.shards import open_shards
from vqscale.storage.access import Access
from vqscale.storage.cache import ShardCache
from vqscale.storage.faulty import FaultyStore
from vqscale.storage.store import Store


def image_source(stage: Stage, split: str, crops: Crops | None = None) -> ImageSource:
    """The images of a split, `train` or `validation`, at the recipe's size; several squares of each with `crops`."""
    data = stage.recipe.data
    shards = open_shards(stage.layout.shards(stage.recipe, split))
    return ImageSource(shards, data.image_size, store_of(stage), _decoder(stage), crops)


def code_source(stage: Stage, split: str) -> CodeSource:
    """The codes of a split: those that the recipe names, or those that the run's extraction wrote."""
    return CodeSource(open_shards(stage.layout.code_shards(stage.recipe, split)), store_of(stage))


def store_of(stage: Stage) -> Store:
    """Opens shards with the recipe's limits and cache; with faults where some were asked for."""
    remote = stage.recipe.data.remote
    access = Access(
        timeout_s=remote.timeout_s,
        retries=remote.retries,
        block=int(remote.block_mb * 2**20),
        connections=remote.connections,
    )
    cache = ShardCache(remote.cache, int(remote.cache_gb * 2**30)) if remote.cache else None
    if stage.faults:
        return FaultyStore(stage.faults, access=access, cache=cache)
    return Store(access, cache)


def _decoder(stage: Stage) -> Decoder:
    if stage.recipe.data.decoder == "cpu":
        return decode_each
    from vqscale.training.gpu_decode import GpuDecoder

    return GpuDecoder(stage.ranks.device)
