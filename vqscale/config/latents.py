"""Settings of what the evaluation estimates of continuous latents."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from vqscale.config.section import Positive, Section


class ContinuousLatents(Section):
    """Estimates of log p(x) by many draws an image, and ELBO surgery. Codes, of which each image has one set, need
    none of it.

    An image costs `draws` decodings of latents from its posterior, and as many of latents drawn from the prior.
    """

    images: Annotated[int, Field(ge=0)] = 32
    """Held-out images, the first ones, whose log p(x) is estimated; 0 leaves that out."""
    draws: Positive = 128
    """Latents that are drawn for each from its posterior (importance sampling, ELBO), and from the prior (naive Monte
    Carlo)."""
    importance: Positive = 64
    """K of the importance-weighted bound (IWAE-K, Burda et al. 2016); divides `draws`."""
    aggregated: Annotated[int, Field(ge=2)] = 2_000
    """The most held-out images, from the first on, whose posteriors make up the aggregated posterior. Each is compared
    with each."""

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.draws % self.importance:
            fitting = [str(count) for count in range(1, self.draws + 1) if self.draws % count == 0]
            raise ValueError(
                f"importance {self.importance} does not divide draws {self.draws}; use one of {', '.join(fitting)}"
            )
        return self
