"""The shards that a stage reads, opened as the recipe says."""

from __future__ import annotations

from pipelines.stage import Stage
from vqscale.config.recipe import Data
from vqscale.data.codes import CodeSource
from vqscale.data.image_source import Decoder, ImageSource
from vqscale.data.images import decode_each
from vqscale.data.shards import open_shards
from vqscale.storage.access import Access
from vqscale.storage.cache import ShardCache
from vqscale.storage.store import Store


def image_source(stage: Stage, split: str) -> ImageSource:
    """The images of a split, `train` or `validation`, at the recipe's size."""
    data = stage.recipe.data
    shards = open_shards(stage.layout.shards(stage.recipe, split))
    return ImageSource(shards, data.image_size, store_of(data), _decoder(stage))


def code_source(stage: Stage, split: str) -> CodeSource:
    """The codes of a split that the run's extraction wrote."""
    return CodeSource(open_shards(str(stage.layout.codes(split))), store_of(stage.recipe.data))


def store_of(data: Data) -> Store:
    """Opens shards with the recipe's limits and cache."""
    remote = data.remote
    access = Access(
        timeout_s=remote.timeout_s,
        retries=remote.retries,
        block=int(remote.block_mb * 2**20),
        connections=remote.connections,
    )
    cache = ShardCache(remote.cache, int(remote.cache_gb * 2**30)) if remote.cache else None
    return Store(access, cache)


def _decoder(stage: Stage) -> Decoder:
    if stage.recipe.data.decoder == "cpu":
        return decode_each
    from vqscale.training.gpu_decode import GpuDecoder

    return GpuDecoder(stage.ranks.device)
