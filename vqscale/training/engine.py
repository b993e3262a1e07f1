"""The seam over Accelerate: it wraps model and optimizer and nothing else.

Accelerate's loader wrapping and its `save_state` are not used: the data order and the checkpoints are ours.
After wrapping, the kind that was got is checked against the one asked for, since Accelerate can silently give
another.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from vqscale.config.recipe import Training
from vqscale.training.distributed import Ranks

_EXPECTED = {("ddp", "cpu"): DistributedType.MULTI_CPU, ("ddp", "cuda"): DistributedType.MULTI_GPU}


class Engine:
    """Model, optimizer and learning rate of one stage, spread over the ranks.

    Args:
        model: the bare network; its buffers and parameters are made equal on all ranks here.
        training: optimisation settings.
        ranks: this process's place; the process group exists already.
        strategy: how the model is spread.
    """

    def __init__(self, model: nn.Module, training: Training, ranks: Ranks, strategy: str = "ddp") -> None:
        self.training, self.ranks, self.bare = training, ranks, model
        self._accelerator = _accelerator(ranks, strategy)
        model.to(ranks.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._autocast = training.precision == "bf16"
        with warnings.catch_warnings():
            # Accelerate still passes DDP the old name of `forward_sync_buffers`.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model, self.optimizer = self._accelerator.prepare(model, _optimizer(model, training))
        self.broadcast_buffers()

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 for the networks where the recipe asks for it."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self._autocast)

    def broadcast_buffers(self) -> None:
        """Give every rank the buffers of rank 0; DDP is told not to (it would do so before every forward)."""
        for buffer in self.bare.buffers():
            torch.distributed.broadcast(buffer, 0)

    def broadcast(self) -> None:
        """Give every rank the parameters and buffers of rank 0, after resuming."""
        for parameter in self.bare.parameters():
            torch.distributed.broadcast(parameter.detach(), 0)
        self.broadcast_buffers()

    def optimise(self, loss: Tensor, step: int) -> Tensor:
        """Backward, clip, one optimizer step with the schedule's learning rate; returns the gradient norm."""
        self._accelerator.backward(loss)
        limit = self.training.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.bare.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def learning_rate(training: Training, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then the schedule down to its final fraction."""
    peak, warmup, final = training.learning_rate, training.warmup, training.final_learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, training.steps - warmup))
    fall = progress if training.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return peak * (1 - fall * (1 - final))


def _accelerator(ranks: Ranks, strategy: str) -> Accelerator:
    PartialState(cpu=ranks.device.type == "cpu", backend=torch.distributed.get_backend())
    accelerator = Accelerator(
        cpu=ranks.device.type == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    expected = _EXPECTED[strategy, ranks.device.type]
    if accelerator.distributed_type is not expected:
        raise RuntimeError(f"asked for {strategy} ({expected}), Accelerate gave {accelerator.distributed_type}")
    return accelerator


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); only kernels and matrices are decayed."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() >= 2 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)
