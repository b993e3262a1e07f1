"""Stage one as a task of the loop: reconstruct images, then move the codebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from vqscale.config.recipe import Tokenizer
from vqscale.config.tokenizer import grid_sides
from vqscale.errors import UserError
from vqscale.models.losses import PIXEL_LOSSES
from vqscale.models.lpips import LPIPS, load_lpips
from vqscale.models.pixels import from_uint8
from vqscale.models.quantizer import Codebook, Donors, Quantized, Statistics, update_codebooks
from vqscale.models.vqvae import VQVAE, Output
from vqscale.seeds import mix
from vqscale.training.adversary import Adversary
from vqscale.training.averaging import AveragedWeights
from vqscale.training.engine import Engine
from vqscale.training.guards import compare_codebooks
from vqscale.training.optimizers import learning_rate
from vqscale.training.pieces import Piece
from vqscale.training.task import Task
from vqscale.training.tokenizer_pictures import draw_codebooks, draw_images, draw_levels, draw_usage
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch
from vqscale.training.utilisation import forward_flops
from vqscale.training.windows import CodeWindow, PixelWindow


class TokenizerTask(Task):
    """VQ-VAE-2 training (Razavi et al. 2019, equation 2, with the codebook term replaced by EMA, if not asked for).

    With `ema_decay`, validation and pictures use the averaged weights and the plain codebooks, as extraction and export
    do (`averaging.AveragedWeights`).

    Args:
        engine: over a `VQVAE`.
        settings: the recipe's tokenizer.
        seed: the run's seed.
        held_out: makes an iteration over this rank's share of the held-out images, uint8 [B, S, S, 3].
        fixed: images uint8 [n, S, S, 3] that are drawn into TensorBoard again and again.

    Raises:
        UserError: weights of the perceptual term are missing, or settings do not fit the strategy.
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
        device, losses = engine.ranks.device, settings.losses
        self._sizes = {level.name: level.codes for level in settings.levels}
        self._window = CodeWindow(self._sizes, settings.quantizer.window, device)
        self._pixels = PixelWindow(settings.quantizer.window, device)
        self._perceptual: LPIPS | None = None
        if losses.perceptual:
            where = "tokenizer.losses.perceptual.weights"
            self._perceptual = load_lpips(losses.perceptual.paths, where).to(device)
        self._adversary = Adversary(losses.adversarial, engine, seed) if losses.adversarial else None
        grids = grid_sides(settings.levels, fixed.shape[1])
        self.parts = {"tokens": sum(side**2 for side in grids)}
        self._averaged = AveragedWeights(engine.weights, settings.ema_decay) if settings.ema_decay else None
        self._statistics: list[Statistics] = []
        self._step = self._updates = 0
        self._ready = False  # whether what goes beside the network belongs to its step
        self.warnings: dict[str, str] = {}
        """Level → what is wrong with it, since the last figures."""

    def before_step(self, batch: DeviceBatch) -> None:
        """Forget what an unfinished step left; at the first quantized step, set the first codes from its latents."""
        self._ready |= batch.step == 0
        self._require_state()
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
            levels = update_codebooks(books, self._statistics, self.engine.ranks.sum, self._updates, rate)
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
        return {"reconstruction/mse_over_variance": error, **named}

    def check(self, step: int) -> None:
        """The codebooks and the discriminator must be bit-identical on all ranks."""
        books = dict(zip(self._sizes, self._model.codebooks, strict=True))
        compare_codebooks(books, self.engine.ranks, step)  # type: ignore[arg-type]
        if self._adversary:
            self._adversary.check(step)

    def sample_flops(self) -> int:
        """Of the convolutions of encoders and decoders, for one image; the search and the other losses are left out."""
        with self.engine.evaluated() as network:
            return forward_flops(network, from_uint8(self._fixed[:1], self.engine.ranks.device))

    def validate(self) -> dict[str, float]:
        """PSNR and MSE (images in [0, 1]) over the held-out images, a mean over images; LPIPS if it is trained on."""
        names = ["mse", "psnr", *(["lpips"] if self._perceptual else [])]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        with self._judged() as network:
            for images in self.watched(self._held_out()):
                measured = self._measure(network, from_uint8(images, self.engine.ranks.device))
                sums += torch.stack([*(values.sum() for values in measured), torch.tensor(len(images)).double()])
        *values, count = self.engine.ranks.sum(sums.to(self.engine.ranks.device)).tolist()
        return {name: value / count for name, value in zip(names, values, strict=True)}

    @torch.no_grad()
    def pictures(self, step: int, tracker: Tracker | None) -> None:
        """The fixed images beside their reconstructions, what each level carries, and how often codes are used."""
        with self._judged() as network:
            if tracker:
                self._draw(network, step, tracker)

    def _draw(self, network: VQVAE, step: int, tracker: Tracker) -> None:
        with self.engine.autocast():
            output: Output = network(from_uint8(self._fixed, self.engine.ranks.device), quantized=self._quantized)
            draw_images(tracker, step, self._fixed, output)
            if self._quantized:
                draw_levels(tracker, step, list(self._sizes), network, [level.codes for level in output.levels])
        counts = self._window.counts()
        draw_usage(tracker, step, counts)
        if counts and step == self._settings.training.steps:
            draw_codebooks(tracker, step, network, counts)

    def pieces(self) -> list[Piece]:
        """The averaged weights."""
        return self._averaged.pieces() if self._averaged else []

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

    def _require_state(self) -> None:
        """Average and discriminator of another step than the network's would go wrong in silence."""
        if not self._ready and (self._averaged or self._adversary):
            raise UserError(
                "resumed without the state of `ema_decay` or `losses.adversarial`",
                where="tokenizer",
                mend="resume from a checkpoint that was trained with these settings",
            )

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

    def _measure(self, network: VQVAE, pixels: Tensor) -> list[Tensor]:
        """fp64 [B] on the CPU: error, PSNR and LPIPS of each image's reconstruction."""
        with self.engine.autocast():
            rebuilt = network(pixels, quantized=self._quantized).images.float().clamp(-1, 1)
        mse = ((rebuilt - pixels) / 2).square().flatten(1).mean(dim=1).double().cpu()
        measured = [mse, -10 * mse.clamp(min=1e-10).log10()]
        if self._perceptual:
            with self.engine.autocast():
                measured.append(self._perceptual(rebuilt, pixels).double().cpu())
        return measured

    @contextmanager
    def _judged(self) -> Iterator[VQVAE]:
        """The network to judge, whole, in evaluation: with the averaged weights if there are any; collective."""
        self._require_state()
        averaged = self._averaged.applied() if self._averaged else nullcontext()
        with averaged, self.engine.evaluated() as network:
            yield network  # type: ignore[misc]

    def _watch(self, levels: Mapping[str, Mapping[str, float]]) -> None:
        """Warn, once each time it begins, of a level that collapses."""
        found = self._window.collapsed(levels, self._settings.quantizer.collapse_below)
        if self.engine.ranks.first:
            for name in found.keys() - self.warnings.keys():
                print(f"warning: step {self._step + 1}: {found[name]}", flush=True)
        self.warnings = found

    def _donors(self, batch: DeviceBatch) -> Donors:
        return Donors(batch.index, self._settings.training.global_batch, mix(self._seed, batch.step))
