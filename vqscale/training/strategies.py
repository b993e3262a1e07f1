"""How a model lies over the ranks: what every strategy can do, and those that step with torch's optimizers.

DDP keeps everything whole on each rank. FSDP2 (torch's `fully_shard`) shards weights, gradients and moments by rows.
DeepSpeed's ZeRO is in `zero`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from vqscale.config.training import Training
from vqscale.training.distributed import Ranks
from vqscale.training.optimizers import fresh_state, make_optimizers
from vqscale.training.pieces import MODEL, OPTIMIZER, Piece
from vqscale.training.units import units

_KIND = {"cpu": DistributedType.MULTI_CPU, "cuda": DistributedType.MULTI_GPU}


class Outcome(NamedTuple):
    """What became of an optimizer step; the same on all ranks."""

    norm: float
    """Of the gradient, before clipping."""
    taken: bool
    """False: the norm was not finite, and nothing was changed."""


class Strategy(ABC):
    """A model and its optimizers, spread over the ranks."""

    model: nn.Module
    """What is called in training."""
    spreads_weights: bool
    """Whether a rank holds less than all weights between two steps."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; `last` of its step or not."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""

    @abstractmethod
    def step(self, rate: float) -> Outcome:
        """Clip, step with learning rate `rate` if the norm is finite, and forget the gradients; collective."""

    @abstractmethod
    def weights(self) -> list[Piece]:
        """The parameters."""

    @abstractmethod
    def moments(self) -> list[Piece]:
        """The optimizers' tensors, as far as they exist."""

    @abstractmethod
    def materialise(self) -> None:
        """Create the optimizers' tensors as they are before the first step, where they do not exist."""

    def collective_figures(self) -> dict[str, float]:
        """Seconds a step that gradients are on their way between ranks, as far as the strategy measures it."""
        return {}

    def loaded(self) -> None:
        """Called when pieces were written: refresh what follows from them; collective."""


class TorchStrategy(Strategy):
    """DDP and FSDP2: gradients and moments lie as the parameters do.

    Args:
        accelerator: of the kind that was asked for.
        model: the bare network, on its device.
        training: optimisation settings.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, training: Training) -> None:
        optimizers = make_optimizers(model, training)
        self._accelerator, self._bare, self._limit = accelerator, model, training.clip or math.inf
        self.model, *prepared = accelerator.prepare(model, *optimizers.values())
        self.spreads_weights = isinstance(self.model, FSDPModule)
        self.optimizers = dict(zip(optimizers, prepared, strict=True))

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """DDP reduces in the last micro-batch alone; FSDP2 in each, since whole gradients are what it is to save."""
        reduce_now = last or self.spreads_weights
        return nullcontext() if reduce_now else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        self._accelerator.backward(loss)

    def step(self, rate: float) -> Outcome:
        """Clip, step and forget the gradients."""
        norm = torch.nn.utils.clip_grad_norm_(self._bare.parameters(), self._limit)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            if math.isfinite(value):
                optimizer.step()
            optimizer.zero_grad()
        return Outcome(value, math.isfinite(value))

    def weights(self) -> list[Piece]:
        """The parameters."""
        return [cut(f"{MODEL}/{name}", parameter) for name, parameter in self._bare.named_parameters()]

    def moments(self) -> list[Piece]:
        """The optimizers' tensors, as far as they exist."""
        return [
            cut(f"{OPTIMIZER}/{kind}/{key}/{name}", value)
            for kind, optimizer, name, parameter in self._optimised()
            for key, value in optimizer.state.get(parameter, {}).items()
        ]

    def materialise(self) -> None:
        """Create the optimizers' tensors where they do not exist."""
        for _, optimizer, _, parameter in self._optimised():
            if not optimizer.state.get(parameter):
                optimizer.state[parameter] = fresh_state(optimizer, parameter.detach())

    def collective_figures(self) -> dict[str, float]:
        """DDP measures its all-reduce, and what of it no computation hides, in every hundredth step."""
        if not isinstance(self.model, DistributedDataParallel):
            return {}
        # No public function says it. In nanoseconds; absent in a world of one and before the first sample.
        measured = self.model._get_ddp_logging_data()
        total, hidden = (measured.get(f"avg_backward_{part}_time", 0) for part in ("comm", "compute_comm_overlap"))
        return (
            {"speed/all_reduce_s": total / 1e9, "speed/all_reduce_exposed_s": (total - hidden) / 1e9} if total else {}
        )

    def _optimised(self) -> Iterator[tuple[str, torch.optim.Optimizer, str, nn.Parameter]]:
        """(optimizer's name, optimizer, parameter's name, parameter)."""
        names = {parameter: name for name, parameter in self._bare.named_parameters()}
        for kind, prepared in self.optimizers.items():
            for group in prepared.param_groups:
                for parameter in group["params"]:
                    yield kind, prepared.optimizer, names[parameter], parameter


