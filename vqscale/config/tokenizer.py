"""The parts of a recipe's tokenizer: levels, codebooks, losses."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vqscale.config.section import Fraction, Positive, Section


class Level(Section):
    """One level of the hierarchy."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name in reports and TensorBoard, such as `bottom` or `top`."""
    downsample: Literal[2, 4, 8, 16]
    """Factor between this level's grid and the level below it (for the first level: the image)."""
    codes: Annotated[int, Field(ge=2, le=65_536)] = 512
    """Codebook size K."""
    dim: Positive = 64
    """Dimension D of a code vector."""
    project: Positive | None = None
    """Codes have so many dimensions only, fewer than `dim`: latents are mapped down to them before the search, codes up
    to `dim` after it (ViT-VQGAN, Yu et al. 2022)."""
    hidden: Annotated[int, Field(ge=2)] | None = None
    """Channels of this level's convolutions, where they differ from `tokenizer.hidden`."""
    residual_blocks: Positive | None = None
    """Residual blocks, where they differ from `tokenizer.residual_blocks`."""
    residual_hidden: Positive | None = None
    """Channels inside a residual block, where they differ from `tokenizer.residual_hidden`."""

    @model_validator(mode="after")
    def _projects_down(self) -> Self:
        if self.project is not None and self.project >= self.dim:
            raise ValueError(f"project {self.project} is not below dim {self.dim}; leave it out, or use fewer")
        return self


class Quantizer(Section):
    """The codebooks of all levels (van den Oord et al. 2017; Razavi et al. 2019, section 2.1)."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """EMA decay of counts and sums, a step; less in the first hundred or so: min(decay, (1 + n) / (10 + n))."""
    commitment: Annotated[float, Field(ge=0)] = 0.25
    """Weight beta of the commitment loss."""
    learning: Literal["ema", "gradient"] = "ema"
    """Codes follow the EMA of their latents (2017, appendix A.1), or Adam moves them down the codebook loss (2017,
    equation 3), with the learning rate and the betas of the training."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """`cosine` brings latents and codes to length one (ViT-VQGAN, Yu et al. 2022)."""
    init: Literal["data", "kmeans", "random"] = "data"
    """First codes: latents of the first quantized batch, agreed across ranks; k-means centres of all its latents; or a
    normal distribution."""
    kmeans_iterations: Positive = 10
    """Iterations of Lloyd's algorithm for `init: kmeans`."""
    continuous_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the beginning in which the latents pass unquantized, so that the networks learn what to encode."""
    restarts: bool = True
    """Move dead codes onto latents of the current batch."""
    restart_below: Fraction = 0.05
    """A code is dead when its EMA count falls below this fraction of its expected use (vectors / codes)."""
    max_restarts: Positive = 16
    """At most so many codes of a level are restarted in one step."""
    relief_below: Fraction = 0.5
    """The commitment loss of a level whose perplexity in the batch before was below this share of its codes is weakened
    in proportion: it would hold the latents in the few clusters that they lie in. 0 never weakens it."""
    window: Positive = 100
    """Last steps over which usage, perplexity, restarts and distance of a level are reported."""
    collapse_below: Fraction = 0.1
    """A level whose perplexity, over the window or a batch, falls below this share of its codes is warned about."""


class Perceptual(Section):
    """The perceptual term: LPIPS with VGG16 (Zhang et al. 2018), mean over images."""

    weights: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """File or files with the weights (safetensors, or of `torch.save`): the convolutions of torchvision's `vgg16` and
    the linear layers of the package `lpips` (`vgg.pth`), or the whole state of its `LPIPS(net="vgg")`. Never
    downloaded."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the term."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The files of `weights`."""
        return (self.weights,) if isinstance(self.weights, str) else self.weights

    @property
    def smallest_image(self) -> int:
        """Side of the smallest image that VGG16's last stage, behind four poolings, sees anything of."""
        return 16


class Adversarial(Section):
    """The adversarial term: a discriminator of patches, trained with the hinge loss (VQGAN, Esser et al. 2021)."""

    start: Annotated[int, Field(ge=0)]
    """Step from which on there is a discriminator. VQGAN starts it when the reconstructions have become good."""
    weight: Annotated[float, Field(gt=0)] = 0.8
    """Weight of the term."""
    adaptive: bool = True
    """Multiply the weight by the ratio of the gradients of the other terms and of this one at the last layer."""
    width: Annotated[int, Field(ge=2)] = 64
    """Channels of the discriminator's first layer."""
    layers: Annotated[int, Field(ge=1, le=5)] = 3
    """Halvings in the discriminator; with three it judges patches of 70×70 pixels. Images need 3 · 2^layers pixels."""
    relative_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """The discriminator's learning rate as a multiple of the tokenizer's, at every step."""

    @property
    def smallest_image(self) -> int:
        """Side of the smallest image that the discriminator gives a logit for."""
        return int(3 * 2**self.layers)


class Losses(Section):
    """What the reconstructions are judged by; the commitment loss (`tokenizer.quantizer.commitment`) comes on top."""

    reconstruction: Literal["mse", "l1"] = "mse"
    """Mean squared or mean absolute difference of images in [-1, 1]."""
    reconstruction_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the reconstruction term. One over the images' variance makes it a normalised error."""
    perceptual: Perceptual | None = None
    """The perceptual term; left out, there is none."""
    adversarial: Adversarial | None = None
    """The adversarial term; left out, there is none."""


def grid_sides(levels: Sequence[Level], image_size: int) -> tuple[int, ...]:
    """Side of each level's code grid of images of so many pixels a side, the finest level first."""
    downsamplings = itertools.accumulate((level.downsample for level in levels), operator.mul)
    return tuple(image_size // total for total in downsamplings)
