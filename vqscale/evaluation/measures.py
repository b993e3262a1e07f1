"""What is measured while images pass once: each measure is shown the images of its rank and sums up over all ranks.

A measure costs one class here or beside, and one line where the stage chooses its measures; the stage's loop does not
know them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.evaluation.codebook import CodebookReport, report_codebook
from vqscale.evaluation.distributions import FrechetDistance
from vqscale.evaluation.features import FeatureNetwork
from vqscale.evaluation.metrics import Doubles
from vqscale.evaluation.surgery import PositionCounts, Surgery, dissect


class Together(Protocol):
    """The ranks, as far as measures need them."""

    @property
    def device(self) -> torch.device:
        """Of this rank."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce in place over all ranks, by addition."""


@dataclass(frozen=True)
class Shown:
    """Some held-out images, and what the tokenizer makes of them."""

    numbers: NDArray[np.int64]
    """[n], the images' places in the data set."""
    labels: NDArray[np.int64]
    """[n], negative where there is none."""
    images: NDArray[np.uint8]
    """[n, S, S, 3]."""
    encoded: dict[str, NDArray[Any]]
    """By level name: codes uint16 [n, side, side], or posteriors float32 [n, 2C, side, side]."""
    latents: dict[str, NDArray[Any]]
    """What was drawn of them: the codes, or latents float32 [n, C, side, side]."""
    log_posterior: Doubles
    """log q(z | x) [n] of what was drawn, in nats; 0 for codes."""
    means: NDArray[np.float32]
    """Reconstructions [n, S, S, 3] in grey levels, not rounded: of the codes, or of the posteriors' means."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The reconstructions as images."""
        return np.rint(self.means).astype(np.uint8)


class Measure(Protocol):
    """Something that is measured of held-out images."""

    def add(self, shown: Shown) -> None:
        """Take in some images."""

    def figures(self, ranks: Together) -> dict[str, Any]:
        """Over all ranks; collective."""


class CodeStatistics:
    """How the codes of held-out images are used, and where their bits go.

    Args:
        levels: name → codebook fp32 [K, D] and side of the grid, the finest level first.
    """

    def __init__(self, levels: dict[str, tuple[Tensor, int]]) -> None:
        self._levels = levels
        self._counts = {name: PositionCounts(side, len(book)) for name, (book, side) in levels.items()}
        self._grids: Counter[tuple[int, str]] = Counter()

    def add(self, shown: Shown) -> None:
        """Count the codes of some images."""
        for name, counts in self._counts.items():
            counts.add(torch.from_numpy(shown.encoded[name].astype(np.int64)))
        for label, *grids in zip(shown.labels.tolist(), *(shown.encoded[name] for name in self._levels), strict=True):
            self._grids[label, hashlib.sha256(b"".join(grid.tobytes() for grid in grids)).hexdigest()] += 1

    def figures(self, ranks: Together) -> dict[str, Any]:
        """By level: use, entropy in bits and distances of codes; and the parts of the code length, in bits an image."""
        found: dict[str, Any] = {}
        for name, (book, _) in self._levels.items():
            counts = self._counts[name]
            counts.counts = ranks.sum(counts.counts.to(ranks.device)).cpu()
            report = report_codebook(counts.of_codes, book.cpu())
            found |= {f"{key}_{name}": value for key, value in _codebook_figures(report).items()}
        grids: Counter[tuple[int, str]] = sum(ranks.gather(self._grids), Counter())
        return found | _surgery_figures(dissect(list(self._counts.values()), grids))


def _codebook_figures(report: CodebookReport) -> dict[str, Any]:
    return {
        "held_out_usage": report.usage,
        "held_out_perplexity": report.perplexity,
        "held_out_entropy_bits": report.entropy_bits,
        "nearest_code_median": report.nearest_median,
        "nearest_code_least": report.nearest_least,
        "code_distance_median": report.distance_median,
        "code_distances": report.distances,
        "code_shares": report.shares,
    }


def _surgery_figures(cut: Surgery) -> dict[str, Any]:
    """The parts of the code length, in bits an image."""
    return {
        "code_bits_uniform": cut.uniform,
        "code_bits_unused": cut.unused,
        "code_bits_placed": cut.placed,
        "code_bits_positions": cut.positions,
        "code_bits_mutual_information": cut.mutual_information,
        "code_bits_mutual_information_given_class": cut.information_given_class,
        "code_bits_kl_uniform": cut.divergence_uniform,
    }


def learned_figures(figures: Mapping[str, Any], dimensions: int) -> dict[str, float]:
    """What the learned prior adds to the surgery, and the ELBO's other term, in bits an image.

    The KL of the aggregated posterior over these images to the prior is taken class by class, since the prior is given
    the class. Of one that knows new images as well as these it stays above 0: N images are not all that there are.

    Args:
        figures: those of `CodeStatistics` and of the likelihoods.
        dimensions: values of an image.
    """
    found = {"image_bits_reconstruction": figures["bits_per_dim_pixels"] * dimensions}
    if "bits_per_dim_codes" in figures:
        learned = figures["bits_per_dim_codes"] * dimensions
        found["code_bits_learned"] = learned
        found["code_bits_kl_learned"] = learned - figures["code_bits_mutual_information_given_class"]
    return found


class FeatureDistance:
    """rFID: the Fréchet distance between the images and their reconstructions (FID, Heusel et al. 2017).

    Args:
        network: makes the features.
        size: side of the images.
    """

    def __init__(self, network: FeatureNetwork, size: int) -> None:
        self._network, self._count = network, 0
        self._distance = FrechetDistance(network.width(size), network.device)

    def add(self, shown: Shown) -> None:
        """Take in the features of some images and of their reconstructions."""
        for images, reference in ((shown.images, True), (shown.pixels, False)):
            self._distance.add(self._network(images)[0], reference)
        self._count += len(shown.images)

    def figures(self, ranks: Together) -> dict[str, Any]:
        """The distance, with the number of images and the network's hash beside it."""
        images = sum(ranks.gather(self._count))
        return {
            "rfid": self._distance.value(),
            "rfid_images": images,
            "rfid_reference": "validation",
            "features_sha256": self._network.sha256[:16],
        }
