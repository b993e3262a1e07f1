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
from vqscale.errors import UserError
from vqscale.training.distributed import Ranks
from vqscale.training.pieces import Piece

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
        self.training, self.ranks, self.bare, self.strategy = training, ranks, model, strategy
        self._accelerator = _accelerator(ranks, strategy)
        model.to(ranks.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._autocast = training.precision == "bf16"
        with warnings.catch_warnings():
            # Accelerate still passes DDP the old name of `forward_sync_buffers`.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            optimizers = make_optimizers(model, training)
            self.model, *prepared = self._accelerator.prepare(model, *optimizers.values())
        self._optimizers = dict(zip(optimizers, prepared, strict=True))
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
        rate = learning_rate(self.training, step)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def pieces(self) -> list[Piece]:
        """What a checkpoint holds of the network and the optimizers, as this rank holds it: all of it, under DDP."""
        found = {f"model/{name}": value for name, value in self.bare.state_dict().items()}
        names = {parameter: name for name, parameter in self.bare.named_parameters()}
        for label, optimizer in self._optimizers.items():
            for parameter, entries in optimizer.state.items():
                found |= {f"optimizer/{label}/{key}/{names[parameter]}": value for key, value in entries.items()}
        return [Piece(name, tuple(value.shape), 0, value.detach()) for name, value in found.items()]

    def materialise_optimizer(self) -> None:
        """Make the optimizers' tensors, which there are not before the first step: by one that moves nothing."""
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()

    def loaded(self) -> None:
        """Called when the pieces have got the values of a checkpoint; the ranks are made equal bit by bit."""
        self.broadcast()


def learning_rate(training: Training, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then the schedule down to its final fraction."""
    peak, warmup, final = training.learning_rate, training.warmup, training.final_learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, training.steps - 1 - warmup))
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


def make_optimizers(model: nn.Module, training: Training) -> dict[str, torch.optim.Optimizer]:
    """The recipe's optimizers by name.

    `adamw` (Loshchilov & Hutter 2019) takes everything, or with `muon` what Muon is not made for: embeddings, heads,
    norms, biases and kernels. `muon` (Jordan et al. 2024) takes the matrices between hidden layers; its updates are
    scaled to AdamW's size (Liu et al. 2025, section 2.2), so that both share one learning rate.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # Learned positions are tables too.
    tables |= {id(p) for m in model.modules() if isinstance(m, nn.ParameterList) for p in m.parameters()}
    decayed = {id(p) for p in weights if p.dim() >= 2 and id(p) not in tables}
    hidden = _hidden_matrices(model) if training.optimizer == "muon" else []
    taken = {id(p) for p in hidden}
    rest = [p for p in weights if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if id(p) in decayed], "weight_decay": training.weight_decay},
        {"params": [p for p in rest if id(p) not in decayed], "weight_decay": 0.0},
    ]
    lr, decay = training.learning_rate, training.weight_decay
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=training.betas, fused=True)
    }
    if hidden:
        optimizers["muon"] = torch.optim.Muon(hidden, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return optimizers


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers inside the blocks of a network.

    Raises:
        UserError: it has none.
    """
    blocks = getattr(model, "blocks", nn.ModuleList())
    found = [
        parameter
        for block in blocks
        for module in block.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters()
        if parameter.dim() == 2
    ]
    if not found:
        raise UserError(
            "muon needs linear layers in blocks, this network has none", where="training.optimizer", mend="use adamw"
        )
    return found
