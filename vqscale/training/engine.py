"""The seam over Accelerate: it wraps model and optimizer and nothing else.

Accelerate's loader wrapping and its `save_state` are not used: the data order and the checkpoints are ours. One loop
trains under every strategy (`strategies`, `zero`); their state is the same `pieces`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqscale.config.training import Training
from vqscale.training.distributed import Ranks
from vqscale.training.optimizers import learning_rate
from vqscale.training.pieces import MODEL, Piece, assemble
from vqscale.training.strategies import TORCH, Make, Outcome
from vqscale.training.units import units
from vqscale.training.untrained import Untrained
from vqscale.training.zero import zero

STRATEGIES: dict[str, Make] = {**TORCH, **{f"zero{stage}": functools.partial(zero, stage) for stage in (1, 2, 3)}}

_GRAPHS = 8
"""Graphs of one module: of batches of other sizes, and of forward passes with and without gradient."""


class Engine:
    """Model, optimizer and learning rate of one stage, spread over the ranks.

    Args:
        model: the bare network; its buffers and parameters are made equal on all ranks here.
        training: optimisation settings.
        ranks: this process's place; the process group exists already.
        strategy: how the model is spread.

    Raises:
        UserError: the strategy needs what is not installed.
        ValueError: the precision is still `auto`.
        RuntimeError: Accelerate gave another kind of parallelism than the one asked for.
    """

    def __init__(self, model: nn.Module, training: Training, ranks: Ranks, strategy: str = "ddp") -> None:
        if training.precision == "auto":
            raise ValueError("precision auto has to be settled before, as the plan of a run does")
        self.training, self.ranks, self.bare, self.strategy = training, ranks, model, strategy
        self.size = sum(parameter.numel() for parameter in model.parameters())
        """Weights of the network, over all ranks."""
        self.steps = training.steps if self.size else 0
        """Steps that its training takes: without weights, none."""
        twin = _structure(model)
        model.to(ranks.device)
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)
        _equip(model, training)
        dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
        self._strategy = STRATEGIES[strategy](model, training, ranks) if self.size else Untrained(model)
        if {name: buffer.dtype for name, buffer in model.named_buffers()} != dtypes:
            raise RuntimeError(f"{strategy} casts buffers, codebooks among them")
        self.model = self._strategy.model
        self._twin = twin if self._strategy.spreads_weights else None

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 for the networks where the recipe asks for it."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.training.precision == "bf16")

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients are complete after the `last` of a step."""
        return self._strategy.accumulating(last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, which is this rank's share of a mean over the ranks."""
        self._strategy.backward(loss)

    def optimise(self, step: int) -> Outcome:
        """Clip, and take one optimizer step with the schedule's learning rate, unless the gradient is not finite.

        A step that is not taken changes neither weight nor moment, and all ranks decide alike. The gradient is
        forgotten in both cases.
        """
        return self._strategy.step(learning_rate(self.training, step))

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The network with complete weights on this rank, to be called in any way, by some ranks alone too.

        Entering and leaving is collective. Buffers are the live ones; weights may be a copy, so they are not changed
        here. Nothing is compiled inside, since batches of evaluation have other shapes.
        """
        eager = torch.compiler.set_stance("force_eager") if self.training.compile else nullcontext()
        if self._twin is None:
            with eager:
                yield self.bare
            return
        for name, weight in assemble(self.weights(), self.ranks):
            _put(self._twin, name.removeprefix(f"{MODEL}/"), nn.Parameter(weight, requires_grad=False))
        for name, buffer in self.bare.named_buffers():
            _put(self._twin, name, buffer)
        self._twin.train(self.bare.training)
        try:
            yield self._twin
        finally:
            self._twin.to("meta")

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """As `whole`, in evaluation mode and without gradients."""
        was = self.bare.training
        self.model.eval()
        try:
            with torch.no_grad(), self.whole() as network:
                yield network
        finally:
            self.model.train(was)

    def collective_figures(self) -> dict[str, float]:
        """Seconds a step that gradients are on their way between ranks, where the strategy measures it."""
        return self._strategy.collective_figures()

    def weights(self) -> list[Piece]:
        """The parameters, as this rank holds them."""
        return self._strategy.weights()

    def pieces(self) -> list[Piece]:
        """All that training goes on from: parameters, persistent buffers, and moments as far as they exist."""
        kept = self.bare.state_dict(keep_vars=True)
        buffers = {name: buffer for name, buffer in self.bare.named_buffers() if name in kept}
        held = [Piece(f"{MODEL}/{name}", tuple(buffer.shape), 0, buffer) for name, buffer in buffers.items()]
        return [*self.weights(), *held, *self._strategy.moments()]

    def materialise_optimizer(self) -> None:
        """Create the moments as they are before the first step, so that pieces of them can be filled."""
        self._strategy.materialise()

    def loaded(self) -> None:
        """Call once after pieces were filled: brings everything that follows from them up to date; collective."""
        for buffer in self.bare.buffers():
            torch.distributed.broadcast(buffer, 0)
        self._strategy.loaded()


def _equip(model: nn.Module, training: Training) -> None:
    """Recompute and compile the network's units. Inside of what a strategy hangs on them, so their names stay."""
    found = [module for module in model.modules() if isinstance(module, units(model))]
    if training.compile:
        _expect_graphs(len(found))
    for module in found:
        if training.compile:
            module.forward = torch.compile(module.forward)
        if training.checkpoint_activations:
            module.forward = _recomputed(module.forward)


def _expect_graphs(count: int) -> None:
    """Let so many modules be compiled, and fail where there are too many graphs.

    A single function of torch's own stands for all of them. By default it gets 8 graphs, of which every module that is
    shaped otherwise takes one, and what comes later stays eager upon no more than a warning. Now each may have 8.
    """
    settings = torch._dynamo.config
    settings.recompile_limit += _GRAPHS * count
    settings.accumulated_recompile_limit += _GRAPHS * count
    settings.fail_on_recompile_limit_hit = True


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _structure(model: nn.Module) -> nn.Module:
    """A copy without values, hooks and shards, to be filled by `Engine.whole`."""
    hollow: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    hollow |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, hollow)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)
