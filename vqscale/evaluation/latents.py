"""What continuous latents of held-out images carry, and where the bits of their posteriors go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqscale.data.manifest import CodeLevel
from vqscale.evaluation.image_nats import Likelihoods
from vqscale.evaluation.latent_surgery import active_units, dissect_latents
from vqscale.evaluation.measures import Shown, Together
from vqscale.models.gaussian import one_row_each
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


class PosteriorSurgery:
    """The price of the latents taken apart: information about the image, and what the prior misses of all posteriors.

    Args:
        levels: level names, in any order.
        most: images, from the first on, whose posteriors are compared with each other.
        likelihoods: of the same images; it has to be shown them too.
    """

    def __init__(self, levels: Sequence[str], most: int, likelihoods: Likelihoods) -> None:
        self._levels, self._most, self._likelihoods = list(levels), most, likelihoods
        self._kept: list[tuple[NDArray[Any], ...]] = []  # numbers, labels, posteriors, draws

    def add(self, shown: Shown) -> None:
        """Keep the posteriors of those that are among the first, and what was drawn of them."""
        first = shown.numbers < self._most
        if first.any():
            posteriors = one_row_each([torch.from_numpy(shown.encoded[name][first]) for name in self._levels])
            drawn = [shown.latents[name][first].reshape(int(first.sum()), -1) for name in self._levels]
            known = shown.numbers[first], shown.labels[first]
            self._kept.append((*known, posteriors.numpy(), np.concatenate(drawn, axis=1)))

    def figures(self, ranks: Together) -> dict[str, Any]:
        """Bits an image with their standard errors, and active units over all levels; collective."""
        parts = [part for kept in ranks.gather(self._kept) for part in kept]
        numbers, *rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(numbers)
        labels, posteriors, latents = (torch.from_numpy(row[order]) for row in rows)
        nats = self._likelihoods.of_images(ranks)
        prior, standard = (torch.from_numpy(own[: len(order)]) for own in (nats.prior, nats.standard))
        classes = self._likelihoods.told(labels)
        plain = dissect_latents(posteriors, latents, standard)
        cut = dissect_latents(posteriors, latents, prior, classes)
        named = {"rate": (cut.rate, cut.rate_error), "mutual_information": (plain.information, plain.information_error)}
        if classes is not None:
            named["mutual_information_given_class"] = cut.information, cut.information_error
        named |= {"kl_prior": (cut.gap, cut.gap_error), "kl_normal": (plain.gap, plain.gap_error)}
        found: dict[str, Any] = {"latent_images": len(order)}
        for name, (value, error) in named.items():
            found |= {f"latent_bits_{name}": value / math.log(2), f"latent_bits_{name}_error": error / math.log(2)}
        found["latent_bits_most_information"] = plain.ceiling / math.log(2)
        return found | {"units": latents.shape[1], "units_active": active_units(posteriors)}
