"""Stage one of kind `vae` as a task of the loop: raise a bound on the likelihood, and watch what each level carries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.config.recipe import Recipe
from vqscale.config.vae import GaussianVAE
from vqscale.models import bounds
from vqscale.models.latent_watch import LatentWatch, divergence
from vqscale.models.latents import centres
from vqscale.models.noise import normals_at, normals_of
from vqscale.models.pixels import from_uint8
from vqscale.models.upload import upload
from vqscale.models.vae import VAE, Terms
from vqscale.seeds import mix
from vqscale.training.dashboard import Charts
from vqscale.training.engine import Engine
from vqscale.training.image_task import ImageTask, squared_errors
from vqscale.training.tokenizer_pictures import draw_images, draw_prior
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch

_STATE = "divergence."
_SETTLED = 100
"""Steps, behind those of the warm-up, after which a level without active units is warned about."""


class VAETask(ImageTask):
    """The evidence lower bound, or the importance-weighted one, in nats a dimension.

    All randomness of a sample follows from seed, step and its place in the global batch; that of a held-out image from
    its pixels.

    Args:
        engine: over a `VAE`.
        settings: the recipe's tokenizer.
        levels, seed, held_out, fixed: as for `ImageTask`.
    """

    beside = "`ema_decay` or `free_bits`"

    def __init__(
        self,
        engine: Engine,
        settings: GaussianVAE,
        levels: Sequence[str],
        seed: int,
        held_out: Callable[[], Iterable[NDArray[np.uint8]]],
        fixed: NDArray[np.uint8],
    ) -> None:
        super().__init__(engine, settings, levels, seed, held_out, fixed)
        self._settings = settings
        self._shapes = [(level.channels, level.grid) for level in settings.levels_of(fixed.shape[1])]
        self._values = sum(channels * side**2 for channels, side in self._shapes)
        self._dimensions = fixed[0].size
        device = engine.ranks.device
        self._watch, self._met, self._held_out_watch = (LatentWatch(levels, self._shapes, device) for _ in range(3))
        self._latest = [torch.full((channels,), math.inf, device=device) for channels, _ in self._shapes]
        self._step = 0
        self.warnings: dict[str, str] = {}
        """Level → what is wrong with it, since the last figures."""

    @classmethod
    def charts(cls, recipe: Recipe) -> Charts:
        """The bound, and what each level carries of it."""
        names = [level.name for level in recipe.levels]
        return {
            "bits per dimension, training": ["Multiline", ["loss/bits_per_dim"]],
            "bits per dimension, held out": ["Multiline", ["validation/bits_per_dim"]],
            "reconstruction, nats a dimension": ["Multiline", ["loss/reconstruction"]],
            "held-out PSNR": ["Multiline", ["validation/psnr"]],
            "divergence from the prior, nats an image": ["Multiline", [f"{name}/kl" for name in names]],
            "share of active units": ["Multiline", [f"{name}/active" for name in names]],
        }

    def before_step(self, batch: DeviceBatch) -> None:
        """Forget what an unfinished step left."""
        self._ready |= batch.step == 0
        self.require_state()
        self._step = batch.step
        self._watch.forget()

    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """What is minimised (`total`) in nats a dimension, the bound in bits a dimension, and its parts."""
        device = self.engine.ranks.device
        images = from_uint8(batch.fields["image"], device)
        with self.engine.autocast():
            terms: Terms = self.engine.model(images, self._noise(batch))
        self._watch.see([posterior.detach() for posterior in terms.posteriors])
        divergences = [divergence(posterior) for posterior in terms.posteriors]
        total = self._total(terms, divergences) / self._dimensions
        with torch.no_grad():
            bound = bounds.iwae(terms.likelihood, terms.ratio) if self._importance else bounds.elbo(terms, divergences)
            parts = {
                "bits_per_dim": -bound.mean() / self._dimensions / math.log(2),
                "reconstruction": -terms.likelihood.mean() / self._dimensions,
                **{f"kl_{name}": own.sum(1).mean() for name, own in zip(self._names, divergences, strict=True)},
            }
        return {"total": total, **parts}

    def after_step(self) -> None:
        """Take in the divergences of the global batch, which free bits go by; one small all-reduce."""
        self._watch.meet(self.engine.ranks.sum)
        # What is told of is a batch that has met: a step that is not taken leaves sums of this rank alone behind.
        self._watch, self._met = self._met, self._watch
        self._latest = self._met.divergences()
        if self._averaged:
            self._averaged.update(self._step)

    def figures(self) -> dict[str, float]:
        """By the last global batch that was learned from: each level's nats an image, and its share of active units."""
        levels = self._met.figures()
        self._warn(levels)
        named = {f"{name}/{key}": value for name, level in levels.items() for key, value in level.items()}
        return {"kl_weight": self._weight, **named}

    def inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images, and noise of none: what is counted does not depend on it."""
        return images, images.new_zeros(len(images), self._settings.samples, self._values)

    @property
    def measured(self) -> tuple[str, ...]:
        """Error of the posteriors' means, the bound by one draw, and each level's divergence in nats an image."""
        return ("mse", "psnr", "bits_per_dim", *(f"kl_{name}" for name in self._names))

    def measure(self, network: VAE, images: NDArray[np.uint8]) -> list[Tensor]:
        """Of each image what is `measured`."""
        pixels = from_uint8(images, self.engine.ranks.device)
        noise = normals_of(images, self._values).to(pixels.device)[:, None]
        with self.engine.autocast():
            terms = network(pixels, noise)
            rebuilt = network.decode(centres(terms.posteriors))
        self._held_out_watch.see(terms.posteriors)
        divergences = [divergence(posterior) for posterior in terms.posteriors]
        bits = -bounds.elbo(terms, divergences) / self._dimensions / math.log(2)
        each = (bits, *(own.sum(dim=1) for own in divergences))
        return [*squared_errors(rebuilt, pixels), *(value.double().cpu() for value in each)]

    def validate(self) -> dict[str, float]:
        """What is `measured`, a mean over held-out images, and each level's share of active units over all of them."""
        self._held_out_watch.forget()
        figures = super().validate()
        self._held_out_watch.meet(self.engine.ranks.sum)
        return figures | {f"active_{name}": level["active"] for name, level in self._held_out_watch.figures().items()}

    def draw(self, network: VAE, step: int, tracker: Tracker) -> None:
        """The fixed images beside their reconstructions; what the prior N(0, 1) makes; divergences by channel."""
        count, device = len(self._fixed), self.engine.ranks.device
        with self.engine.autocast():
            pixels = from_uint8(self._fixed, device)
            draw_images(tracker, step, self._fixed, network.decode(centres(network.encode(pixels))))
            noise = normals_of(np.arange(count), self._values).to(device)
            parts = noise.split([channels * side**2 for channels, side in self._shapes], dim=1)
            drawn = [part.view(count, c, side, side) for part, (c, side) in zip(parts, self._shapes, strict=True)]
            draw_prior(tracker, step, network.decode(drawn))
        for name, channels in zip(self._names, self._latest, strict=True):
            tracker.histogram(step, f"{name}/kl_by_channel", channels.cpu().numpy())

    def extra_state(self) -> dict[str, Tensor]:
        """The divergences that the next step's free bits go by; the same on all ranks."""
        return {f"{_STATE}{name}": value for name, value in zip(self._names, self._latest, strict=True)}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `extra_state` gave."""
        found = [state.get(f"{_STATE}{name}") for name in self._names]
        if all(value is not None for value in found):
            self._latest = [value.to(own) for value, own in zip(found, self._latest, strict=True) if value is not None]
            self._ready = True

    @property
    def keeps(self) -> bool:
        """Whether there is a state beside the network's."""
        return super().keeps or bool(self._settings.free_bits)

    @property
    def _importance(self) -> bool:
        return self._settings.objective == "iwae"

    @property
    def _weight(self) -> float:
        """Of the divergence at this step."""
        warmup = self._settings.kl_warmup
        return self._settings.beta * min(1.0, self._step / warmup if warmup else 1.0)

    def _total(self, terms: Terms, divergences: Sequence[Tensor]) -> Tensor:
        """Scalar, in nats an image."""
        if self._importance:
            return -bounds.iwae(terms.likelihood, self._weight * terms.ratio).mean()
        counted = zip(divergences, self._latest, strict=True)
        free = self._settings.free_bits
        kept = [bounds.free_bits(own.mean(dim=0), latest, free).sum() for own, latest in counted]
        return -terms.likelihood.mean() + self._weight * torch.stack(kept).sum()

    def _noise(self, batch: DeviceBatch) -> Tensor:
        """Standard normal [B, K, values], from seed, step and the samples' global indices alone."""
        seed, samples = mix(self._seed, batch.step, "posterior"), self._settings.samples
        numbers = normals_at(seed, batch.index, samples * self._values)
        return upload(numbers.view(-1, samples, self._values), self.engine.ranks.device)

    def _warn(self, levels: Mapping[str, Mapping[str, float]]) -> None:
        """Warn, once each time it begins, of a level whose posterior has become the prior."""
        settled = self._step >= self._settings.kl_warmup + _SETTLED
        found = {name: _collapse(name, level) for name, level in levels.items() if settled and not level["active"]}
        if self.engine.ranks.first:
            for name in found.keys() - self.warnings.keys():
                print(f"warning: step {self._step + 1}: {found[name]}", flush=True)
        self.warnings = found


def _collapse(name: str, level: Mapping[str, float]) -> str:
    return (
        f"level '{name}' carries nothing: no unit is active, divergence {level['kl']:.3f} nats an image; raise "
        f"tokenizer.free_bits or tokenizer.kl_warmup, or lower tokenizer.beta"
    )
