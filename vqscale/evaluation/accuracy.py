"""Classification accuracy score: what a classifier knows of real images that has seen one set of images alone.

Ravuri & Vinyals (2019), "Classification Accuracy Score for Conditional Generative Models". Beside the score of drawn
images stand those of reconstructions, which say what the tokenizer loses, and of real images, which say what this
classifier can reach with so many of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.config.classifier import Classifier as Settings
from vqscale.evaluation.measures import Together
from vqscale.models.classifier import Classifier
from vqscale.models.pixels import from_uint8
from vqscale.seeds import mix

MANY_CLASSES = 10
"""Classes above which the five likeliest are counted besides."""

_MOMENTUM, _WARMUP = 0.9, 20  # a twentieth of the steps


@dataclass(frozen=True)
class Share:
    """The images of a set that a rank has; over all ranks each is there once."""

    numbers: NDArray[np.int64]
    """[n], the images' numbers in the set."""
    images: NDArray[np.uint8]
    """[n, S, S, 3]."""
    labels: NDArray[np.int64]
    """[n], classes from 0 on."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of real images in [0, 1]."""

    top1: float
    """Those whose likeliest class is theirs."""
    top5: float | None
    """Those whose class is among the five likeliest; None where there are few classes."""
    images: int
    """Real images that both are over."""


def train_classifier(
    settings: Settings,
    share: Share,
    classes: int,
    ranks: Together,
    *,
    seed: int,
    flip: bool,
    seen: Callable[[int], None] = lambda count: None,
) -> nn.Module:
    """A classifier that has seen the images of one set; collective, and the same on all ranks.

    Which images a step takes, how they are shifted and mirrored, and the first weights follow from the seed and the
    images' order in the set, so nothing but rounding depends on the number of ranks.

    Args:
        settings: how it learns.
        share: this rank's images.
        classes: how many.
        ranks: of the stage.
        seed: of everything.
        flip: whether a mirrored image is one of the same class.
        seen: told after each step how many images this rank has taken.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 0, "classifier"))
        network = Classifier(classes, share.images.shape[1], settings.width, settings.blocks)
    network.to(ranks.device).train()
    weights = list(network.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=_MOMENTUM, nesterov=True, weight_decay=settings.weight_decay)
    held = _places(share.numbers, ranks)
    for step in range(settings.steps):
        chosen = _batch(len(held), settings.global_batch, step, seed)
        places = held[chosen]
        mine, places = chosen[places >= 0], places[places >= 0]
        changed = _changed(share.images[places], mine, settings.shift, flip, mix(seed, step, "change"))
        labels = torch.from_numpy(share.labels[places]).to(ranks.device)
        optimizer.zero_grad()
        # A sum over this rank's images: their number differs from rank to rank and may be none.
        loss = F.cross_entropy(network(_pixels(changed, ranks.device)), labels, reduction="sum") / len(chosen)
        loss.backward()
        _add_up(weights, ranks)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
        optimizer.step()
        seen(len(mine))
    return network.eval()


@torch.no_grad()
def accuracy(
    network: nn.Module, real: Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]], classes: int, ranks: Together
) -> Accuracy:
    """How many real images it names right; collective.

    Args:
        network: as `train_classifier` gives it.
        real: this rank's share of them, images [n, S, S, 3] with their labels [n]; those without a class are left out.
        classes: how many.
        ranks: of the stage.
    """
    counts = torch.zeros(3, dtype=torch.int64)
    for images, labels in real:
        known = labels >= 0
        if not known.any():
            continue
        truth = torch.from_numpy(labels[known])[:, None]
        best = network(_pixels(images[known], ranks.device)).topk(min(5, classes), dim=1).indices.cpu()
        right = best == truth
        counts += torch.stack([right[:, :1].sum(), right.any(dim=1).sum(), torch.tensor(len(truth))])
    first, five, total = ranks.sum(counts.to(ranks.device)).tolist()
    return Accuracy(first / total, five / total if classes > MANY_CLASSES else None, total)


def _pixels(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """As `from_uint8`, but not channels last: with few channels torch 2.13's backward then writes past its memory."""
    return from_uint8(images, device).contiguous()


def _places(numbers: NDArray[np.int64], ranks: Together) -> NDArray[np.int64]:
    """Of each image of the set, in the order of their numbers: its place on this rank, -1 where another one has it."""
    every = np.sort(np.concatenate(ranks.gather(numbers)))
    held = np.full(len(every), -1, np.int64)
    held[np.searchsorted(every, numbers)] = np.arange(len(numbers))
    return held


def _batch(total: int, batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """Places in the set of a step's images: the set is gone through in an order of its own each time, all of it.

    A step that begins in one pass may end in the next one.
    """
    first = step * batch
    passes = range(first // total, (first + batch - 1) // total + 1)
    orders = [np.random.default_rng(mix(seed, number, "order")).permutation(total) for number in passes]
    start = first - passes[0] * total
    return np.concatenate(orders)[start : start + batch]


def _changed(
    images: NDArray[np.uint8], numbers: NDArray[np.int64], shift: float, flip: bool, seed: int
) -> NDArray[np.uint8]:
    """Each image shifted, what is uncovered mirrored from inside, and turned by chance; by its place in the set."""
    size = images.shape[1]
    most = round(shift * size)
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="reflect")
    changed = np.empty_like(images)
    for place, number in enumerate(numbers):
        random = np.random.default_rng((seed, int(number)))
        top, left = random.integers(0, 2 * most + 1, 2)
        image = padded[place, top : top + size, left : left + size]
        changed[place] = image[:, ::-1] if flip and random.random() < 0.5 else image
    return changed


def _add_up(weights: list[nn.Parameter], ranks: Together) -> None:
    """Gradients summed over all ranks, in one all-reduce."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    flat: Tensor = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _schedule(step: int, steps: int) -> float:
    """Warm-up and cosine, as a share of the peak."""
    warmup = max(1, steps // _WARMUP)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
