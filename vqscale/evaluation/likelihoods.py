"""Likelihoods of held-out images under tokenizer and prior, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vqscale.data.labels import NO_LABEL
from vqscale.evaluation.likelihood import LevelCodes, PixelLikelihood, prior_figures, uniform_figures
from vqscale.evaluation.measures import Shown, Together
from vqscale.evaluation.metrics import Doubles
from vqscale.models.prior import Prior


class Likelihoods:
    """-log p(x | z_q) and -log p(z_q) of every image, with its class given where it has one.

    Args:
        pixels: the distribution of pixels around the reconstruction.
        levels: name → the codes of an image, the coarsest level first.
        size: side of the images in pixels.
        prior: in evaluation mode, and computes in fp32; without one, only the uniform baseline is measured.
        device: of the prior.
    """

    def __init__(
        self,
        pixels: PixelLikelihood,
        levels: Mapping[str, LevelCodes],
        size: int,
        prior: Prior | None,
        device: torch.device,
    ) -> None:
        self._pixels, self._levels, self._prior, self._device = pixels, dict(levels), prior, device
        self._dimensions = 3 * size**2
        self._found: list[Doubles] = [np.empty((0, 2 + (len(self._levels) if prior else 0)))]

    def add(self, shown: Shown) -> None:
        """Count some images."""
        code_nats = self._code_nats(self._prior, shown) if self._prior else []
        pixel_nats = self._pixels.nats(shown.images, shown.means)
        self._found.append(np.stack([shown.numbers, pixel_nats, *code_nats], axis=1))

    @torch.no_grad()
    def _code_nats(self, prior: Prior, shown: Shown) -> list[Doubles]:
        """A value an image for each level, the coarsest first."""
        codes = [torch.from_numpy(shown.codes[name].astype(np.int64)).to(self._device) for name in self._levels]
        labels = torch.from_numpy(shown.labels).to(self._device)
        classes = torch.where(labels == NO_LABEL, prior.no_class, labels).clamp(max=prior.no_class)
        return [nats.double().cpu().numpy() for nats in prior(codes, classes)]

    def figures(self, ranks: Together) -> dict[str, Any]:
        """Over all ranks; collective. The images are taken in their order, whoever measured them."""
        found = np.concatenate(ranks.gather(np.concatenate(self._found)))
        _, pixels, *columns = found[np.argsort(found[:, 0])].T
        figures: dict[str, Any] = {
            "pixel_likelihood": self._pixels.family,
            "pixel_scale": [round(scale, 4) for scale in self._pixels.scale],
            **uniform_figures(pixels, self._levels, self._dimensions),
        }
        if self._prior:
            code_nats = dict(zip(self._levels, columns, strict=True))
            figures |= prior_figures(pixels, code_nats, self._levels, self._dimensions)
            figures["codes_likelihood"] = "exact" if self._prior.exact else "bound"
        return figures
