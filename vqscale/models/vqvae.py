"""VQ-VAE-2: a hierarchical vector-quantized autoencoder (Razavi, van den Oord, Vinyals 2019, section 3.1).

Levels are numbered from the image upwards: level 0 is the finest (bottom). Encoding goes up, quantizing comes down
(`vqscale/models/hierarchy.py`). A level is quantized from its encoder's output and the context from above it, as in
algorithm 1 of the paper.

The paper does not say how codes enter the encoder below and the decoder. With two levels, C and U are those of
github.com/rosinality/vq-vae-2-pytorch, and so is the number of parameters. With more, the same rule goes on upwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.codebooks import lloyd
from vqscale.models.convnets import Widths, doubling, trunk, trunk_width
from vqscale.models.hierarchy import Hierarchy, Treatment, contexts, encoders, upsamplers
from vqscale.models.quantizer import Codebook, Donors, Quantized, SumOverRanks
from vqscale.models.tokenizer import silenced


@dataclass(frozen=True)
class LevelShape:
    """The networks around one level's codebook."""

    factor: int
    """Downsampling against the level below it (level 0: the image); a power of two."""
    widths: Widths
    """Channels and depth."""
    dim: int | None = None
    """Channels that the networks see of a code, where the codebook has fewer dimensions than that: a linear map
    follows the lookup. The map before the search is the 1×1 convolution that makes the latents anyway. Searching in
    few dimensions is the factorized code of ViT-VQGAN (Yu et al. 2022, section 3.2)."""
    unit: bool = False
    """Latents are normalised to length one, for a codebook of such codes."""


class Output(NamedTuple):
    """Result of a forward through the whole model; a tuple, since engines look for tensors inside of tuples only."""

    images: Tensor
    """Reconstructions [B, 3, S, S] in the range of the input."""
    levels: list[Quantized]
    """One a level, level 0 first."""
    features: Tensor
    """What the last layer, `VQVAE.to_pixels`, made the images from."""


class VQVAE(Hierarchy):
    """The tokenizer.

    Args:
        codebooks: one a level, level 0 (finest) first.
        shapes: the networks of each level.
        channels: channels of the images.
    """

    def __init__(self, codebooks: Sequence[Codebook], shapes: Sequence[LevelShape], channels: int = 3) -> None:
        super().__init__()
        inner = [codebook.codes.shape[1] for codebook in codebooks]
        dims = [shape.dim or own for shape, own in zip(shapes, inner, strict=True)]
        hidden = [shape.widths.hidden for shape in shapes]
        above = [*dims[1:], 0]  # channels of the context that a level is given
        sizes = [(shape.factor, shape.widths) for shape in shapes]
        self.shapes = tuple(shapes)
        self.codebooks = nn.ModuleList(codebooks)
        self.encoders = encoders(channels, sizes)
        self.before_quantizing = nn.ModuleList(
            nn.Conv2d(own + context, dim, 1) for own, context, dim in zip(hidden, above, inner, strict=True)
        )
        self.lifts = nn.ModuleList(
            nn.Conv2d(own, dim, 1) if own != dim else nn.Identity() for own, dim in zip(inner, dims, strict=True)
        )
        self.contexts, self.upsamplers = contexts(dims, sizes), upsamplers(dims, sizes)
        self.decoder = trunk(sum(dims), *sizes[0])
        self.to_pixels = doubling(trunk_width(*sizes[0]), channels)

    def forward(self, images: Tensor, donors: Donors | None = None, *, quantized: bool = True) -> Output:
        """Reconstruct images.

        Args:
            images: [B, 3, S, S], values about -1 to 1.
            donors: in training, to get statistics.
            quantized: False lets the latents pass as they are (the first steps of training); no levels then.
        """
        levels: list[Quantized] = []
        treat = self._quantizer(levels, donors) if quantized else _pass
        features = self.features(self._latents(images, treat))
        return Output(self.to_pixels(features), levels, features)

    def quantize(self, images: Tensor, donors: Donors | None = None) -> list[Quantized]:
        """Encode and quantize, level 0 first."""
        levels: list[Quantized] = []
        self._latents(images, self._quantizer(levels, donors))
        return levels

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Code grids int64 [B, H, W] of images [B, 3, S, S], level 0 first."""
        return [level.codes for level in self.quantize(images)]

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Images [B, 3, S, S] of code grids [B, H, W], level 0 first."""
        return self._decode([self._book(level).lookup(grid) for level, grid in enumerate(latents)])

    def vectors(self) -> list[Tensor]:
        """The codebooks, fp32 [K, D] a level."""
        return [self._book(level).codes for level in range(len(self.codebooks))]

    @torch.no_grad()
    def decode_alone(self, latents: Sequence[Tensor], level: int) -> Tensor:
        """Images [B, 3, S, S] of the codes of one level, every other one at the mean of its own vectors."""
        vectors = [self._book(number).lookup(grid) for number, grid in enumerate(latents)]
        return self._decode(silenced(vectors, level))

    def _decode(self, vectors: Sequence[Tensor]) -> Tensor:
        """Images of the vectors [B, dim, H, W] that codes stand for, level 0 first."""
        lifted = [self.lifts[level](own) for level, own in enumerate(vectors)]
        images: Tensor = self.to_pixels(self.features(lifted))
        return images

    @torch.no_grad()
    def initialise_codebooks(
        self, images: Tensor, donors: Donors, sum_over_ranks: SumOverRanks, kmeans_iterations: int = 0
    ) -> None:
        """Set every codebook to latents of the global batch, or to their k-means centres, from the top down.

        A lower level's latents depend on the codes above it, so each level is set before the next is computed.
        One all-reduce a level and iteration; every rank ends with the same codes, whatever their number.

        Args:
            images: this rank's [B, 3, S, S].
            donors: the step's draw; its first draw is where the codes, or the iterations, begin.
            sum_over_ranks: the all-reduce.
            kmeans_iterations: iterations of Lloyd's algorithm.
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
            lloyd(book, latents, donors, level, kmeans_iterations, sum_over_ranks)
            return book(latents).latents

        self._latents(images, initialise)

    def _book(self, level: int) -> Codebook:
        book = self.codebooks[level]
        assert isinstance(book, Codebook)
        return book

    def _quantizer(self, levels: list[Quantized], donors: Donors | None) -> Treatment:
        """Quantizes, and collects the results, level 0 first."""

        def quantize(level: int, latents: Tensor) -> Tensor:
            levels.insert(0, self._book(level)(latents, donors, level))
            return levels[0].latents

        return quantize

    def _latents(self, images: Tensor, treat: Treatment) -> list[Tensor]:
        """Encode, and treat each level's latents from the top down; as the networks see them, level 0 first."""

        def lifted(level: int, known: Tensor) -> Tensor:
            latents = self.before_quantizing[level](known)
            if self.shapes[level].unit:
                latents = F.normalize(latents.float(), dim=1)
            found: Tensor = self.lifts[level](treat(level, latents))
            return found

        return self.come_down(images, lifted)


def _pass(level: int, latents: Tensor) -> Tensor:
    return latents
