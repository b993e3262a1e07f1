"""Figures over the last steps: one batch says little, a window says whether a level is collapsing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.models.quantizer import LevelFigures, SumOverRanks, perplexity

_PREFIX = "window."
HEALTHY = 0.5
"""Usage from which on a level shows that the others could be used too."""


class CodeWindow:
    """Counts of the last `steps` global batches, the same on all ranks.

    Args:
        sizes: codebook size by level name.
        steps: length of the window.
        device: where the counts are kept; nothing is read from it before `figures`.
    """

    def __init__(self, sizes: Mapping[str, int], steps: int, device: torch.device) -> None:
        self._steps = steps
        # A row a step. Columns of `_sums`: filled, restarted, summed distance, perplexity.
        self._counts = {
            name: torch.zeros(steps, size, dtype=torch.int32, device=device) for name, size in sizes.items()
        }
        self._sums = {name: torch.zeros(steps, 4, dtype=torch.float64, device=device) for name in sizes}
        self._latest = {name: torch.ones((), device=device) for name in sizes}

    def add(self, step: int, levels: Sequence[LevelFigures]) -> None:
        """Take in a step's codebook update, in the place of the step that leaves the window."""
        row = step % self._steps
        for name, level in zip(self._counts, levels, strict=True):
            vectors = level.counts.sum()
            self._counts[name][row] = level.counts
            distance = level.distance.double() * vectors
            filled = torch.ones_like(distance)
            self._sums[name][row] = torch.stack([filled, level.restarted.double(), distance, level.perplexity.double()])
            self._latest[name].copy_(level.perplexity / vectors.clamp(max=len(level.counts)))

    def counts(self) -> dict[str, Tensor]:
        """int64 [K] by level name: how often each code was assigned within the window; empty before the first step."""
        found = {name: counts.sum(dim=0) for name, counts in self._counts.items()}
        return found if all(bool(counts.any()) for counts in found.values()) else {}

    def latest(self) -> list[Tensor]:
        """fp32 scalar a level: the last batch's perplexity, as a share of the codes that it could use; 1 before any."""
        return list(self._latest.values())

    def figures(self) -> dict[str, dict[str, float]]:
        """By level name: figures over the window, none before the first step in it.

        `used` (share of the codes), `perplexity`, `dead` (codes that were not used once), `batch_perplexity` (mean of
        the batches' perplexities, which other repositories report), `restarted` (codes a step), `distance` (squared
        distance of a latent to its code, summed over dimensions, a mean over latents).
        """
        found = {}
        for name, counts in self._counts.items():
            filled, restarted, distance, batches = self._sums[name].sum(dim=0).tolist()
            if filled:
                total = counts.sum(dim=0).double()
                found[name] = {
                    "used": float((total > 0).double().mean()),
                    "perplexity": float(perplexity(total)),
                    "dead": float((total == 0).sum()),
                    "batch_perplexity": batches / filled,
                    "restarted": restarted / filled,
                    "distance": distance / float(total.sum()),
                }
        return found

    def collapsed(self, figures: Mapping[str, Mapping[str, float]], below: float) -> dict[str, str]:
        """Level → what is wrong with it, for each one that uses less than the share `below` of its codes.

        What counts is the lesser of two perplexities: of all assignments in the window, and the mean of the batches'
        own. Usage would not show it, since restarts give a collapsed level a few uses of many codes, nor would the
        first perplexity alone, since they move the few clusters that there are from code to code. A window that is not
        full finds nothing.
        """
        if not self.full:
            return {}
        low = [name for name in figures if self._low(name, figures[name], below)]
        return {name: _collapse(name, figures, self._counts[name].shape[1]) for name in low}

    @property
    def full(self) -> bool:
        """Whether all of the window's steps are in it."""
        return all(bool(sums[:, 0].all()) for sums in self._sums.values())

    def _low(self, name: str, level: Mapping[str, float], below: float) -> bool:
        counts = self._counts[name]
        size, vectors = counts.shape[1], float(counts.sum()) / self._steps
        # A batch of fewer vectors than codes cannot use all of them.
        return level["perplexity"] < below * size or level["batch_perplexity"] < below * min(size, vectors)

    def state(self) -> dict[str, Tensor]:
        """The window, for a checkpoint."""
        counts = {f"{_PREFIX}counts.{name}": value for name, value in self._counts.items()}
        latest = {f"{_PREFIX}latest.{name}": value for name, value in self._latest.items()}
        return counts | latest | {f"{_PREFIX}sums.{name}": value for name, value in self._sums.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; a window of another length, or none, begins anew."""
        own = self.state()
        if all(name in state and state[name].shape == value.shape for name, value in own.items()):
            for name, value in own.items():
                value.copy_(state[name])


def _collapse(name: str, figures: Mapping[str, Mapping[str, float]], size: int) -> str:
    """The warning about a level, with its figures and the remedies."""
    own = figures[name]
    healthy = [f"'{n}' uses {f['used']:.0%}" for n, f in figures.items() if f["used"] >= HEALTHY and n != name]
    others = f", while {', '.join(healthy)}" if healthy else ""
    return (
        f"level '{name}' is collapsing: perplexity {own['batch_perplexity']:.1f} a batch, {own['perplexity']:.1f} over "
        f"the window, of {size} codes, usage {own['used']:.1%}{others}; lower tokenizer.training.learning_rate or "
        f"tokenizer.quantizer.commitment, set continuous_steps, or raise restart_below and max_restarts"
    )


class PixelWindow:
    """Squared error and variance of the images of the last steps.

    Args:
        steps: length of the window.
        device: where sums are kept; nothing is read from it before `normalised_error`.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps = steps
        # A row a step. Columns: batches, and sums over them of mean error, mean, and mean square.
        self._rows = torch.zeros(steps, 4, dtype=torch.float64, device=device)
        self._current = torch.zeros(4, dtype=torch.float64, device=device)

    def forget(self) -> None:
        """Begin a step; what was seen of an earlier one and not kept is lost."""
        self._current.zero_()

    @torch.no_grad()
    def see(self, rebuilt: Tensor, images: Tensor) -> None:
        """Take in a batch, of which a step may have several; fp32 [B, 3, S, S]."""
        error, mean, square = F.mse_loss(rebuilt, images), images.mean(), images.square().mean()
        self._current += torch.stack([torch.ones_like(mean), error, mean, square]).double()

    def keep(self, step: int) -> None:
        """What was seen since `forget` belongs to the window, as step `step`."""
        self._rows[step % self._steps] = self._current

    def state(self, sum_over_ranks: SumOverRanks) -> dict[str, Tensor]:
        """The window over all ranks, for a checkpoint; one small all-reduce."""
        return {f"{_PREFIX}pixels": sum_over_ranks(self._rows.clone())}

    def load(self, state: Mapping[str, Tensor], first: bool) -> None:
        """Take over what `state` gave, on the `first` rank alone, since the ranks' windows add up.

        A window of another length, or none, begins anew.
        """
        rows = state.get(f"{_PREFIX}pixels")
        if rows is not None and rows.shape == self._rows.shape:
            self._rows.copy_(rows if first else torch.zeros_like(rows))

    def normalised_error(self, sum_over_ranks: SumOverRanks) -> float:
        """Mean squared error over the variance of the same images; one small all-reduce."""
        batches, error, mean, square = sum_over_ranks(self._rows.sum(dim=0)).tolist()
        return error / (square - mean**2 / batches)
