"""How good and how varied drawn images are, by the features of a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqscale.evaluation.distributions import FrechetDistance, InceptionScore, precision_recall
from vqscale.evaluation.features import FeatureNetwork
from vqscale.evaluation.measures import Together


class SampleQuality:
    """FID, Inception Score, precision and recall of drawn images against real ones.

    Args:
        network: makes the features, and class probabilities where the Inception Score is wanted.
        size: side of the images.
        compared: images of each set that precision and recall are over, the first ones by number.
    """

    def __init__(self, network: FeatureNetwork, size: int, compared: int) -> None:
        self._network, self._compared = network, compared
        self._distance = FrechetDistance(network.width(size), network.device)
        self._score = InceptionScore(network.classes(size)) if network.classifies else None
        self._kept: dict[bool, list[NDArray[np.float64]]] = {True: [], False: []}
        self._counts = {True: 0, False: 0}

    def add(self, images: NDArray[np.uint8], numbers: NDArray[np.int64], *, reference: bool) -> None:
        """Take in images [n, S, S, 3] with their numbers [n] in their set."""
        features, probabilities = self._network(images)
        self._distance.add(features, reference)
        self._counts[reference] += len(images)
        if probabilities is not None and self._score and not reference:
            self._score.add(probabilities, torch.from_numpy(numbers))
        first = numbers < self._compared
        rows = np.column_stack([numbers[first], features.cpu().numpy()[first]])
        self._kept[reference].append(rows)

    def figures(self, ranks: Together, reference: str) -> dict[str, Any]:
        """Over all ranks; collective. Sizes, and the network's hash, stand beside what depends on them.

        Args:
            ranks: of the stage.
            reference: what the reference is called.
        """
        counts = ranks.gather(self._counts)
        drawn, real = (sum(part[kind] for part in counts) for kind in (False, True))
        found: dict[str, Any] = {
            "fid": self._distance.value(),
            "fid_samples": drawn,
            "fid_reference": reference,
            "fid_reference_images": real,
            "features_sha256": self._network.sha256[:16],
        }
        if self._score:
            self._score.sums = ranks.sum(self._score.sums.to(ranks.device)).cpu()
            found["inception_score"], found["inception_score_deviation"] = self._score.value()
        reference_set, drawn_set = self._features(ranks, True), self._features(ranks, False)
        shares = precision_recall(reference_set, drawn_set)
        return found | {**shares._asdict(), "precision_images": min(len(reference_set), len(drawn_set))}

    def _features(self, ranks: Together, reference: bool) -> torch.Tensor:
        """The kept features of all ranks, in the order of their numbers."""
        rows = np.concatenate([part for parts in ranks.gather(self._kept[reference]) for part in parts])
        return torch.from_numpy(rows[np.argsort(rows[:, 0]), 1:]).float().to(ranks.device)
