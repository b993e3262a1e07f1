"""The tokenizer of kind `vae`: Gaussian latents, the bound that is trained on, and the distribution of pixels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from vqscale.config.section import Positive, Section, kind_or
from vqscale.config.tokenizer_base import HierarchySection, LevelSection
from vqscale.data.manifest import CodeLevel


class LatentLevel(LevelSection):
    """One level of Gaussian latents."""

    channels: Positive = 4
    """Channels C of the latents."""


class GaussianLikelihood(Section):
    """Every value of every pixel by itself, from a normal distribution that is cut into the 256 grey levels."""

    kind: Literal["gaussian"] = "gaussian"
    """Normal; the kind that is meant where none is given."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Its standard deviation in grey levels; left out, one a colour is learned."""


class MixtureLikelihood(Section):
    """A discretised mixture of logistic distributions for each pixel (PixelCNN++, Salimans et al. 2017)."""

    kind: Literal["mixture"]
    """Mixture of logistic distributions."""
    components: Positive = 5
    """Of the mixture."""


class AutoregressiveLikelihood(Section):
    """A gated PixelCNN over the pixels, which the decoder tells what it knows (PixelVAE, Gulrajani et al. 2017)."""

    kind: Literal["autoregressive"]
    """Autoregressive. Images are drawn from it pixel by pixel."""
    components: Positive = 5
    """Of the mixture of logistic distributions of each pixel."""
    layers: Positive = 4
    """Gated layers. A pixel sees half a kernel further with each."""
    width: Positive = 32
    """Channels of these layers, and of what the decoder tells them."""
    kernel: Literal[3, 5, 7] = 3
    """Side of their kernels, half of which is cut away."""


Likelihood = Annotated[
    Annotated[GaussianLikelihood, Tag("gaussian")]
    | Annotated[MixtureLikelihood, Tag("mixture")]
    | Annotated[AutoregressiveLikelihood, Tag("autoregressive")],
    Discriminator(kind_or("gaussian")),
]
"""Distribution of pixels given the decoder's outputs, by its `kind`."""


class GaussianVAE(HierarchySection):
    """Variational autoencoder (Kingma & Welling 2014) with the networks of the VQ-VAE-2.

    What is minimised are nats a dimension, so that gradients do not grow with the images. What a lower level is told of
    those above it are their means, so all levels are independent given the image.
    """

    title: ClassVar[str] = "A variational autoencoder with Gaussian latents"
    tags: ClassVar[tuple[str, ...]] = ("vae",)
    kind: Literal["vae"]
    """Variational autoencoder."""
    levels: Annotated[tuple[LatentLevel, ...], Field(min_length=1, max_length=4)]
    """From the image upwards: the first is the finest (bottom), the last the coarsest (top)."""
    likelihood: Likelihood = GaussianLikelihood()
    """Distribution of pixels given latents."""
    objective: Literal["elbo", "iwae"] = "elbo"
    """`elbo`: the likelihood less the divergence of the posterior from N(0, 1), which has a closed form. `iwae`: the
    importance-weighted bound (Burda et al. 2016), tighter with more `samples`."""
    samples: Positive = 1
    """Latents K that are drawn for each image: a mean over them for `elbo`, weighted by importance for `iwae`."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence (beta-VAE, Higgins et al. 2017). With another than 1, what is minimised is no bound;
    what is reported is one."""
    kl_warmup: Annotated[int, Field(ge=0)] = 0
    """Steps in which the weight of the divergence rises linearly from 0 (Bowman et al. 2016; Sønderby et al. 2016).
    With `iwae` it is the exponent of p(z) / q(z | x) in each weight: what is minimised until then is tempered and no
    bound, afterwards exactly the bound. What is reported is the bound at every step."""
    free_bits: Annotated[float, Field(ge=0)] = 0.0
    """Nats an image below which the divergence of a channel of a level is not lowered (Kingma et al. 2016, appendix C).
    Its mean is that of the global batch before, the same on all ranks."""

    @model_validator(mode="after")
    def _weights_are_importance(self) -> Self:
        if self.objective == "iwae" and (self.beta != 1 or self.free_bits):
            what = "beta" if self.beta != 1 else "free_bits"
            raise ValueError(
                f"objective iwae weights by importance, which {what} would bend; use elbo, or leave it out"
            )
        return self

    def levels_of(self, image_size: int) -> tuple[CodeLevel, ...]:
        """The latents of images of so many pixels a side, the finest level first."""
        levels = zip(self.levels, self.sides(image_size), strict=True)
        return tuple(CodeLevel(name=level.name, grid=side, channels=level.channels) for level, side in levels)
