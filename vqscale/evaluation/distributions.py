"""How close one set of images is to another, by their features: FID, precision and recall; and the Inception Score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


class _AsTheyAre(nn.Module):
    """Stands where torchmetrics has its network: what it is given are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """Fréchet distance between two sets of features under Gaussians of their mean and covariance (Heusel et al. 2017).

    Sums are kept in fp64, and added over all ranks at the end: which rank has which image makes no difference.

    Args:
        width: of the features.
        device: of the features.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._metric = FrechetInceptionDistance(feature=_AsTheyAre(width)).set_dtype(torch.float64).to(device)
        # It learns the dtype of its answer from the first images, of which a rank may have none.
        self._metric.orig_dtype = torch.float64

    def add(self, features: Tensor, reference: bool) -> None:
        """Features fp32 [n, width] of the reference or of the images that are judged."""
        self._metric.update(features, real=reference)

    def value(self) -> float:
        """The distance; collective where there is a process group.

        Raises:
            RuntimeError: one of the sets has fewer than two images.
        """
        return float(self._metric.compute())


class InceptionScore:
    """exp of the mean KL divergence from a set's mean class probabilities to each image's (Salimans et al. 2016).

    The set is split by the images' numbers, so the score depends neither on the ranks nor on an order.

    Args:
        classes: of the probabilities.
        splits: parts that the score is a mean over.
    """

    def __init__(self, classes: int, splits: int = 10) -> None:
        self.sums = torch.zeros(splits, classes + 2, dtype=torch.float64)
        """A line a split: sum of probabilities, of their negative entropies, count. Add those of all ranks."""

    def add(self, probabilities: Tensor, numbers: Tensor) -> None:
        """Probabilities fp32 [n, classes] of the images with these numbers, int64 [n]."""
        p = probabilities.double().cpu()
        negative_entropy = torch.special.xlogy(p, p).sum(dim=1, keepdim=True)
        rows = torch.cat([p, negative_entropy, torch.ones(len(p), 1, dtype=torch.float64)], dim=1)
        self.sums.index_add_(0, numbers.cpu() % len(self.sums), rows)

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits.

        Raises:
            ValueError: there are fewer images than splits.
        """
        count = self.sums[:, -1:]
        if not bool((count > 0).all()):
            raise ValueError(f"the Inception Score needs {len(self.sums)} images or more")
        mean, negative_entropy = self.sums[:, :-2] / count, self.sums[:, -2] / count[:, 0]
        scores = (negative_entropy - torch.special.xlogy(mean, mean).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(unbiased=False))


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    """Of the judged images: those that lie where the reference does."""
    recall: float
    """Of the reference: those that lie where the judged images do."""


def precision_recall(reference: Tensor, judged: Tensor, neighbours: int = 3, rows: int = 1024) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019): a set is the balls around its points that reach to
    their k-th nearest neighbour.

    Args:
        reference: features [n, D].
        judged: features [m, D]. The figures depend on n and m, so both belong beside them.
        neighbours: k.
        rows: points that are compared at once, which bounds the memory.

    Raises:
        ValueError: a set has no more points than `neighbours`.
    """
    if min(len(reference), len(judged)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images of each set")
    inside_reference = _inside(judged, reference, neighbours, rows)
    inside_judged = _inside(reference, judged, neighbours, rows)
    return PrecisionRecall(inside_reference, inside_judged)


def _inside(points: Tensor, manifold: Tensor, neighbours: int, rows: int) -> float:
    """Share of the points that lie in a ball of the manifold."""
    # The nearest of a point's neighbours is the point itself.
    radii = torch.cat(
        [torch.cdist(part, manifold).kthvalue(neighbours + 1, dim=1).values for part in manifold.split(rows)]
    )
    hits = [(torch.cdist(part, manifold) <= radii).any(dim=1) for part in points.split(rows)]
    return float(torch.cat(hits).double().mean())
