"""The adversarial term (VQGAN, Esser et al. 2021, section 3.1), with a discriminator that lives outside of the engine.

Every rank holds the whole discriminator and its AdamW. Gradients are averaged by one fused all-reduce a step, so all
replicas stay equal, under any strategy that spreads the tokenizer. A batch goes through the tokenizer once: the
discriminator learns from the same reconstructions, cut off from their graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqscale.config.vqvae2 import Adversarial
from vqscale.errors import UserError
from vqscale.models.discriminator import PatchDiscriminator
from vqscale.models.losses import adaptive_weight, carry, discriminator_loss, generator_loss, kernel_gradient
from vqscale.models.vqvae import Output
from vqscale.seeds import mix
from vqscale.training.engine import Engine

_BETAS = (0.5, 0.9)
"""AdamW's in VQGAN, for the discriminator."""
_WEIGHTS, _MOMENTS = "discriminator.", "discriminator_adamw."


class DiscriminatorMismatchError(RuntimeError):
    """The discriminators of two ranks are no longer bit-identical."""


@dataclass(frozen=True)
class Verdict:
    """What a batch of reconstructions is worth."""

    total: Tensor
    """Scalar: fidelity plus weighted adversarial term, with their gradient."""
    figures: dict[str, Tensor]
    """Scalars for the log."""


class Adversary:
    """Discriminator, its optimizer, and the balance between the two networks.

    Args:
        settings: the recipe's.
        engine: for ranks and autocast.
        seed: the run's seed.
    """

    def __init__(self, settings: Adversarial, engine: Engine, seed: int) -> None:
        self._settings, self._engine = settings, engine
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(seed, "discriminator"))
            self.network = PatchDiscriminator(settings.width, settings.layers)
        self.network.to(engine.ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._weights = list(self.network.parameters())
        self._optimizer = torch.optim.AdamW(self._weights, lr=0.0, betas=_BETAS, weight_decay=0.0, foreach=True)
        self._batches = 0
        self.skipped = 0
        """Steps of the discriminator that were not taken, since its gradient was not finite; of this attempt."""

    def active(self, step: int) -> bool:
        """Whether there is an adversarial term at step `step`."""
        return step >= self._settings.start

    def begin(self) -> None:
        """Forget the gradients of a step that was not finished."""
        self._optimizer.zero_grad()
        self._batches = 0

    def judge(
        self,
        output: Output,
        layer: nn.ConvTranspose2d,
        images: Tensor,
        fidelity: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    ) -> Verdict:
        """Compare reconstructions with images, and collect the discriminator's gradient; one small all-reduce.

        Args:
            output: of the tokenizer, whose last layer is `layer`.
            layer: the last layer.
            images: what was to be reconstructed, fp32.
            fidelity: the other terms as a function of the reconstructions: their weighted sum, and figures.
        """
        rebuilt = output.images.float()
        leaf = rebuilt.detach().requires_grad_()
        value, figures = fidelity(leaf)
        with self._engine.autocast():
            fake, real = self.network(leaf), self.network(images)
        fooled, learned = generator_loss(fake), discriminator_loss(real, fake)
        (own,) = torch.autograd.grad(value, leaf)
        (other,) = torch.autograd.grad(fooled, leaf, retain_graph=True)
        learned.backward(inputs=self._weights)
        self._batches += 1
        weight = self._settings.weight * self._balance(layer, output.features, own, other)
        total = carry(value.detach() + weight * fooled.detach(), rebuilt, own + weight * other)
        figures |= {"adversarial": fooled, "discriminator": learned, "adversarial_weight": weight}
        return Verdict(total, {name: figure.detach() for name, figure in figures.items()})

    def step(self, rate: float) -> None:
        """One step of the discriminator with the tokenizer's learning rate, from the batches since `begin`.

        It is left out where the gradient is not finite. All ranks decide alike, since what they look at is the sum.
        """
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        fused = self._engine.ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        fused /= self._engine.ranks.world * self._batches
        if not torch.linalg.vector_norm(fused).isfinite():
            self.skipped += 1
            return
        for gradient, piece in zip(gradients, fused.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view(gradient.shape))
        self._optimizer.param_groups[0]["lr"] = rate * self._settings.relative_learning_rate
        self._optimizer.step()

    def check(self, step: int) -> None:
        """Compare a hash of the weights over all ranks.

        Raises:
            DiscriminatorMismatchError: names rank and step. Every rank raises it.
        """
        digest = hashlib.sha256()
        for weight in self._weights:
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        for rank, theirs in enumerate(everyones := self._engine.ranks.gather(digest.hexdigest())):
            if theirs != everyones[0]:
                raise DiscriminatorMismatchError(
                    f"step {step}: the discriminator on rank {rank} differs from rank 0's; "
                    f"resume from the last checkpoint"
                )

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, for a checkpoint."""
        named = dict(self.network.named_parameters())
        moments = {
            f"{_MOMENTS}{name}.{key}": value
            for name, weight in named.items()
            for key, value in self._optimizer.state[weight].items()
        }
        return {f"{_WEIGHTS}{name}": weight.detach() for name, weight in named.items()} | moments

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            UserError: there is no discriminator in it, or another one.
        """
        for name, weight in self.network.named_parameters():
            theirs = state.get(f"{_WEIGHTS}{name}")
            if theirs is None or theirs.shape != weight.shape:
                raise UserError(
                    f"the checkpoint has {'no' if theirs is None else 'another'} discriminator ({name})",
                    where="tokenizer.losses.adversarial",
                    mend="resume with the settings it was trained with",
                )
            weight.copy_(theirs)
            prefix = f"{_MOMENTS}{name}."
            found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if found:
                self._optimizer.state[weight] = {key: _like(weight, value) for key, value in found.items()}

    def _balance(self, layer: nn.ConvTranspose2d, features: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """The adaptive weight over all ranks' batches."""
        if not self._settings.adaptive:
            return torch.ones((), device=own.device)
        pulls = torch.stack([kernel_gradient(layer, features, gradient) for gradient in (own, other)])
        fidelity, adversarial = self._engine.ranks.sum(pulls) / self._engine.ranks.world
        return adaptive_weight(fidelity, adversarial)


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """A copy of a moment in the memory layout of its weight; the step count stays a scalar on the CPU."""
    return torch.empty_like(weight).copy_(value) if value.shape == weight.shape else value.cpu().clone()
