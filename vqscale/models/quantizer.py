"""The EMA codebook (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019, section 2.1).

The forward pass is pure: it assigns codes and returns statistics. `update_codebooks` changes the codebooks, once, after
a successful optimizer step, from statistics that one all-reduce has summed over all ranks and levels. So a skipped
step, evaluation, recomputed activations or several forward passes a step cannot corrupt them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.nearest import Assignment, assign
from vqscale.models.upload import upload
from vqscale.seeds import mix

SumOverRanks = Callable[[Tensor], Tensor]
"""All-reduce by addition; the identity on one process."""


class Statistics(NamedTuple):
    """What one batch says about one level's codebook; everything adds over ranks."""

    counts: Tensor
    """fp32 [K]: vectors assigned to each code."""
    sums: Tensor
    """fp32 [K, D]: their sums."""
    donors: Tensor
    """fp32 [R, D]: latents at the donor positions that this rank holds, zero elsewhere."""
    error: Tensor
    """fp32 [1]: summed squared distance between latents and their codes."""

    def __add__(self, other: Statistics) -> Statistics:  # type: ignore[override]
        """What two batches of one step say together."""
        return Statistics(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Donors:
    """Which latents of the *global* batch are drawn as restart donors; the same draw on every rank.

    Args:
        index: int64 [B], ascending, on the CPU: position of this rank's samples in the global batch.
        global_batch: samples of the step over all ranks.
        seed: one number made of (run, step); the level is mixed in by `positions`.
    """

    index: Tensor
    global_batch: int
    seed: int

    def draw(self, latents: Tensor, level: int, count: int) -> Tensor:
        """fp32 [count, D]: drawn rows of `latents` [B, n, D] that this rank holds, zero rows for the others."""
        batch, cells, dim = latents.shape
        generator = torch.Generator().manual_seed(mix(self.seed, level))
        drawn = torch.randint(self.global_batch * cells, (count,), generator=generator)
        sample, cell = drawn // cells, drawn % cells
        place = torch.searchsorted(self.index, sample).clamp(max=batch - 1)
        held = self.index[place] == sample
        place, cell, held = upload(torch.stack([place, cell, held]), latents.device)
        return torch.where(held[:, None] > 0, latents[place, cell].float(), torch.zeros(1, dim, device=latents.device))


class Quantized(NamedTuple):
    """Result of quantizing one level; a tuple, since engines look for tensors inside of tuples only."""

    latents: Tensor
    """[B, D, H, W]: code vectors, with the gradient of a straight-through estimator."""
    codes: Tensor
    """int64 [B, H, W]."""
    commitment: Tensor
    """Scalar: mean squared distance between latents and their (constant) codes."""
    statistics: Statistics | None
    """Present in training only, when donors were given."""


class _StraightThrough(torch.autograd.Function):
    """Code vectors with the gradient of a straight-through estimator, and the commitment loss.

    Backward looks the code vectors up again: what is kept is the latents, which the encoder keeps anyway, and codes.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, vectors: Tensor, error: Tensor, nearest: Tensor, codes: Tensor
    ) -> tuple[Tensor, Tensor]:
        # A copy of the codes: their update may come before the backward.
        ctx.save_for_backward(rows, nearest, codes.clone())
        ctx.set_materialize_grads(False)
        return vectors, error.squeeze(0) / rows.numel()

    @staticmethod
    def backward(ctx: Any, straight: Tensor | None, commitment: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = straight
        if commitment is not None:
            rows, nearest, codes = ctx.saved_tensors
            away, weight = rows - F.embedding(nearest, codes), commitment * (2 / rows.numel())
            pull = away * weight if straight is None else torch.addcmul(straight.float(), away, weight)
            gradient = pull.to(rows.dtype)
        return gradient, None, None, None, None


class Codebook(nn.Module):
    """K codes of dimension D as fp32 buffers; never parameters, and never cast to another dtype.

    Buffers: `codes` [K, D], `counts` [K] and `sums` [K, D], the EMA of what was assigned to them.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self, size: int, dim: int, *, decay: float = 0.99, restart_below: float = 0.0, max_restarts: int = 16
    ) -> None:
        super().__init__()
        self.decay, self.restart_below, self.max_restarts = decay, restart_below, max_restarts
        codes = torch.randn(size, dim)
        self.register_buffer("codes", codes)
        # Counts and sums start from the same statistics: otherwise unused codes explode at the first step.
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", codes.clone())

    def forward(self, z: Tensor, donors: Donors | None = None, level: int = 0) -> Quantized:
        """Assign codes; changes nothing.

        Args:
            z: latents [B, D, H, W].
            donors: in training, the step's draw of restart donors; None in evaluation.
            level: number of this level, mixed into the draw.
        """
        batch, dim, height, width = z.shape
        rows = z.permute(0, 2, 3, 1).reshape(-1, dim)
        found = assign(rows, self.codes, statistics=donors is not None)
        latents, commitment = _StraightThrough.apply(rows, found.vectors, found.error, found.codes, self.codes)
        statistics = None
        if donors is not None:
            statistics = self._statistics(rows.detach(), found, donors, level, batch)
        return Quantized(
            latents.view(batch, height, width, dim).permute(0, 3, 1, 2),
            found.codes.view(batch, height, width),
            commitment,
            statistics,
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors [B, D, H, W] of code grids int [B, H, W]."""
        return F.embedding(codes.long(), self.codes).permute(0, 3, 1, 2)

    def _statistics(self, rows: Tensor, found: Assignment, donors: Donors, level: int, batch: int) -> Statistics:
        return Statistics(
            counts=found.counts,
            sums=found.sums,
            donors=donors.draw(rows.view(batch, -1, rows.shape[1]), level, self.max_restarts),
            error=found.error,
        )

    @torch.no_grad()
    def initialise(self, vectors: Tensor, expected: float) -> None:
        """Set the codes to `vectors` [K, D], each as if it had been used `expected` times a step."""
        self._place(vectors)
        self.counts.fill_(expected)
        self.sums.copy_(self.codes * expected)

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, donors: Tensor, decay: float, rate: float = 0.0) -> Tensor:
        """Move the codes by the EMA of global statistics, then restart dead ones.

        Args:
            counts: fp32 [K]: vectors of the step that were assigned to each code, over all ranks.
            sums: fp32 [K, D]: their sums.
            donors: fp32 [R, D]: where restarted codes go.
            decay: of the EMA.
            rate: learning rate of the step, for codebooks that learn by gradients (`codebooks.GradientCodebook`).

        Returns:
            int64 scalar: restarted codes.
        """
        expected = counts.sum() / len(counts)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        # A code out of use keeps its place: counts and sums fade together, and their ratio is left alone
        # before both vanish in rounding.
        moving = self.counts > 1e-6 * expected
        self._place(torch.where(moving[:, None], self.sums / self.counts.clamp(min=1e-30)[:, None], self.codes))
        return self._restart(donors, expected)

    def _place(self, vectors: Tensor) -> None:
        """Where all codes go; variants keep them on a surface."""
        self.codes.copy_(vectors)

    def _restart(self, donors: Tensor, expected: Tensor) -> Tensor:
        """Dead codes, the least used first, take a donor's place; code, count and sum are reset together."""
        # Strictly below: with restart_below 0 no code is ever dead.
        lowest = torch.argsort(self.counts, stable=True)[: len(donors)]
        dead = self.counts[lowest] < self.restart_below * expected
        self._reset(lowest, dead, donors[: len(lowest)], expected)
        return dead.sum()

    def _reset(self, places: Tensor, dead: Tensor, donors: Tensor, expected: Tensor) -> None:
        """Give those of the codes `places` that are `dead` their donor's vector and the expected use."""
        self.codes[places] = torch.where(dead[:, None], donors, self.codes[places])
        self.counts[places] = torch.where(dead, expected, self.counts[places])
        self.sums[places] = torch.where(dead[:, None], donors * expected, self.sums[places])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        """Follow device moves, refuse dtype casts: an EMA in half precision stops moving."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


@dataclass(frozen=True)
class LevelFigures:
    """What one update saw of one level, over the global batch; tensors, so that nothing waits for the device."""

    used: Tensor
    """Share of the codes that were assigned at least once."""
    perplexity: Tensor
    """exp of the entropy of the assignments."""
    restarted: Tensor
    """Codes that were restarted."""
    distance: Tensor
    """Squared distance between a latent and its code, summed over the D dimensions; a mean over the latents."""
    counts: Tensor
    """fp32 [K]: assignments."""


def update_codebooks(
    codebooks: Sequence[Codebook],
    statistics: Sequence[Statistics],
    sum_over_ranks: SumOverRanks,
    updates: int | None = None,
    rate: float = 0.0,
) -> list[LevelFigures]:
    """Update all levels from one fused all-reduce; call it once, after the optimizer's step.

    Args:
        codebooks: one a level.
        statistics: what this rank's batch said about each.
        sum_over_ranks: the all-reduce.
        updates: how many came before. The first ones use a smaller decay, min(decay, (1 + n) / (10 + n)): latents
            move fast at the beginning, and codes that lag behind are lost. None: the full decay.
        rate: learning rate of the step, for codebooks that learn by gradients.
    """
    parts = [part for s in statistics for part in (s.counts, s.sums, s.donors, s.error)]
    fused = sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
    pieces = [
        piece.view(part.shape) for piece, part in zip(fused.split([p.numel() for p in parts]), parts, strict=True)
    ]
    figures = []
    for level, codebook in enumerate(codebooks):
        counts, sums, donors, error = pieces[4 * level : 4 * level + 4]
        decay = codebook.decay if updates is None else min(codebook.decay, (1 + updates) / (10 + updates))
        restarted = codebook.update(counts, sums, donors, decay, rate)
        figures.append(_figures(counts, error, restarted))
    return figures


def _figures(counts: Tensor, error: Tensor, restarted: Tensor) -> LevelFigures:
    vectors = counts.sum()
    return LevelFigures(
        used=(counts > 0).float().mean(),
        perplexity=perplexity(counts),
        restarted=restarted,
        distance=error.squeeze() / vectors,
        counts=counts,
    )


def perplexity(counts: Tensor) -> Tensor:
    """Exp of the entropy of what was counted, floating point [K]; a scalar of its dtype."""
    share = counts / counts.sum()
    return torch.exp(-torch.xlogy(share, share).sum())


def usage_figures(counts: Mapping[str, Tensor]) -> dict[str, float]:
    """Usage (share of codes used) and perplexity a level, from counts over any set: `usage_NAME`, `perplexity_NAME`."""
    figures = {}
    for name, count in counts.items():
        figures[f"usage_{name}"] = float((count > 0).double().mean())
        figures[f"perplexity_{name}"] = float(perplexity(count.double()))
    return figures
