"""Likelihoods of held-out images under tokenizer and prior, image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vqscale.evaluation.bits import LevelCodes, normal_figures, prior_figures, uniform_figures
from vqscale.evaluation.measures import Shown, Together
from vqscale.evaluation.metrics import Doubles
from vqscale.evaluation.pixel_fit import PixelLikelihood
from vqscale.models.density import normal_nats
from vqscale.models.prior import Prior
from vqscale.models.tokenizer import CERTAIN


class Pixels(Protocol):
    """p(x | z), as it is measured."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the report says of it."""

    @property
    def certain(self) -> bool:
        """Whether latents leave nothing open: p(x | z) = 1."""

    def nats(self, shown: Shown) -> Doubles:
        """-log p(x | z) [n] of some images."""


@dataclass(frozen=True)
class Fitted:
    """A distribution that was stated, and fitted to the reconstructions of training images."""

    likelihood: PixelLikelihood

    @property
    def facts(self) -> dict[str, Any]:
        """Its family and scales."""
        scale = [round(scale, 4) for scale in self.likelihood.scale]
        return {"pixel_likelihood": self.likelihood.family, "pixel_scale": scale}

    @property
    def certain(self) -> bool:
        """Never: a scale is above zero."""
        return False

    def nats(self, shown: Shown) -> Doubles:
        """Every value by itself, given its reconstruction."""
        return self.likelihood.nats(shown.images, shown.means)


@dataclass(frozen=True)
class Own:
    """The likelihood that a tokenizer has itself."""

    name: str
    measured: Callable[[Shown], Doubles]

    @property
    def facts(self) -> dict[str, Any]:
        """Its name."""
        return {"pixel_likelihood": self.name}

    @property
    def certain(self) -> bool:
        """Whether the tokenizer says so."""
        return self.name == CERTAIN

    def nats(self, shown: Shown) -> Doubles:
        """As the tokenizer measures it."""
        return self.measured(shown)


@dataclass(frozen=True)
class ImageNats:
    """Of each held-out image, in their order; [N] each."""

    pixels: Doubles
    """-log p(x | z)."""
    log_posterior: Doubles
    """log q(z | x); 0 for codes."""
    normal: Doubles
    """log q(z | x) - log N(z; 0, 1) of continuous latents; 0 for codes."""
    levels: dict[str, Doubles]
    """-log p(z) by level name under the prior; none without one."""

    @property
    def prior(self) -> Doubles:
        """-log p(z) of continuous latents, under N(0, 1) where there is no prior."""
        return sum(self.levels.values(), np.zeros_like(self.pixels)) if self.levels else self.standard

    @property
    def standard(self) -> Doubles:
        """-log N(z; 0, 1) of continuous latents."""
        return self.normal - self.log_posterior


class Likelihoods:
    """-log p(x | z) and -log p(z) of every image, with its class given where it has one; and log q(z | x), 0 for codes.

    Args:
        pixels: the distribution of pixels given the latents.
        levels: name → the latents of an image, the coarsest level first.
        dimensions: values of an image.
        prior: in evaluation mode, and computes in fp32; without one, only the uniform baseline is measured.
        device: of the prior.
    """

    def __init__(
        self,
        pixels: Pixels,
        levels: Mapping[str, LevelCodes],
        dimensions: int,
        prior: Prior | None,
        device: torch.device,
    ) -> None:
        self._pixels, self._levels, self._prior, self._device = pixels, dict(levels), prior, device
        self._dimensions = dimensions
        self._continuous = not any(level.size for level in levels.values())
        self._found: list[Doubles] = [np.empty((0, 4 + (len(self._levels) if prior else 0)))]

    def add(self, shown: Shown) -> None:
        """Count some images."""
        code_nats = self._code_nats(self._prior, shown) if self._prior else []
        known = [shown.numbers, self._pixels.nats(shown), shown.log_posterior, self._normal_nats(shown)]
        self._found.append(np.stack([*known, *code_nats], axis=1))

    @torch.no_grad()
    def _code_nats(self, prior: Prior, shown: Shown) -> list[Doubles]:
        """A value an image for each level, the coarsest first."""
        latents = [tensor.to(self._device) for tensor in self._latents(shown)]
        classes = prior.classes_of(torch.from_numpy(shown.labels).to(self._device))
        return [nats.double().cpu().numpy() for nats in prior(latents, classes)]

    def told(self, labels: Tensor) -> Tensor | None:
        """The class that the prior is given of images with such labels int64 [n]; None if it is given none."""
        return self._prior.classes_of(labels) if self._prior and self._prior.no_class else None

    def _normal_nats(self, shown: Shown) -> Doubles:
        """Log q(z | x) - log N(z; 0, 1) [n] of continuous latents; 0 of codes."""
        if not self._continuous:
            return np.zeros(len(shown.numbers))
        nats = [normal_nats(own.double()).flatten(1).sum(1) for own in self._latents(shown)]
        return shown.log_posterior + torch.stack(nats).sum(0).numpy()

    def _latents(self, shown: Shown) -> list[Tensor]:
        """Codes int64 or latents fp32 of each level, the coarsest first."""
        dtype = np.float32 if self._continuous else np.int64
        return [torch.from_numpy(shown.latents[name].astype(dtype)) for name in self._levels]

    def of_images(self, ranks: Together) -> ImageNats:
        """Over all ranks; collective. The images are in their order, whoever measured them."""
        found = np.concatenate(ranks.gather(np.concatenate(self._found)))
        _, pixels, posterior, normal, *columns = found[np.argsort(found[:, 0])].T
        levels = dict(zip(self._levels, columns, strict=True)) if self._prior else {}
        return ImageNats(pixels, posterior, normal, levels)

    def figures(self, ranks: Together) -> dict[str, Any]:
        """Over all ranks; collective."""
        nats = self.of_images(ranks)
        figures: dict[str, Any] = dict(self._pixels.facts)
        if self._continuous:
            figures |= normal_figures(nats.pixels, nats.normal, self._dimensions)
        else:
            figures |= uniform_figures(nats.pixels, self._levels, self._dimensions)
        if self._prior:
            known = nats.log_posterior if self._continuous else None
            figures |= prior_figures(nats.pixels, nats.levels, self._levels, self._dimensions, known)
            figures["codes_likelihood"] = "exact" if self._prior.exact else "bound"
            figures["bits_per_dim_is"] = self._named(self._prior)
        return figures

    def _named(self, prior: Prior) -> str:
        """What bits per dimension are: the likelihood, or which bound."""
        if self._continuous:
            return "ELBO"
        if not self._pixels.certain:
            return "VQ bound"
        return "exact" if prior.exact else "upper bound, by the prior"
