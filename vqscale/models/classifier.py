"""A small residual network that tells classes apart (He et al. 2016, section 4.2, as made for CIFAR-10)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

_GROUPS = 8
_FINE = 48  # pixels of a side up to which the first convolution keeps the resolution


class Classifier(nn.Module):
    """Three stages of residual blocks, each further one at half the resolution and twice the width; then a mean.

    Group normalisation (Wu & He 2018) stands in the place of batch normalisation, whose statistics would depend on how
    the batch is spread over the ranks. Images above 48 pixels a side are halved until they are not, by the kernels of
    7×7 and the pooling of the paper's networks for ImageNet.

    Args:
        classes: how many.
        size: side of the images.
        width: channels of the first stage.
        blocks: residual blocks of a stage.
    """

    def __init__(self, classes: int, size: int, width: int = 32, blocks: int = 1) -> None:
        super().__init__()
        halvings = max(0, math.ceil(math.log2(size / _FINE)))
        first = nn.Conv2d(3, width, 7, 2, 3, bias=False) if halvings else nn.Conv2d(3, width, 3, 1, 1, bias=False)
        pooling = [nn.MaxPool2d(3, 2, 1) for _ in range(halvings - 1)]
        widths = [width * 2 ** (number // blocks) for number in range(3 * blocks)]
        body = [
            _Block(inside, out, 1 if inside == out else 2)
            for inside, out in zip([width, *widths], widths, strict=False)
        ]
        self.layers = nn.Sequential(first, _norm(width), nn.ReLU(), *pooling, *body)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, S, S] in [-1, 1]."""
        logits: Tensor = self.head(self.layers(images).mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3×3 convolutions, added to the input; a 1×1 convolution fits it where the shape changes."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inside, out, 3, stride, 1, bias=False),
            _norm(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            _norm(out),
        )
        same = inside == out and stride == 1
        self.fit = nn.Identity() if same else nn.Conv2d(inside, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fit(x) + self.branch(x))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(_GROUPS, channels // 2), channels)
