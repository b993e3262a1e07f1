"""Stage one as a task of the loop: reconstruct images, then move the codebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.config.recipe import Tokenizer
from vqscale.data.sheet import colour_codes, tile
from vqscale.models.pixels import from_uint8, to_uint8
from vqscale.models.quantizer import Codebook, Donors, LevelFigures, Statistics, update_codebooks
from vqscale.models.vqvae import VQVAE, Output
from vqscale.seeds import mix
from vqscale.training.engine import Engine
from vqscale.training.guards import compare_codebooks
from vqscale.training.loop import Task
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch


class TokenizerTask(Task):
    """VQ-VAE-2 training (Razavi et al. 2019, equation 2, with the codebook term replaced by EMA).

    Args:
        engine: over a `VQVAE`.
        settings: the recipe's tokenizer.
        seed: the run's seed.
        held_out: makes an iteration over this rank's share of the held-out images, uint8 [B, S, S, 3].
        fixed: images uint8 [n, S, S, 3] that are drawn into TensorBoard again and again.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Tokenizer,
        seed: int,
        held_out: Callable[[], Iterable[np.ndarray]],
        fixed: np.ndarray,
    ) -> None:
        self.engine, self._settings, self._seed = engine, settings, seed
        self._held_out, self._fixed = held_out, fixed
        self._model: VQVAE = engine.bare  # type: ignore[assignment]
        self._statistics: list[Statistics] = []
        self._levels: list[LevelFigures] = []
        self._names = [level.name for level in settings.levels]
        self._updates = 0

    def before_step(self, batch: DeviceBatch) -> None:
        """At the first quantized step: data-dependent first codes, agreed across ranks."""
        self._updates = batch.step - self._settings.quantizer.continuous_steps
        if self._updates == 0 and self._settings.quantizer.init == "data":
            images = from_uint8(batch.fields["image"], self.engine.ranks.device)
            with torch.no_grad(), self.engine.autocast():
                self._model.initialise_codebooks(images, self._donors(batch), self.engine.ranks.sum)

    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Reconstruction (mean squared error in [-1, 1]) and commitment a level."""
        images = from_uint8(batch.fields["image"], self.engine.ranks.device)
        with self.engine.autocast():
            output: Output = self.engine.model(images, self._donors(batch), quantized=self._quantized)
        self._statistics = [level.statistics for level in output.levels if level.statistics is not None]
        reconstruction = F.mse_loss(output.images.float(), images)
        commitments = [level.commitment for level in output.levels]
        total = reconstruction + self._settings.quantizer.commitment * sum(
            commitments, torch.zeros_like(reconstruction)
        )
        parts = {f"commitment_{name}": value for name, value in zip(self._names, commitments, strict=False)}
        return {"total": total, "reconstruction": reconstruction, **parts}

    def after_step(self) -> None:
        """The one codebook update of the step."""
        if self._quantized:
            books: list[Codebook] = list(self._model.codebooks)  # type: ignore[arg-type]
            self._levels = update_codebooks(books, self._statistics, self.engine.ranks.sum, self._updates)

    def figures(self) -> dict[str, float]:
        """Usage, perplexity, restarts and distance a level, over the last global batch."""
        named = zip(self._names, self._levels, strict=False)  # none before the first quantized step
        return {
            f"{name}/{key}": float(getattr(level, key))
            for name, level in named
            for key in ("used", "perplexity", "restarted", "distance")
        }

    def check(self, step: int) -> None:
        """The codebooks must be bit-identical on all ranks."""
        books = dict(zip(self._names, self._model.codebooks, strict=True))
        compare_codebooks(books, self.engine.ranks, step)  # type: ignore[arg-type]

    def validate(self) -> dict[str, float]:
        """PSNR and MSE (images in [0, 1]) over the held-out images, a mean over images."""
        sums = torch.zeros(3, dtype=torch.float64)
        for images in self._held_out():
            pixels = from_uint8(images, self.engine.ranks.device)
            with self.engine.autocast():
                rebuilt = self._model(pixels, quantized=self._quantized).images
            mse = ((rebuilt.float().clamp(-1, 1) - pixels) / 2).square().flatten(1).mean(dim=1).double().cpu()
            psnr = -10 * mse.clamp(min=1e-10).log10()
            sums += torch.stack([mse.sum(), psnr.sum(), torch.tensor(len(mse)).double()])
        mse_sum, psnr_sum, count = self.engine.ranks.sum(sums.to(self.engine.ranks.device)).tolist()
        return {"mse": mse_sum / count, "psnr": psnr_sum / count}

    @torch.no_grad()
    def pictures(self, step: int, tracker: Tracker) -> None:
        """The fixed images beside their reconstructions, their code grids, and how often codes are used."""
        pixels = from_uint8(self._fixed, self.engine.ranks.device)
        self._model.eval()
        with self.engine.autocast():
            output = self._model(pixels, quantized=self._quantized)
        self._model.train()
        pairs = np.stack([self._fixed, to_uint8(output.images)], axis=1)
        tracker.picture(step, "images/input_and_reconstruction", tile(pairs.reshape(-1, *pairs.shape[2:]), columns=8))
        for name, level in zip(self._names, output.levels, strict=False):
            grids = colour_codes(level.codes.cpu().numpy(), self._fixed.shape[1])
            tracker.picture(step, f"codes/{name}", tile(grids, columns=8))
        for name, figures in zip(self._names, self._levels, strict=False):
            tracker.histogram(step, f"{name}/assignments", figures.counts.cpu().numpy())

    @property
    def _quantized(self) -> bool:
        """Whether the current step quantizes; the first ones may let the latents pass."""
        return self._updates >= 0

    def _donors(self, batch: DeviceBatch) -> Donors:
        return Donors(batch.index, self._settings.training.global_batch, mix(self._seed, batch.step))
