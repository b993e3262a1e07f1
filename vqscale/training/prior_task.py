"""Stage two as a task of the loop: predict codes from the codes before them and the class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.config.recipe import Prior
from vqscale.models.transformer import Transformer
from vqscale.seeds import mix
from vqscale.training.engine import Engine
from vqscale.training.task import Task
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch

CodeFields = Mapping[str, Tensor]
"""Code grids by level name, and `label`, on the device."""


class PriorTask(Task):
    """Maximum likelihood of code grids; with class dropout for classifier-free guidance (Ho & Salimans 2022).

    Args:
        engine: over a `Transformer`.
        settings: the recipe's prior.
        levels: level names, the coarsest first.
        seed: the run's seed.
        held_out: makes an iteration over this rank's share of the held-out codes.
        draw: draws a few samples as a picture; None leaves them out.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Prior,
        levels: Sequence[str],
        seed: int,
        held_out: Callable[[], Iterable[CodeFields]],
        draw: Callable[[Transformer], np.ndarray] | None = None,
    ) -> None:
        self.engine, self._settings, self._levels, self._seed = engine, settings, list(levels), seed
        self._held_out, self._draw = held_out, draw
        self._model: Transformer = engine.bare  # type: ignore[assignment]

    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Cross-entropy in nats a code: over all codes (`total`) and by level."""
        classes = self._drop(self._classes(batch.fields), batch)
        return self._nats(self.engine.model, batch.fields, classes)

    def validate(self) -> dict[str, float]:
        """Nats a code on held-out codes, and bits of a whole sample, with the class given."""
        sums = torch.zeros(1 + len(self._levels), dtype=torch.float64)
        count = 0
        with self.engine.evaluated() as network:
            for fields in self._held_out():
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

    def _nats(self, network: torch.nn.Module, fields: CodeFields, classes: Tensor) -> dict[str, Tensor]:
        codes = [fields[name].long() for name in self._levels]
        with self.engine.autocast():
            logits = network(codes, classes)
        levels = [
            F.cross_entropy(level.flatten(0, 1).float(), grid.flatten())
            for level, grid in zip(logits, codes, strict=True)
        ]
        sizes = [grid[0].numel() for grid in codes]
        total = sum(size * nats for size, nats in zip(sizes, levels, strict=True)) / sum(sizes)
        return {"total": torch.as_tensor(total), **dict(zip(self._levels, levels, strict=True))}

    def _classes(self, fields: CodeFields) -> Tensor:
        labels = fields["label"]
        return torch.where(labels < 0, self._model.no_class, labels).clamp(max=self._model.no_class)

    def _drop(self, classes: Tensor, batch: DeviceBatch) -> Tensor:
        """Forget the class of a share of the samples, chosen by seed, step and global index alone."""
        share = self._settings.class_dropout
        if not share:
            return classes
        generator = torch.Generator().manual_seed(mix(self._seed, batch.step, "class"))
        chance = torch.rand(self._settings.training.global_batch, generator=generator)
        dropped = chance.to(batch.index.device)[batch.index] < share
        return torch.where(dropped, self._model.no_class, classes)