@torch.no_grad()
def cut(name: str, tensor: Tensor) -> Piece:
    """A tensor as a piece: what this rank holds of a `DTensor`, all of another."""
    if not isinstance(tensor, DTensor):
        return Piece(name, tuple(tensor.shape), 0, tensor.detach())
    if tensor.placements != (Shard(0),):
        raise RuntimeError(f"{name} is placed {tensor.placements}, which is not a range of its elements")
    local = tensor.to_local()
    _, (row, *_) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Piece(name, tuple(tensor.shape), row * math.prod(tensor.shape[1:]) if local.numel() else 0, local)


def ddp(model: nn.Module, training: Training, ranks: Ranks) -> TorchStrategy:
    """Everything whole on each rank; gradients are averaged while the backward runs."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    state(ranks)
    accelerator = Accelerator(cpu=ranks.device.type == "cpu", kwargs_handlers=[options])
    require_kind("ddp", accelerator, _KIND[ranks.device.type])
    with warnings.catch_warnings():
        # Accelerate still passes DDP the old name of `forward_sync_buffers`.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return TorchStrategy(accelerator, model, training)


def fsdp2(model: nn.Module, training: Training, ranks: Ranks) -> TorchStrategy:
    """Weights, gradients and moments sharded by rows, each of the network's units (`units`) gathered as one.

    On a CPU, Accelerate makes DDP of the plugin and says nothing, unless it takes the ranks for those of GPUs.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",  # which means: by the names of modules
        transformer_cls_names_to_wrap=[unit.__name__ for unit in units(model)],
        cpu_ram_efficient_loading=False,  # it moves the network over the meta device, where buffers are lost
    )
    shared = state(ranks)
    if ranks.device.type == "cpu":
        shared["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(fsdp_plugin=plugin)
    require_kind("fsdp2", accelerator, DistributedType.FSDP)
    # Nothing is done in place to what a network returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    strategy = TorchStrategy(accelerator, model, training)
    homes = {p.device_mesh.device_type for p in model.parameters() if isinstance(p, DTensor)}
    if homes != {ranks.device.type}:
        raise RuntimeError(f"asked for fsdp2 on {ranks.device.type}, Accelerate sharded over {homes or 'nothing'}")
    return strategy


def state(ranks: Ranks) -> dict[str, Any]:
    """Accelerate's state of this process over the existing process group, as it keeps it."""
    PartialState(cpu=ranks.device.type == "cpu", backend=torch.distributed.get_backend())
    shared: dict[str, Any] = PartialState._shared_state
    return shared


def require_kind(strategy: str, accelerator: Accelerator, expected: DistributedType) -> None:
    """Refuse another kind of parallelism than the one asked for, which Accelerate can give in silence.

    Raises:
        RuntimeError: names both.
    """
    if accelerator.distributed_type is not expected:
        raise RuntimeError(f"asked for {strategy} ({expected}), Accelerate gave {accelerator.distributed_type}")


Make = Callable[[nn.Module, Training, Ranks], Strategy]
TORCH: Mapping[str, Make] = {"ddp": ddp, "fsdp2": fsdp2}
