"""A running average of the weights, used in their place wherever the tokenizer is judged or used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqscale.errors import UserError
from vqscale.training.pieces import EXTRA, MODEL, Piece

_PREFIX = "average."


class AveragedWeights:
    """EMA of a network's parameters in fp32 (Polyak & Juditsky 1992), beside the network.

    Validation, pictures, extraction and export use the average (`applied`, `apply_average`); training goes on with the
    plain weights. All of them use the same codebooks, those of the plain training, for two reasons. A codebook is an
    average itself, over the latents of the last 1 / (1 - decay) steps; that is what it has in common with an encoder
    averaged over as many. And codes jump when they are restarted: the mean of the two places is where no latent ever
    was, while the averaged decoder has seen each of them.

    Each rank averages what it holds of the weights, so a strategy that shards them shards their average.

    Args:
        weights: gives what this rank holds of the weights; asked again each time, since a strategy may move them.
        decay: the weight of the past, a step; less in the first steps: min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, weights: Callable[[], list[Piece]], decay: float) -> None:
        self._weights, self._decay = weights, decay
        self._average = [weight.local.float().clone() for weight in weights()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 0. Before it the average of step 0 is its own weights."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [weight.float() for weight in self._live()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The pieces of the weights are the average; afterwards the own ones again, bit by bit.

        `Engine.whole` inside of it is the averaged network.
        """
        live = self._live()
        own = [weight.clone() for weight in live]
        torch._foreach_copy_(live, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(live, own)

    def pieces(self) -> list[Piece]:
        """The average, as `extra/average.NAME`."""
        return [
            Piece(f"{EXTRA}/{_PREFIX}{weight.name.removeprefix(f'{MODEL}/')}", weight.shape, weight.start, average)
            for weight, average in zip(self._weights(), self._average, strict=True)
        ]

    def _live(self) -> list[Tensor]:
        return [weight.local for weight in self._weights()]


@torch.no_grad()
def apply_average(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network the averaged weights of a checkpoint, for good.

    Args:
        network: whole.
        state: the checkpoint's `extra`.

    Raises:
        UserError: the checkpoint has none.
    """
    for name, weight in network.named_parameters():
        average = state.get(f"{_PREFIX}{name}")
        if average is None:
            raise UserError(
                f"the checkpoint has no running average of the weights ({name})",
                where="tokenizer.ema_decay",
                mend="use the settings it was trained with",
            )
        weight.copy_(average)
