"""Stage two as a task of the loop: predict codes from the codes before them and the class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vqscale.config.recipe import Prior as Settings
from vqscale.models.prior import Prior
from vqscale.seeds import mix
from vqscale.training.engine import Engine
from vqscale.training.task import Task
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch
from vqscale.training.utilisation import forward_flops

CodeFields = Mapping[str, Tensor]
"""Code grids by level name, and `label`, on the device."""


class PriorTask(Task):
    """Maximum likelihood of code grids; with class dropout for classifier-free guidance (Ho & Salimans 2022).

    Args:
        engine: over a `Prior`.
        settings: the recipe's prior.
        levels: level names, the coarsest first.
        seed: the run's seed.
        held_out: makes an iteration over this rank's share of the held-out codes.
        draw: draws a few samples as a picture; None leaves them out.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        levels: Sequence[str],
        seed: int,
        held_out: Callable[[], Iterable[CodeFields]],
        draw: Callable[[Prior], np.ndarray] | None = None,
    ) -> None:
        self.engine, self._settings, self._levels, self._seed = engine, settings, list(levels), seed
        self._held_out, self._draw = held_out, draw
        self._model: Prior = engine.bare  # type: ignore[assignment]
        self.parts = {"tokens": self._model.length}

    def sample_flops(self) -> int:
        """Of all networks, for the codes of one sample."""
        device = self.engine.ranks.device
        codes = [torch.zeros(1, grid.side, grid.side, dtype=torch.int64, device=device) for grid in self._model.grids]
        with self.engine.evaluated() as network:
            return forward_flops(network, codes, torch.zeros(1, dtype=torch.int64, device=device))

    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Cross-entropy in nats a code: over all codes (`total`) and by level."""
        classes = self._drop(self._classes(batch.fields), batch)
        chance = self._chance(batch, "network", self._model.chances)
        return self._nats(self.engine.model, batch.fields, classes, chance)

    def validate(self) -> dict[str, float]:
        """Nats a code on held-out codes, and bits of a whole sample, with the class given."""
        sums = torch.zeros(1 + len(self._levels), dtype=torch.float64)
        count = 0
        with self.engine.evaluated() as network:
            for fields in self.watched(self._held_out()):
                losses = self._nats(network, fields, self._classes(fields))
                size = len(fields["label"])
                sums += size * torch.stack([value.double().cpu() for value in losses.values()])
                count += size
        sums = torch.cat([sums, torch.tensor([count], dtype=torch.float64)]).to(self.engine.ranks.device)
        *values, total = self.engine.ranks.sum(sums).tolist()
        names = ["nats_per_code", *(f"nats_per_code_{name}" for name in self._levels)]
        figures = dict(zip(names, (value / total for value in values), strict=True))
        figures["bits_per_sample"] = figures["nats_per_code"] * self._model.length / math.log(2)
        return figures

    def pictures(self, step: int, tracker: Tracker | None) -> None:
        """Samples, a row a class."""
        if self._draw:
            with self.engine.evaluated() as network:
                if tracker:
                    tracker.picture(step, "samples", self._draw(network))  # type: ignore[arg-type]

    def _nats(
        self, network: torch.nn.Module, fields: CodeFields, classes: Tensor, chance: Tensor | None = None
    ) -> dict[str, Tensor]:
        codes = [fields[name].long() for name in self._levels]
        with self.engine.autocast():
            sums = [level.mean() for level in network(codes, classes, chance)]
        total = torch.stack(sums).sum() / self._model.length
        sizes = [grid.length for grid in self._model.grids]
        return {"total": total, **{name: n / size for name, n, size in zip(self._levels, sums, sizes, strict=True)}}

    def _classes(self, fields: CodeFields) -> Tensor:
        labels = fields["label"]
        return torch.where(labels < 0, self._model.no_class, labels).clamp(max=self._model.no_class)

    def _drop(self, classes: Tensor, batch: DeviceBatch) -> Tensor:
        """Forget the class of a share of the samples."""
        dropped = self._chance(batch, "class", 1)[:, 0] < self._settings.class_dropout
        return torch.where(dropped, self._model.no_class, classes)

    def _chance(self, batch: DeviceBatch, purpose: str, count: int) -> Tensor:
        """Uniform numbers fp32 [B, count] that depend on seed, step, purpose and the samples' global indices alone."""
        generator = torch.Generator().manual_seed(mix(self._seed, batch.step, purpose))
        numbers = torch.rand(self._settings.training.global_batch, count, generator=generator)
        return numbers.to(batch.index.device)[batch.index]
