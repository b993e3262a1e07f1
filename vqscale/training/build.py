"""Networks from the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vqscale.config.prior import spans
from vqscale.config.recipe import Prior, Recipe, Tokenizer
from vqscale.config.tokenizer import Level, grid_sides
from vqscale.models.aggregated import Aggregated
from vqscale.models.codebooks import GradientCodebook, UnitCodebook, UnitGradientCodebook
from vqscale.models.convnets import Widths
from vqscale.models.density import Normal
from vqscale.models.maf import MAF
from vqscale.models.masked import Masked
from vqscale.models.network import GridShape, Network
from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.prior import Prior as PriorNetwork
from vqscale.models.quantizer import Codebook
from vqscale.models.realnvp import RealNVP
from vqscale.models.recurrent import Recurrent
from vqscale.models.transformer import Transformer
from vqscale.models.uniform import Uniform
from vqscale.models.vqvae import VQVAE, LevelShape

NETWORKS: Mapping[str, Callable[..., Network]] = {
    "transformer": Transformer,
    "pixelcnn": PixelCNN,
    "recurrent": Recurrent,
    "masked": Masked,
    "uniform": Uniform,
    "normal": Normal,
    "realnvp": RealNVP,
    "maf": MAF,
    "aggregated": Aggregated,
}
"""The network of each kind (`prior.networks.N.kind`). It takes its grids, the number of classes, the given levels,
and the settings of its section by their names."""


def build_tokenizer(settings: Tokenizer) -> VQVAE:
    """The tokenizer with fresh weights from torch's generator."""
    return VQVAE(
        [_codebook(settings, level) for level in settings.levels],
        [_shape(settings, level) for level in settings.levels],
    )


def _codebook(settings: Tokenizer, level: Level) -> Codebook:
    quantizer = settings.quantizer
    unit = quantizer.distance == "cosine"
    options: dict[str, Any] = {
        "decay": quantizer.decay,
        "restart_below": quantizer.restart_below if quantizer.restarts else 0.0,
        "max_restarts": quantizer.max_restarts,
    }
    size, dim = level.codes, level.project or level.dim
    if quantizer.learning == "gradient":
        kind = UnitGradientCodebook if unit else GradientCodebook
        return kind(size, dim, betas=settings.training.betas, **options)
    return (UnitCodebook if unit else Codebook)(size, dim, **options)


def _shape(settings: Tokenizer, level: Level) -> LevelShape:
    widths = Widths(
        level.hidden or settings.hidden,
        level.residual_blocks or settings.residual_blocks,
        level.residual_hidden or settings.residual_hidden,
    )
    return LevelShape(
        level.downsample,
        widths,
        dim=level.dim if level.project else None,
        unit=settings.quantizer.distance == "cosine",
    )


def build_prior(settings: Prior, grids: Sequence[GridShape], classes: int) -> PriorNetwork:
    """The prior with fresh weights; `grids` from the coarsest level to the finest."""
    networks: list[Network] = []
    done = 0
    for section, levels in zip(settings.networks, spans(settings.networks, len(grids)), strict=True):
        each = levels if section.joint else 1
        for first in range(done, done + levels, each):
            build = NETWORKS[section.kind]
            networks.append(build(grids[first : first + each], classes, grids[:first], **section.sizes))
        done += levels
    return PriorNetwork(networks, settings.label_smoothing)


def grid_shapes(recipe: Recipe) -> list[GridShape]:
    """The recipe's code grids as the prior orders them, the coarsest level first."""
    return shapes_of(recipe.tokenizer, recipe.data.image_size)


def shapes_of(settings: Tokenizer, image_size: int) -> list[GridShape]:
    """A tokenizer's code grids of images of so many pixels a side, the coarsest level first."""
    sides = grid_sides(settings.levels, image_size)
    return [GridShape(side, level.codes) for side, level in zip(sides, settings.levels, strict=True)][::-1]
