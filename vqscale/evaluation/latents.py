"""What continuous latents of held-out images carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vqscale.data.manifest import CodeLevel
from vqscale.evaluation.measures import Shown, Together
from vqscale.models.latent_watch import LatentWatch


class PosteriorStatistics:
    """How far posteriors are from N(0, 1), and how many of their units are active.

    Args:
        levels: the finest first.
    """

    def __init__(self, levels: Sequence[CodeLevel]) -> None:
        self._names = [level.name for level in levels]
        shapes = [(level.channels, level.grid) for level in levels]
        self._watch = LatentWatch(self._names, shapes, torch.device("cpu"))

    def add(self, shown: Shown) -> None:
        """Take in the posteriors of some images."""
        self._watch.see([torch.from_numpy(shown.encoded[name]) for name in self._names])

    def figures(self, ranks: Together) -> dict[str, Any]:
        """By level: divergence from N(0, 1) in nats an image, and the share of active units; collective."""
        self._watch.meet(lambda sums: ranks.sum(sums.to(ranks.device)).cpu())
        levels = self._watch.figures()
        return {f"{key}_{name}": value for name, level in levels.items() for key, value in level.items()}
