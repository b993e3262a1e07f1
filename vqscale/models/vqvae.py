"""VQ-VAE-2: a hierarchical vector-quantized autoencoder (Razavi, van den Oord, Vinyals 2019, section 3.1).

Levels are numbered from the image upwards: level 0 is the finest (bottom). Encoding goes up, quantizing comes down:

    image → E_0 → E_1 → … → E_top
                             quantize top → C_top → … → quantize level 0 → decoder → image

`C_l` turns the codes of level l and the context from above it into the context of level l-1, on its grid. A level
is quantized from its encoder's output and that context, as in algorithm 1 of the paper: the lower level is left the
details that the upper ones do not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqscale.models.quantizer import Codebook, Donors, Quantized


class ResidualBlock(nn.Module):
    """ReLU, 3×3 convolution, ReLU, 1×1 convolution, added to the input."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, inner, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return x + self.layers(x)


@dataclass(frozen=True)
class Widths:
    """Channels and depth that all encoders and decoders of a model share."""

    hidden: int
    residual_blocks: int
    residual_hidden: int

    def residuals(self) -> list[nn.Module]:
        """The residual blocks of one encoder or decoder, with the ReLU behind them."""
        blocks = [ResidualBlock(self.hidden, self.residual_hidden) for _ in range(self.residual_blocks)]
        return [*blocks, nn.ReLU(inplace=True)]


def encoder(channels: int, factor: int, widths: Widths) -> nn.Sequential:
    """[B, channels, H, W] to [B, hidden, H/factor, W/factor] by strided convolutions and residual blocks."""
    steps = factor.bit_length() - 1
    layers: list[nn.Module] = []
    for step in range(steps):
        # Half the width while the grid is still large (as the original), full width for the last halving.
        out = widths.hidden if step == steps - 1 else widths.hidden // 2
        layers += [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
        channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, widths.hidden, 3, padding=1), *widths.residuals())


def decoder(channels: int, out: int, factor: int, widths: Widths) -> nn.Sequential:
    """[B, channels, H, W] to [B, out, factor·H, factor·W], the mirror image of `encoder`."""
    steps = factor.bit_length() - 1
    layers: list[nn.Module] = [nn.Conv2d(channels, widths.hidden, 3, padding=1), *widths.residuals()]
    inside = widths.hidden
    for step in range(steps):
        last = step == steps - 1
        after = out if last else widths.hidden // 2
        layers.append(nn.ConvTranspose2d(inside, after, 4, stride=2, padding=1))
        if not last:
            layers.append(nn.ReLU(inplace=True))
        inside = after
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Output:
    """Result of a forward through the whole model."""

    images: Tensor
    """Reconstructions [B, 3, S, S] in the range of the input."""
    levels: list[Quantized]
    """One a level, level 0 first."""


class VQVAE(nn.Module):
    """The tokenizer.

    Args:
        codebooks: one a level, level 0 (finest) first.
        factors: downsampling of each level against the one below it (level 0: the image); powers of two.
        widths: channels and depth.
        channels: channels of the images.
    """

    def __init__(
        self, codebooks: Sequence[Codebook], factors: Sequence[int], widths: Widths, channels: int = 3
    ) -> None:
        super().__init__()
        hidden, top = widths.hidden, len(factors) - 1
        dims = [codebook.codes.shape[1] for codebook in codebooks]
        self.codebooks = nn.ModuleList(codebooks)
        self.encoders = nn.ModuleList(
            encoder(channels if level == 0 else hidden, factor, widths) for level, factor in enumerate(factors)
        )
        self.before_quantizing = nn.ModuleList(
            nn.Conv2d(hidden if level == top else 2 * hidden, dim, 1) for level, dim in enumerate(dims)
        )
        # contexts[l] turns codes and context of level l+1 into the context of level l.
        self.contexts = nn.ModuleList(
            decoder(dims[level] + (0 if level == top else hidden), hidden, factors[level], widths)
            for level in range(1, top + 1)
        )
        self.decoder = decoder(dims[0] + (hidden if top else 0), channels, factors[0], widths)

    def forward(self, images: Tensor, donors: Donors | None = None, *, quantized: bool = True) -> Output:
        """Reconstruct images.

        Args:
            images: [B, 3, S, S], values about -1 to 1.
            donors: in training, to get statistics.
            quantized: False lets the latents pass as they are (the first steps of training); no levels then.
        """
        if not quantized:
            return Output(self._decode_latents(self._come_down(images, lambda level, latents: latents)), [])
        levels = self.quantize(images, donors)
        return Output(self._decode_latents([level.latents for level in levels]), levels)

    def quantize(self, images: Tensor, donors: Donors | None = None) -> list[Quantized]:
        """Encode and quantize, level 0 first."""
        levels: list[Quantized] = []

        def quantize(level: int, latents: Tensor) -> Tensor:
            levels.insert(0, self._book(level)(latents, donors, level))
            return levels[0].latents

        self._come_down(images, quantize)
        return levels

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Code grids int64 [B, H, W] of images [B, 3, S, S], level 0 first."""
        return [level.codes for level in self.quantize(images)]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Images [B, 3, S, S] of code grids [B, H, W], level 0 first."""
        return self._decode_latents([self._book(level).lookup(grid) for level, grid in enumerate(codes)])

    @torch.no_grad()
    def initialise_codebooks(self, images: Tensor, donors: Donors, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Set every codebook to latents of the global batch, from the top down.

        A lower level's latents depend on the codes above it, so each level is set before the next is computed.
        One all-reduce a level; every rank ends with the same codes.
        """

        def initialise(level: int, latents: Tensor) -> Tensor:
            book = self._book(level)
            rows = latents.flatten(2).transpose(1, 2)
            drawn = sum_over_ranks(donors.draw(rows, level, len(book.codes)))
            # Two codes from one latent (or from flat images) would never part: a trace of noise, equal on all ranks.
            noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(donors.seed))
            spread = drawn.std(dim=0, keepdim=True)
            book.initialise(
                drawn + 1e-3 * spread * noise.to(drawn), donors.global_batch * rows.shape[1] / len(book.codes)
            )
            return book(latents).latents

        self._come_down(images, initialise)

    def _book(self, level: int) -> Codebook:
        book = self.codebooks[level]
        assert isinstance(book, Codebook)
        return book

    def _come_down(self, images: Tensor, treat: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Encode, then treat each level's latents from the top down; what comes of them is context of the next."""
        hidden = []
        for encoder in self.encoders:
            images = encoder(images)
            hidden.append(images)
        levels: list[Tensor] = []
        context: Tensor | None = None
        for level in reversed(range(len(hidden))):
            below = hidden[level] if context is None else torch.cat([hidden[level], context], dim=1)
            levels.insert(0, treat(level, self.before_quantizing[level](below)))
            if level:
                context = self._context(level, levels[0], context)
        return levels

    def _context(self, level: int, latents: Tensor, context: Tensor | None) -> Tensor:
        """Context of level - 1 from the latents and the context of `level`."""
        return self.contexts[level - 1](latents if context is None else torch.cat([latents, context], dim=1))

    def _decode_latents(self, latents: Sequence[Tensor]) -> Tensor:
        context: Tensor | None = None
        for level in reversed(range(1, len(latents))):
            context = self._context(level, latents[level], context)
        return self.decoder(latents[0] if context is None else torch.cat([latents[0], context], dim=1))
