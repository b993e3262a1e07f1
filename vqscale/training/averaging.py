"""A running average of the weights, used in their place wherever the tokenizer is judged or used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vqscale.errors import UserError

_PREFIX = "average."


class AveragedWeights:
    """EMA of a network's parameters in fp32 (Polyak & Juditsky 1992), beside the network.

    Validation, pictures, extraction and export use the average (`applied`, `apply_average`); training goes on with the
    plain weights. All of them use the same codebooks, those of the plain training, for two reasons. A codebook is an
    average itself, over the latents of the last 1 / (1 - decay) steps; that is what it has in common with an encoder
    averaged over as many. And codes jump when they are restarted: the mean of the two places is where no latent ever
    was, while the averaged decoder has seen each of them.

    Args:
        network: whose parameters are averaged; each rank has to hold them whole.
        decay: the weight of the past, a step; less in the first steps: min(decay, (1 + n) / (10 + n)).

    Raises:
        UserError: the parameters are spread over the ranks.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._names, self._weights = _whole_parameters(network)
        self._decay = decay
        self._average = [weight.float().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 0. Before it the average of step 0 is its own weights."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [weight.float() for weight in self._weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the average for its weights; afterwards its own ones again, bit by bit."""
        own = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, own)

    def state(self) -> dict[str, Tensor]:
        """The average by `average.NAME`, for a checkpoint."""
        return {f"{_PREFIX}{name}": value for name, value in zip(self._names, self._average, strict=True)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for mine, theirs in zip(self._average, _values(self._names, state), strict=True):
            mine.copy_(theirs)


@torch.no_grad()
def apply_average(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network the averaged weights of a checkpoint, for good.

    Raises:
        UserError: the checkpoint has none.
    """
    names, weights = _whole_parameters(network)
    for weight, value in zip(weights, _values(names, state), strict=True):
        weight.copy_(value)


def _values(names: list[str], state: Mapping[str, Tensor]) -> list[Tensor]:
    missing = [name for name in names if f"{_PREFIX}{name}" not in state]
    if missing:
        raise UserError(
            f"the checkpoint has no running average of the weights ({missing[0]} and {len(missing) - 1} more)",
            where="tokenizer.ema_decay",
            mend="resume with the settings it was trained with",
        )
    return [state[f"{_PREFIX}{name}"] for name in names]


def _whole_parameters(network: nn.Module) -> tuple[list[str], list[Tensor]]:
    named = dict(network.named_parameters())
    if any(isinstance(value, DTensor) or hasattr(value, "ds_id") for value in named.values()):
        raise UserError(
            "a running average needs whole weights on every rank, this strategy spreads them",
            where="tokenizer.ema_decay",
            mend="set it to 0, or resources.strategy to ddp, zero1 or zero2",
        )
    return list(named), [value.detach() for value in named.values()]
