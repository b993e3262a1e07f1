"""What all tokenizers have in common: from images to the latents of some levels, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

CERTAIN = "exact"
"""Name of a likelihood of 1: latents from which the images come back as they were."""


def silenced(latents: Sequence[Tensor], level: int) -> list[Tensor]:
    """Latents [..., H, W] of all levels, of which all but one are their mean over the cells."""
    silent = [own.mean(dim=(-2, -1), keepdim=True).expand_as(own) for own in latents]
    return [own if number == level else silent[number] for number, own in enumerate(latents)]


class ImageTokenizer(nn.Module, ABC):
    """Encodes and decodes images; level 0 is the finest."""

    units: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Modules that a strategy shards, recomputes and compiles each as one; none lies inside another."""

    continuous: ClassVar[bool] = False
    """Whether latents are continuous; else they are codes."""
    likelihood: str = ""
    """Name of the distribution of pixels given latents that belongs to the kind; empty where it only gives their means,
    so that a distribution has to be stated and fitted."""

    @abstractmethod
    def encode(self, images: Tensor) -> list[Tensor]:
        """What is known of the latents of images [B, 3, S, S] in [-1, 1], level 0 first; without gradients.

        Returns:
            Codes int64 [B, H, W], or posteriors of continuous latents [B, 2C, H, W]: means, then log scales.
        """

    @abstractmethod
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Images [B, 3, S, S] of codes [B, H, W] or latents [B, C, H, W], level 0 first; without gradients."""

    @abstractmethod
    def decode_alone(self, latents: Sequence[Tensor], level: int) -> Tensor:
        """What one level carries: images [B, 3, S, S] of its latents, every other level at its own mean.

        Args:
            latents: codes [B, H, W] or latents [B, C, H, W] of all levels, level 0 first.
            level: the one that speaks.
        """

    def log_likelihood(self, images: Tensor, latents: Sequence[Tensor]) -> Tensor:
        """Log p(x | z) fp32 [B] in nats of images [B, 3, S, S] of 256 grey levels, in [-1, 1]; without gradients.

        Raises:
            NotImplementedError: the kind has no likelihood of its own.
        """
        raise NotImplementedError

    @abstractmethod
    def vectors(self) -> list[Tensor]:
        """What the codes stand for, fp32 [K, D] a level; none where latents are continuous."""
