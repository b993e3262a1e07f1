"""Stage one as a task of the loop: reconstruct images, then move the codebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.config.recipe import Recipe
from vqscale.config.vqvae2 import VQVAE2
from vqscale.models.losses import PIXEL_LOSSES
from vqscale.models.lpips import LPIPS, load_lpips
from vqscale.models.pixels import from_uint8
from vqscale.models.quantizer import Codebook, Donors, LevelFigures, Quantized, Statistics, update_codebooks
from vqscale.models.vqvae import VQVAE, Output
from vqscale.seeds import mix
from vqscale.training.adversary import Adversary
from vqscale.training.dashboard import Charts
from vqscale.training.engine import Engine
from vqscale.training.guards import compare_codebooks
from vqscale.training.image_task import ImageTask, squared_errors
from vqscale.training.optimizers import learning_rate
from vqscale.training.tokenizer_pictures import draw_codebooks, draw_images, draw_levels, draw_usage
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch
from vqscale.training.windows import CodeWindow, PixelWindow


class TokenizerTask(ImageTask):
    """VQ-VAE-2 training (Razavi et al. 2019, equation 2, with the codebook term replaced by EMA, if not asked for).

    Args:
        engine: over a `VQVAE`.
        settings: the recipe's tokenizer.
        levels, seed, held_out, fixed: as for `ImageTask`.

    Raises:
        UserError: weights of the perceptual term are missing, or settings do not fit the strategy.
    """

    beside = "`ema_decay` or `losses.adversarial`"

    def __init__(
        self,
        engine: Engine,
        settings: VQVAE2,
        levels: Sequence[str],
        seed: int,
        held_out: Callable[[], Iterable[NDArray[np.uint8]]],
        fixed: NDArray[np.uint8],
    ) -> None:
        super().__init__(engine, settings, levels, seed, held_out, fixed)
        self._settings = settings
        self._model: VQVAE = engine.bare  # type: ignore[assignment]
        device, losses = engine.ranks.device, settings.losses
        self._sizes = {level.name: level.codes for level in settings.levels}
        self._window = CodeWindow(self._sizes, settings.quantizer.window, device)
        self._pixels = PixelWindow(settings.quantizer.window, device)
        self._perceptual: LPIPS | None = None
        if losses.perceptual:
            where = "tokenizer.losses.perceptual.weights"
            self._perceptual = load_lpips(losses.perceptual.paths, where).to(device)
        self._adversary = Adversary(losses.adversarial, engine, seed) if losses.adversarial else None
        self._statistics: list[Statistics] = []
        self._levels: list[LevelFigures] = []  # of the last update
        self._step = self._updates = 0
        self.warnings: dict[str, str] = {}
        """Level → what is wrong with it, since the last figures."""

    @classmethod
    def charts(cls, recipe: Recipe) -> Charts:
        """Losses, and how each level's codes are used."""
        names = [level.name for level in recipe.levels]
        of_the_prior = "|".join(["total", *names])

        def every(figure: str) -> list[Any]:
            return ["Multiline", [f"{name}/{figure}" for name in names]]

        return {
            "loss": ["Multiline", [rf"loss/(?!({of_the_prior})$).*"]],
            "held-out PSNR": ["Multiline", ["validation/psnr"]],
            "error over the images' variance": ["Multiline", ["reconstruction/mse_over_variance"]],
            "share of codes used": every("used"),
            "perplexity": every("perplexity"),
            "dead codes": every("dead"),
            "codes restarted a step": every("restarted"),
        }

    def before_step(self, batch: DeviceBatch) -> None:
        """Forget what an unfinished step left; at the first quantized step, set the first codes from its latents."""
        self._ready |= batch.step == 0
        self.require_state()
        self._step, self._statistics = batch.step, []
        self._pixels.forget()
        self._updates = batch.step - self._settings.quantizer.continuous_steps
        if self._adversary:
            self._adversary.begin()
        if self._updates == 0 and self._settings.quantizer.init != "random":
            self._initialise_codebooks(batch)

    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """The weighted terms (`total`) and each by itself; a step may have several batches, whose statistics add up."""
        images = from_uint8(batch.fields["image"], self.engine.ranks.device)
        with self.engine.autocast():
            output: Output = self.engine.model(images, self._donors(batch), quantized=self._quantized)
        self._collect(output.levels)
        self._pixels.see(output.images.detach().float(), images)
        fidelity, figures = self._judge(output, images)
        commitments = [level.commitment for level in output.levels]
        weighted = zip(self._commitment_weights(), commitments, strict=False)
        total = fidelity + sum((weight * value for weight, value in weighted), torch.zeros_like(fidelity))
        parts = {f"commitment_{name}": value for name, value in zip(self._sizes, commitments, strict=False)}
        return {"total": total, **figures, **parts}

    def after_step(self) -> None:
        """The one codebook update of the step, then those of the discriminator and the averaged weights."""
        rate = learning_rate(self._settings.training, self._step)
        self._pixels.keep(self._step)
        if self._quantized:
            books: list[Codebook] = list(self._model.codebooks)  # type: ignore[arg-type]
            levels = self._levels = update_codebooks(
                books, self._statistics, self.engine.ranks.sum, self._updates, rate
            )
            self._window.add(self._step, levels)
        if self._adversary and self._adversary.active(self._step):
            self._adversary.step(rate)
        if self._averaged:
            self._averaged.update(self._step)

    def figures(self) -> dict[str, float]:
        """How each level's codes are used, and the normalised error, over the last steps (`quantizer.window`)."""
        levels = self._window.figures()
        self._watch(levels)
        error = self._pixels.normalised_error(self.engine.ranks.sum)
        named = {f"{name}/{key}": value for name, level in levels.items() for key, value in level.items()}
        weights = zip(self._sizes, self._commitment_weights(), strict=True)
        named |= {f"{name}/commitment_weight": float(weight) for name, weight in weights}
        if self._adversary:
            named["optim/discriminator_skipped"] = self._adversary.skipped
        return {"reconstruction/mse_over_variance": error, **named}

    def check(self, step: int) -> None:
        """The codebooks and the discriminator must be bit-identical on all ranks."""
        books = dict(zip(self._sizes, self._model.codebooks, strict=True))
        compare_codebooks(books, self.engine.ranks, step)  # type: ignore[arg-type]
        if self._adversary:
            self._adversary.check(step)

    @property
    def measured(self) -> tuple[str, ...]:
        """Error and PSNR of images in [0, 1]; LPIPS if it is trained on."""
        return ("mse", "psnr", "lpips") if self._perceptual else ("mse", "psnr")

    def measure(self, network: VQVAE, images: NDArray[np.uint8]) -> list[Tensor]:
        """Error, PSNR and LPIPS of each image's reconstruction."""
        pixels = from_uint8(images, self.engine.ranks.device)
        with self.engine.autocast():
            rebuilt = network(pixels, quantized=self._quantized).images.float().clamp(-1, 1)
        measured = squared_errors(rebuilt, pixels)
        if self._perceptual:
            with self.engine.autocast():
                measured.append(self._perceptual(rebuilt, pixels).double().cpu())
        return measured

    def draw(self, network: VQVAE, step: int, tracker: Tracker) -> None:
        """The fixed images beside their reconstructions, what each level carries, and how often codes are used."""
        with self.engine.autocast():
            output: Output = network(from_uint8(self._fixed, self.engine.ranks.device), quantized=self._quantized)
            draw_images(tracker, step, self._fixed, output.images)
            if self._quantized:
                draw_levels(tracker, step, list(self._sizes), network, [level.codes for level in output.levels])
        counts = self._window.counts()
        draw_usage(tracker, step, counts)
        if counts and step == self._settings.training.steps:
            draw_codebooks(tracker, step, network, counts)

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside all pieces, the same on all ranks; one small all-reduce."""
        parts = [part.state() for part in (self._window, self._adversary) if part]
        parts.append(self._pixels.state(self.engine.ranks.sum))
        return {name: value for part in parts for name, value in part.items()}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `extra_state` gave; figures over a window begin anew where it is missing.

        Raises:
            UserError: the checkpoint was trained without the discriminator.
        """
        for part in (self._window, self._adversary):
            if part:
                part.load(state)
        self._pixels.load(state, self.engine.ranks.first)
        self._ready = True

    @property
    def _quantized(self) -> bool:
        """Whether the current step quantizes; the first ones may let the latents pass."""
        return self._updates >= 0

    @property
    def keeps(self) -> bool:
        """Whether there is a state beside the network's."""
        return super().keeps or self._adversary is not None

    def _initialise_codebooks(self, batch: DeviceBatch) -> None:
        quantizer = self._settings.quantizer
        images = from_uint8(batch.fields["image"], self.engine.ranks.device)
        iterations = quantizer.kmeans_iterations if quantizer.init == "kmeans" else 0
        with torch.no_grad(), self.engine.whole() as network, self.engine.autocast():
            network.initialise_codebooks(  # type: ignore[operator]
                images, self._donors(batch), self.engine.ranks.sum, iterations
            )

    def _collect(self, levels: list[Quantized]) -> None:
        seen = [level.statistics for level in levels if level.statistics is not None]
        earlier = self._statistics
        self._statistics = [a + b for a, b in zip(earlier, seen, strict=True)] if earlier else seen

    def _commitment_weights(self) -> list[Tensor]:
        """Beta of each level; less where the last update found few codes in use (`relief_below`).

        A level begins to collapse when its latents move away from most of its codes. The commitment then pulls all of
        them to the few that are left, faster than restarts bring codes to them, and the network learns to do without
        the level. What the weight follows is a figure of the global batch, so it is the same on all ranks.
        """
        beta, below = self._settings.quantizer.commitment, self._settings.quantizer.relief_below
        return [
            beta * (used / below).clamp(max=1) if below else beta * torch.ones_like(used)
            for used in self._window.latest()
        ]

    def _judge(self, output: Output, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms that look at images: their weighted sum, and each by itself."""
        if self._adversary and self._adversary.active(self._step):
            layer = self._model.to_pixels
            verdict = self._adversary.judge(output, layer, images, lambda rebuilt: self._fidelity(rebuilt, images))
            return verdict.total, verdict.figures
        return self._fidelity(output.images.float(), images)

    def _fidelity(self, rebuilt: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self._settings.losses
        reconstruction = PIXEL_LOSSES[losses.reconstruction](rebuilt, images)
        figures = {"reconstruction": reconstruction}
        total = losses.reconstruction_weight * reconstruction
        if self._perceptual and losses.perceptual:
            with self.engine.autocast():
                figures["perceptual"] = self._perceptual(rebuilt, images).mean()
            total = total + losses.perceptual.weight * figures["perceptual"]
        return total, figures

    def _watch(self, levels: Mapping[str, Mapping[str, float]]) -> None:
        """Warn, once each time it begins, of a level that collapses."""
        found = self._window.collapsed(levels, self._settings.quantizer.collapse_below)
        if self.engine.ranks.first:
            for name in found.keys() - self.warnings.keys():
                print(f"warning: step {self._step + 1}: {found[name]}", flush=True)
        self.warnings = found

    def _donors(self, batch: DeviceBatch) -> Donors:
        return Donors(batch.index, self._settings.training.global_batch, mix(self._seed, batch.step))
