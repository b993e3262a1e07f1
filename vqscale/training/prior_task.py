"""Stage two as a task of the loop: how likely latents are, given the class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vqscale.config.recipe import Prior as Settings
from vqscale.config.recipe import Recipe
from vqscale.models.latents import draw, values_of
from vqscale.models.network import unknown
from vqscale.models.noise import normals_at, normals_of, uniforms_at
from vqscale.models.prior import Prior
from vqscale.models.upload import upload
from vqscale.seeds import mix
from vqscale.training.dashboard import Charts
from vqscale.training.engine import Engine
from vqscale.training.task import Task
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch
from vqscale.training.utilisation import forward_flops

CodeFields = Mapping[str, Tensor]
"""Codes or posteriors by level name, and `label`, on the device."""


class PriorTask(Task):
    """Maximum likelihood of latents; with class dropout for classifier-free guidance (Ho & Salimans 2022).

    Continuous latents are drawn anew from their posteriors in each step, by seed, step and place in the global batch;
    those of held-out images by the posteriors' own values, so that their figures repeat.

    Args:
        engine: over a `Prior`.
        settings: the recipe's prior.
        levels: level names, the coarsest first.
        seed: the run's seed.
        held_out: makes an iteration over this rank's share of the held-out latents.
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
        self._unit = _unit(continuous=self._model.grids[0].continuous)
        self.parts = {"tokens": self._model.length}

    @classmethod
    def charts(cls, recipe: Recipe) -> Charts:
        """Nats a code, or a value, in training and on held-out latents.

        In training they may be of smoothed labels, which no network can bring as low: the two are not one curve.
        """
        unit = _unit(continuous=recipe.levels[0].continuous)
        smoothed = ", of smoothed labels" if recipe.prior.label_smoothing else ""
        return {
            f"nats a {unit}, training{smoothed}": ["Multiline", [f"loss/{level.name}$" for level in recipe.levels]],
            f"nats a {unit}, held out": ["Multiline", [r"validation/nats.*"]],
        }

    def sample_flops(self) -> int:
        """Of all networks, for the latents of one sample."""
        device = self.engine.ranks.device
        latents = [torch.zeros_like(unknown(grid, 1, device)) for grid in self._model.grids]
        with self.engine.evaluated() as network:
            return forward_flops(network, latents, torch.zeros(1, dtype=torch.int64, device=device))

    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Cross-entropy in nats a code, or a value, of labels as smoothed as the recipe asks: of all and by level."""
        chance = self._drawn(uniforms_at, batch, "chance", 1 + self._model.chances)
        normals = self._drawn(normals_at, batch, "posterior", self._values)
        # Forget the class of a share of the samples.
        dropped = chance[:, 0] < self._settings.class_dropout
        classes = torch.where(dropped, self._model.no_class, self._classes(batch.fields))
        latents = draw(self._encoded(batch.fields), normals).latents
        return self._nats(self.engine.model, latents, classes, chance[:, 1:])

    def validate(self) -> dict[str, float]:
        """Nats a code, or a value, of held-out latents, and bits of a whole sample, with the class given.

        A continuous sample costs log q(z | x) - log p(z), which is what is counted for its bits.
        """
        sums = torch.zeros(2 + len(self._levels), dtype=torch.float64)
        count = 0
        with self.engine.evaluated() as network:
            for fields in self.watched(self._held_out()):
                encoded = self._encoded(fields)
                drawn = draw(encoded, normals_of(encoded[0].cpu().numpy(), self._values).to(encoded[0].device))
                losses = self._nats(network, drawn.latents, self._classes(fields))
                size = len(fields["label"])
                measured = [*losses.values(), drawn.log_density.mean()]
                sums += size * torch.stack([value.double().cpu() for value in measured])
                count += size
        sums = torch.cat([sums, torch.tensor([count], dtype=torch.float64)]).to(self.engine.ranks.device)
        *values, total = self.engine.ranks.sum(sums).tolist()
        *nats, posterior = (value / total for value in values)
        name = f"nats_per_{self._unit}"
        figures = dict(zip([name, *(f"{name}_{level}" for level in self._levels)], nats, strict=True))
        figures["bits_per_sample"] = (figures[name] * self._model.length + posterior) / math.log(2)
        return figures

    def pictures(self, step: int, tracker: Tracker | None) -> None:
        """Samples, a row a class."""
        if self._draw:
            with self.engine.evaluated() as network:
                if tracker:
                    tracker.picture(step, "samples", self._draw(network))  # type: ignore[arg-type]

    def _nats(
        self, network: torch.nn.Module, latents: list[Tensor], classes: Tensor, chance: Tensor | None = None
    ) -> dict[str, Tensor]:
        with self.engine.autocast():
            sums = [level.mean() for level in network(latents, classes, chance)]
        total = torch.stack(sums).sum() / self._model.length
        sizes = [grid.values for grid in self._model.grids]
        return {"total": total, **{name: n / size for name, n, size in zip(self._levels, sums, sizes, strict=True)}}

    def _encoded(self, fields: CodeFields) -> list[Tensor]:
        return [fields[name] for name in self._levels]

    @property
    def _values(self) -> int:
        return values_of(self._model.grids)

    def _classes(self, fields: CodeFields) -> Tensor:
        return self._model.classes_of(fields["label"])

    def _drawn(
        self, kind: Callable[[int, Tensor, int], Tensor], batch: DeviceBatch, purpose: str, count: int
    ) -> Tensor:
        """Numbers fp32 [B, count] that depend on seed, step, purpose and the samples' global indices alone."""
        numbers = kind(mix(self._seed, batch.step, purpose), batch.index, count)
        return upload(numbers, self.engine.ranks.device)


def _unit(*, continuous: bool) -> str:
    """What nats are counted by."""
    return "value" if continuous else "code"
