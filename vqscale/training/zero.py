"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) through Accelerate, stages 1 to 3.

Weights stay fp32 and bf16 is autocast, as under every other strategy, so that all of them train the same. What is
DeepSpeed's own is led by the loop: when a step's gradients are complete, and at which rate it steps.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn

from vqscale.config.training import Training
from vqscale.errors import UserError
from vqscale.training.distributed import Ranks
from vqscale.training.optimizers import fresh_state, make_optimizers
from vqscale.training.pieces import MODEL, OPTIMIZER, Piece
from vqscale.training.strategies import Outcome, Strategy, require_kind, state

_ADAMW = "adamw"
KEPT_WHOLE = 100_000
"""Elements up to which stage 3 leaves a weight gathered on all ranks: small ones cost more time than memory."""


class ZeroStrategy(Strategy):
    """A DeepSpeed engine over fp32 weights.

    Args:
        accelerator: of the kind DEEPSPEED.
        model: the bare network, on its device.
        training: optimisation settings.
        stage: 1, 2 or 3.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, training: Training, stage: int) -> None:
        (optimizer,) = make_optimizers(model, training).values()
        self.spreads_weights = stage == 3
        self._engine, _ = accelerator.prepare(model, optimizer)
        self.model = self._engine
        self._zero: Any = self._engine.optimizer
        found = self._engine.zero_optimization_stage(), type(self._zero.optimizer)
        if found != (stage, torch.optim.AdamW):
            raise RuntimeError(f"asked for ZeRO stage {stage} with AdamW, DeepSpeed gave {found}")
        self._names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """DeepSpeed completes gradients in the backward, so it is told before whether this is the last."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        self._engine.backward(loss)

    def step(self, rate: float) -> Outcome:
        """Clip, step and forget the gradients; DeepSpeed leaves out a step whose norm is not finite."""
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()
        return Outcome(float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied()))

    def weights(self) -> list[Piece]:
        """The parameters: whole ones, and in stage 3 the ranges that DeepSpeed holds."""
        if not self.spreads_weights:
            return [Piece(f"{MODEL}/{n}", tuple(p.shape), 0, p.detach()) for p, n in self._names.items()]
        rank = torch.distributed.get_rank()
        return [
            _range(f"{MODEL}/{name}", p.ds_shape, p.ds_tensor.data, rank * p.ds_tensor.ds_numel)
            for p, name in self._names.items()
        ]

    def moments(self) -> list[Piece]:
        """The optimizer's tensors: ranges of the flat partition that this rank steps."""
        return [piece for flat in self._flats() for piece in self._cut(*flat)]

    def materialise(self) -> None:
        """Create the optimizer's tensors where they do not exist."""
        inner = self._zero.optimizer
        for flat, _ in self._flats():
            if not inner.state.get(flat):
                inner.state[flat] = fresh_state(inner, flat.detach())

    def loaded(self) -> None:
        """Bring the master weights to the weights, and small ones of stage 3 that stay gathered to their shards."""
        self._zero.refresh_fp32_params()
        if self.spreads_weights and (kept := self._zero.persistent_parameters):
            kept[0].partition(kept, has_been_updated=False)
            kept[0].all_gather(kept)

    def _flats(self) -> list[tuple[Tensor, list[tuple[nn.Parameter, int, int, int]]]]:
        """Each flat partition, and what it holds: (parameter, place in the partition, first element, elements)."""
        rank, zero = torch.distributed.get_rank(), self._zero
        if self.spreads_weights:
            return [
                (flat, _laid_out(group, rank))
                for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            ]
        groups = zip(
            zero.single_partition_of_fp32_groups,
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            strict=True,
        )
        return [(flat, _overlaps(group, offsets, flat.numel(), rank)) for flat, group, offsets in groups]

    def _cut(self, flat: Tensor, held: list[tuple[nn.Parameter, int, int, int]]) -> Iterator[Piece]:
        for key, value in self._zero.optimizer.state.get(flat, {}).items():
            for parameter, place, start, count in held:
                name = f"{OPTIMIZER}/{_ADAMW}/{key}/{self._names[parameter]}"
                if value.dim() == 0:  # one count of steps for the whole partition
                    yield Piece(name, (), 0, value)
                else:
                    yield Piece(name, _shape(parameter), start, value.detach()[place : place + count])


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _range(name: str, shape: torch.Size, shard: Tensor, start: int) -> Piece:
    """A shard of equal size on all ranks; the last ones are padded, or all padding."""
    count = max(0, min(shard.numel(), shape.numel() - start))
    return Piece(name, tuple(shape), start if count else 0, shard[:count])


def _laid_out(group: list[Any], rank: int) -> list[tuple[nn.Parameter, int, int, int]]:
    """Stage 3: the rank's shards of all parameters of a group, one behind the other."""
    held, place = [], 0
    for parameter in group:
        size = parameter.ds_tensor.ds_numel
        piece = _range("", parameter.ds_shape, parameter.ds_tensor.data, rank * size)
        held.append((parameter, place, piece.start, piece.local.numel()))
        place += size
    return held


def _overlaps(
    group: list[nn.Parameter], offsets: list[int], size: int, rank: int
) -> list[tuple[nn.Parameter, int, int, int]]:
    """Stages 1 and 2: what of a group's parameters, flattened one behind the other, lies in the rank's partition."""
    begin, held = rank * size, []
    for parameter, offset in zip(group, offsets, strict=True):
        first, last = max(offset, begin), min(offset + parameter.numel(), begin + size)
        count = max(0, last - first)
        held.append((parameter, first - begin if count else 0, first - offset if count else 0, count))
    return held


def zero(stage: int, model: nn.Module, training: Training, ranks: Ranks) -> ZeroStrategy:
    """ZeRO of a stage: shards moments (1), gradients too (2), weights too (3).

    On a CPU, Accelerate makes DDP of the plugin and says nothing, unless its state was made for the CPU before, and
    the accelerator itself is not told.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"zero{stage} needs DeepSpeed, which is not installed",
            where="resources.strategy",
            mend="pip install -c constraints.txt -e '.[deepspeed]', or use fsdp2",
        )
    on_cpu = ranks.device.type == "cpu"
    with _environment(ACCELERATE_USE_DEEPSPEED="true", **({"DS_ACCELERATOR": "cpu"} if on_cpu else {})):
        _quiet_deepspeed()
        state(ranks)
        accelerator = Accelerator(deepspeed_plugin=_Plugin(hf_ds_config=_settings(stage, training)))
        require_kind(f"zero{stage}", accelerator, DistributedType.DEEPSPEED)
        return ZeroStrategy(accelerator, model, training, stage)


class _Plugin(DeepSpeedPlugin):
    """Accelerate's, without the note that it leaves for the package transformers, which is not needed here."""

    def set_deepspeed_weakref(self) -> None:
        """Leave nothing."""


def _settings(stage: int, training: Training) -> dict[str, Any]:
    """DeepSpeed's configuration; sizes of batches serve its own statistics alone."""
    bf16 = training.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.clip,
        "steps_per_print": None,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": KEPT_WHOLE},
        # No "safe" modules: those would have their gradients reduced in bf16.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def _quiet_deepspeed() -> None:
    """Import DeepSpeed without its lines of information, and without compiling what it has for CPUs."""
    import deepspeed

    # It calls collectives of torch by their old names.
    old = "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", old, FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # All-reduces over shared memory, for inference: it would need a compiler, and gloo is used anyway.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
