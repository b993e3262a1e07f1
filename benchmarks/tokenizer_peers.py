"""The tokenizer as it is commonly written: torch's own layers in NCHW, vector-quantize-pytorch's codebooks, Adam.

Two levels, layer for layer those of `VQVAE`, created in its order, so that weights can be handed over one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.vqvae import VQVAE


@dataclass(frozen=True)
class Shape:
    """Sizes of the two-level network: the bottom level shrinks images four times, the top level twice more."""

    hidden: int
    residual_blocks: int
    residual_hidden: int
    dim: int
    codes: int


class Residual(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _residuals(shape: Shape) -> list[nn.Module]:
    return [Residual(shape.hidden, shape.residual_hidden) for _ in range(shape.residual_blocks)] + [nn.ReLU()]


def _stage(channels: int, shape: Shape) -> list[nn.Module]:
    return [nn.Conv2d(channels, shape.hidden, 3, padding=1), *_residuals(shape)]


def _down(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.ReLU()]


def _up(channels: int, out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1)


class PlainVQVAE2(nn.Module):
    """VQ-VAE-2 with two levels.

    Args:
        package: vector_quantize_pytorch.
        shape: sizes.
        decay: of the codebooks' EMA.
        commitment: weight of the commitment loss.
    """

    def __init__(self, package: Any, shape: Shape, decay: float, commitment: float) -> None:
        super().__init__()
        hidden, half, dim = shape.hidden, shape.hidden // 2, shape.dim
        self.encode_bottom = nn.Sequential(*_down(3, half), *_down(half, hidden), *_stage(hidden, shape))
        self.encode_top = nn.Sequential(*_down(hidden, half), *_stage(half, shape))
        self.to_bottom = nn.Conv2d(hidden + dim, dim, 1)
        self.to_top = nn.Conv2d(hidden, dim, 1)
        self.decode_top = nn.Sequential(*_stage(dim, shape), _up(hidden, dim))
        self.upsample_top = _up(dim, dim)
        self.decode = nn.Sequential(*_stage(2 * dim, shape), _up(hidden, half), nn.ReLU(), _up(half, 3))
        self.quantize_bottom, self.quantize_top = (
            package.VectorQuantize(
                dim=dim,
                codebook_size=shape.codes,
                decay=decay,
                commitment_weight=commitment,
                rotation_trick=False,
                accept_image_fmap=True,
            )
            for _ in range(2)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Reconstructions of images [B, 3, S, S], code grids (bottom, top), and the weighted commitment losses."""
        bottom = self.encode_bottom(images)
        top, top_codes, top_loss = self.quantize_top(self.to_top(self.encode_top(bottom)))
        context = self.decode_top(top)
        bottom, bottom_codes, bottom_loss = self.quantize_bottom(self.to_bottom(torch.cat([bottom, context], 1)))
        rebuilt = self.decode(torch.cat([bottom, self.upsample_top(top)], 1))
        return rebuilt, [bottom_codes, top_codes], (bottom_loss + top_loss).sum()

    @torch.no_grad()
    def take(self, network: VQVAE) -> None:
        """Take over weights and codes."""
        for mine, theirs in zip(self.parameters(), network.parameters(), strict=True):
            mine.copy_(theirs)
        books: Sequence[Any] = network.codebooks  # type: ignore[assignment]
        for quantize, book in zip((self.quantize_bottom, self.quantize_top), books, strict=True):
            quantize.codebook = book.codes.clone()


class PlainTrainer:
    """Trains it with Adam.

    Args:
        network: to be trained.
        rate: learning rate.
        half: whether under bf16 autocast.
    """

    def __init__(self, network: PlainVQVAE2, rate: float, *, half: bool) -> None:
        self.network, self._half = network, half
        self._optimizer = torch.optim.Adam(network.parameters(), lr=rate)

    def step(self, images: Tensor) -> Tensor:
        """One step on uint8 [B, S, S, 3]; the loss."""
        x = normalised(images)
        # TF32 in convolutions is torch's default, which our processes switch off.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self._half):
                rebuilt, _, commitment = self.network(x)
            loss = F.mse_loss(rebuilt.float(), x) + commitment
            self._optimizer.zero_grad()
            loss.backward()
        self._optimizer.step()
        return loss.detach()


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] as fp32 [B, 3, S, S] in [-1, 1], contiguous, as torchvision's transforms deliver it."""
    return images.permute(0, 3, 1, 2).contiguous().float().div(255).sub(0.5).div(0.5)
