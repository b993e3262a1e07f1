"""The aggregated posterior over some training images as a prior: the best there is for them, and it overfits.

With q(z) the mean of the posteriors of N images, no prior has a lower mean of KL(q(z | x_n) || p) over them (Hoffman &
Johnson 2016; Tomczak & Welling 2018, section 3): what is left is the information about which image it is, log N at
most. Of other images it only knows that they lie near these. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.models.density import kept_or, noise
from vqscale.models.gaussian import component_nats, means_and_scales, one_row_each
from vqscale.models.generate import Draws
from vqscale.models.network import GridShape, Network


class Aggregated(Network):
    """A mixture of the posteriors of some images, with equal weights; of those of a class, where it is given one.

    Until it has seen images it is the standard normal. A class that it has not seen takes all images.

    Args:
        grids: the levels that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on: they say which images come into question.
        images: how many posteriors it keeps.
    """

    def __init__(
        self, grids: Sequence[GridShape], classes: int, given: Sequence[GridShape] = (), *, images: int
    ) -> None:
        super().__init__(grids, classes, given)
        self.wanted = images
        self._sizes = [grid.values for grid in (*self.given, *self.grids)]
        # Buffers: they go into checkpoints and exported models, and there is nothing to train.
        self.posteriors: Tensor
        self.labels: Tensor
        self.register_buffer("posteriors", torch.zeros(images, 2 * sum(self._sizes)))
        self.register_buffer("labels", torch.full((images,), self.no_class))

    @torch.no_grad()
    def see(self, first: int, posteriors: Sequence[Tensor], classes: Tensor) -> None:
        """Keep these images; as `Network.see`."""
        rows = one_row_each(posteriors)[: max(0, self.wanted - first)]
        self.posteriors[first : first + len(rows)] = rows
        self.labels[first : first + len(rows)] = classes[: len(rows)]

    def nats(
        self, given: Sequence[Tensor], latents: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """-log of the mixture; of a level after another one, by the images' weights once that one is known."""
        weights, found = self._weights(classes), []
        for level, z in enumerate((*given, *latents)):
            more = weights - component_nats(self._of(level), z.flatten(1))
            found.append(weights.logsumexp(1) - more.logsumexp(1))
            weights = more
        return [nats.to(z.dtype) for nats, z in zip(found[len(given) :], latents, strict=True)]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw an image, the likelier the better it fits what is known, and then from its posterior."""
        weights = self._weights(classes)
        for level, z in enumerate((*given, *known)):
            weights = weights - component_nats(self._of(level), z.flatten(1))
        shares = torch.softmax(weights, dim=1).cumsum(1)
        images = torch.searchsorted(shares, draws.uniforms(1) * shares[:, -1:], right=True)[:, 0]
        rows = images.clamp(max=self.wanted - 1)
        found = []
        for level, (grid, kept) in enumerate(zip(self.grids, known, strict=True), start=len(self.given)):
            means, log_scales = (part.view_as(kept).double() for part in means_and_scales(self._of(level)[rows]))
            found.append(kept_or(kept, means + log_scales.exp() * noise(grid, draws)))
        return found

    def _of(self, level: int) -> Tensor:
        """Posteriors [images, 2 · values] of one of `given` and `grids`."""
        return torch.cat([half.split(self._sizes, dim=1)[level] for half in means_and_scales(self.posteriors)], dim=1)

    def _weights(self, classes: Tensor) -> Tensor:
        """Log weights of the images for each sample, float64 [B, images]; their sum does not matter, so they are 0."""
        fits = (self.labels == classes[:, None]) | (classes == self.no_class)[:, None]
        fits |= ~fits.any(1, keepdim=True)
        return torch.zeros(fits.shape, dtype=torch.float64, device=fits.device).masked_fill(~fits, -math.inf)
