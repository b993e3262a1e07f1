"""The tokenizer of kind `vqvae2`: levels, codebooks, losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vqscale.config.section import Fraction, Places, Positive, Section
from vqscale.config.tokenizer_base import HierarchySection, LevelSection
from vqscale.data.manifest import CodeLevel


class Level(LevelSection):
    """One level of the hierarchy."""

    codes: Annotated[int, Field(ge=2, le=65_536)] = 512
    """Codebook size K."""
    dim: Positive = 64
    """Dimension D of a code vector."""
    project: Positive | None = None
    """Codes have so many dimensions only, fewer than `dim`: latents are mapped down to them before the search, codes up
    to `dim` after it (ViT-VQGAN, Yu et al. 2022)."""

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


class VQVAE2(HierarchySection):
    """VQ-VAE-2 (Razavi, van den Oord, Vinyals 2019)."""

    title: ClassVar[str] = "A hierarchical VQ-VAE"
    tags: ClassVar[tuple[str, ...]] = ("vq-vae-2",)
    kind: Literal["vqvae2"] = "vqvae2"
    """VQ-VAE-2; the kind that is meant where none is given."""
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=4)]
    """From the image upwards: the first is the finest (bottom), the last the coarsest (top)."""
    quantizer: Quantizer = Quantizer()
    """The codebooks of all levels."""
    losses: Losses = Losses()
    """What the reconstructions are judged by."""

    def levels_of(self, image_size: int) -> tuple[CodeLevel, ...]:
        """The code grids of images of so many pixels a side, the finest level first."""
        levels = zip(self.levels, self.sides(image_size), strict=True)
        return tuple(CodeLevel(name=level.name, grid=side, codes=level.codes) for level, side in levels)

    def check_images(self, image_size: int) -> None:
        """Whether the losses see the images, too; as `TokenizerSection.check_images`."""
        super().check_images(image_size)
        terms = {"adversarial": self.losses.adversarial, "perceptual": self.losses.perceptual}
        for name, term in terms.items():
            if term and image_size < term.smallest_image:
                mend = "use fewer layers" if name == "adversarial" else "leave it out"
                raise ValueError(
                    f"tokenizer.losses.{name} needs images of {term.smallest_image} pixels, data.image_size is "
                    f"{image_size}; {mend}"
                )

    @property
    def weights(self) -> Mapping[str, tuple[str, ...]]:
        """The files of the perceptual term."""
        perceptual = self.losses.perceptual
        return {"tokenizer.losses.perceptual.weights": perceptual.paths} if perceptual else {}

    def relocated(self, place: Callable[[Places], Places]) -> Self:
        """The same with other names of the files of the perceptual term."""
        perceptual = self.losses.perceptual
        if not perceptual:
            return self
        moved = perceptual.model_copy(update={"weights": place(perceptual.weights)})
        return self.model_copy(update={"losses": self.losses.model_copy(update={"perceptual": moved})})

    @model_validator(mode="after")
    def _quantizes_at_last(self) -> Self:
        early, steps = self.quantizer.continuous_steps, self.training.steps
        if early >= steps:
            raise ValueError(f"quantizer.continuous_steps {early} leave none of training.steps {steps}; use fewer")
        adversarial = self.losses.adversarial
        if adversarial and adversarial.start >= steps:
            raise ValueError(
                f"losses.adversarial.start {adversarial.start} leaves none of training.steps {steps}; start earlier"
            )
        return self
