"""LPIPS: how different two images look, by the features of VGG16 (Zhang et al. 2018, section 3; version 0.1).

The weights are the user's: files that hold VGG16's convolutions (Simonyan & Zisserman 2015) and the five linear layers
of LPIPS, under the names that torchvision and the package `lpips` give them. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vqscale.errors import UserError

STAGES = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))
"""VGG16's stages, each before a pooling: channels, and the numbers that torchvision gives its convolutions."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""From images in [-1, 1] to what VGG16 was trained on."""


class LPIPS(nn.Module):
    """The distance, with weights that do not learn.

    Args:
        weights: tensors by name, as `read_weights` gives them.

    Raises:
        KeyError: a tensor is missing; its name.
        ValueError: a tensor has another shape; which one.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        widths = [3, *(channels for channels, _ in STAGES)]
        self.stages = nn.ModuleList(
            nn.ModuleList(
                _convolution(weights, number, channels if at else below, channels) for at, number in enumerate(numbers)
            )
            for (below, channels), (_, numbers) in zip(pairwise(widths), STAGES, strict=True)
        )
        self.linears = nn.ParameterList(
            _take(weights, (f"lin{number}.model.1.weight", f"lins.{number}.model.1.weight"), (1, channels, 1, 1))
            for number, (channels, _) in enumerate(STAGES)
        )
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance fp32 [B] of images [B, 3, S, S] in [-1, 1] to others."""
        features = self._features(torch.cat([images, others]))
        distances = [
            ((a - b).square() * linear).sum(dim=1).mean(dim=(1, 2))
            for (a, b), linear in zip((_unit(stage).chunk(2) for stage in features), self.linears, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Activations at the end of each stage."""
        x, found = (images - self.shift) / self.scale, []
        for number, stage in enumerate(self.stages):
            if number:
                x = F.max_pool2d(x, 2)
            for convolution in stage:  # type: ignore[attr-defined]
                x = F.relu(convolution(x))
            found.append(x)
        return found


def load_lpips(paths: Sequence[str], where: str) -> LPIPS:
    """LPIPS with the weights in one or several files.

    Args:
        paths: safetensors files, or files of `torch.save`, of which tensors alone are read.
        where: the setting that names them, for error messages.

    Raises:
        UserError: a file is absent or unreadable, or tensors are missing or misshapen.
    """
    weights: dict[str, Tensor] = {}
    for path in paths:
        weights |= read_weights(path, where)
    try:
        return LPIPS(weights)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{', '.join(paths)}: {error.args[0]}",
            where=where,
            mend="name files with the convolutions of torchvision's vgg16 and the linear layers of lpips' vgg.pth",
        ) from None


def read_weights(path: str, where: str) -> dict[str, Tensor]:
    """Tensors by name of a safetensors file, or of one that `torch.save` wrote (read with `weights_only`).

    Raises:
        UserError: no such file, or neither of the two.
    """
    if not Path(path).is_file():
        raise UserError(f"no file {path}", where=where, mend="name a file with the weights of VGG16 and LPIPS")
    try:
        found = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # damaged files make torch's readers raise anything: struct.error, IndexError, KeyError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is neither safetensors nor tensors of torch.save ({reason})", where=where, mend="convert it"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}", where=where, mend="save its state_dict()")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _convolution(weights: Mapping[str, Tensor], number: int, channels: int, out: int) -> nn.Conv2d:
    """The convolution that torchvision calls `features.NUMBER`; lpips says `net.slice1.NUMBER` and so on."""
    layer = nn.Conv2d(channels, out, 3, padding=1)
    prefixes = [f"features.{number}", *(f"net.slice{part}.{number}" for part in range(1, 6))]
    for name, parameter in layer.named_parameters():
        parameter.data = _take(weights, [f"{prefix}.{name}" for prefix in prefixes], tuple(parameter.shape))
    return layer


def _take(weights: Mapping[str, Tensor], names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    for name in names:
        if name in weights:
            found = weights[name]
            if tuple(found.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(found.shape)}, not {shape}")
            return found.detach().float()
    raise KeyError(f"{names[0]} is missing")


def _unit(features: Tensor) -> Tensor:
    """fp32: each position's features at length one; where all are zero, they stay so, and so does the gradient."""
    return F.normalize(features.float(), dim=1, eps=1e-10)
