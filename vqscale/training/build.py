"""Networks from the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vqscale.config.pixels import Pixels
from vqscale.config.prior import spans
from vqscale.config.recipe import Prior
from vqscale.config.tokenizer_base import HierarchySection, LevelSection
from vqscale.config.tokenizer_kinds import Tokenizer
from vqscale.config.vae import GaussianVAE
from vqscale.config.vqvae2 import VQVAE2, Level
from vqscale.data.manifest import CodeLevel
from vqscale.models.aggregated import Aggregated
from vqscale.models.autoregressive import AutoregressivePixels
from vqscale.models.blockwise import Blockwise
from vqscale.models.codebooks import GradientCodebook, UnitCodebook, UnitGradientCodebook
from vqscale.models.convnets import Widths
from vqscale.models.density import Normal
from vqscale.models.dequantized import Dequantized
from vqscale.models.iaf import IAF
from vqscale.models.maf import MAF
from vqscale.models.masked import Masked
from vqscale.models.network import GridShape, Network
from vqscale.models.pixel_distributions import GaussianPixels, MixturePixels, PixelDistribution
from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.prior import Prior as PriorNetwork
from vqscale.models.quantizer import Codebook
from vqscale.models.raw_pixels import RawPixels
from vqscale.models.realnvp import RealNVP
from vqscale.models.recurrent import Recurrent
from vqscale.models.tokenizer import ImageTokenizer
from vqscale.models.transformer import Transformer
from vqscale.models.uniform import Uniform
from vqscale.models.vae import VAE, GaussianLevel
from vqscale.models.vqvae import VQVAE, LevelShape

NETWORKS: Mapping[str, Callable[..., Network]] = {
    "transformer": Transformer,
    "pixelcnn": PixelCNN,
    "recurrent": Recurrent,
    "masked": Masked,
    "blockwise": Blockwise,
    "uniform": Uniform,
    "dequantized": Dequantized,
    "normal": Normal,
    "realnvp": RealNVP,
    "maf": MAF,
    "iaf": IAF,
    "aggregated": Aggregated,
}
"""The network of each kind (`prior.networks.N.kind`). It takes its grids, the number of classes, the given levels,
and the settings of its section by their names."""


def build_tokenizer(settings: Tokenizer) -> ImageTokenizer:
    """The tokenizer with fresh weights from torch's generator."""
    return TOKENIZERS[settings.kind](settings)


def _vqvae(settings: VQVAE2) -> VQVAE:
    return VQVAE(
        [_codebook(settings, level) for level in settings.levels],
        [_shape(settings, level) for level in settings.levels],
    )


def _pixels(settings: Pixels) -> RawPixels:
    return RawPixels(grey=settings.channels == "grey")


def _vae(settings: GaussianVAE) -> VAE:
    levels = [GaussianLevel(level.channels, level.downsample, _widths(settings, level)) for level in settings.levels]
    likelihood = settings.likelihood
    return VAE(levels, PIXELS[likelihood.kind](**likelihood.model_dump(exclude={"kind"})))


PIXELS: Mapping[str, Callable[..., PixelDistribution]] = {
    "gaussian": GaussianPixels,
    "mixture": MixturePixels,
    "autoregressive": AutoregressivePixels,
}
"""The distribution of pixels of each kind (`tokenizer.likelihood.kind`); it takes the settings by their names."""

TOKENIZERS: Mapping[str, Callable[[Any], ImageTokenizer]] = {"vqvae2": _vqvae, "vae": _vae, "pixels": _pixels}
"""Makes the network of each kind of tokenizer (`tokenizer.kind`) from its section."""


def _codebook(settings: VQVAE2, level: Level) -> Codebook:
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


def _shape(settings: VQVAE2, level: Level) -> LevelShape:
    return LevelShape(
        level.downsample,
        _widths(settings, level),
        dim=level.dim if level.project else None,
        unit=settings.quantizer.distance == "cosine",
    )


def _widths(settings: HierarchySection, level: LevelSection) -> Widths:
    return Widths(
        level.hidden or settings.hidden,
        level.residual_blocks or settings.residual_blocks,
        level.residual_hidden or settings.residual_hidden,
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
    return PriorNetwork(networks, settings.label_smoothing, bf16=settings.training.precision == "bf16")


def grid_shapes(levels: Sequence[CodeLevel]) -> list[GridShape]:
    """A tokenizer's levels (the finest first) as the prior orders them, the coarsest first."""
    return [GridShape(level.grid, level.codes, level.channels) for level in levels][::-1]
