"""Networks from the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from vqscale.config.recipe import Prior, Recipe, Tokenizer
from vqscale.models.quantizer import Codebook
from vqscale.models.transformer import GridShape, Transformer
from vqscale.models.vqvae import VQVAE, Widths


def build_tokenizer(settings: Tokenizer) -> VQVAE:
    """The tokenizer with fresh weights from torch's generator."""
    quantizer = settings.quantizer
    codebooks = [
        Codebook(
            level.codes,
            level.dim,
            decay=quantizer.decay,
            restart_below=quantizer.restart_below if quantizer.restarts else 0.0,
            max_restarts=quantizer.max_restarts,
        )
        for level in settings.levels
    ]
    widths = Widths(settings.hidden, settings.residual_blocks, settings.residual_hidden)
    return VQVAE(codebooks, [level.downsample for level in settings.levels], widths)


def build_prior(settings: Prior, grids: Sequence[GridShape], classes: int) -> Transformer:
    """The prior with fresh weights; `grids` from the coarsest level to the finest."""
    return Transformer(
        grids,
        classes,
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        dropout=settings.dropout,
    )


def grid_shapes(recipe: Recipe) -> list[GridShape]:
    """The recipe's code grids as the prior orders them, the coarsest level first."""
    levels = zip(recipe.grids, recipe.tokenizer.levels, strict=True)
    return [GridShape(side, level.codes) for side, level in levels][::-1]
