"""The recipe's optimizers and the course of their learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqscale.config.training import Training
from vqscale.errors import UserError
from vqscale.training.units import units

_DECAYED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.RNNBase)
"""Modules whose matrices and kernels weight decay is for."""


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


def make_optimizers(model: nn.Module, training: Training) -> dict[str, torch.optim.Optimizer]:
    """The recipe's optimizers by name.

    `adamw` (Loshchilov & Hutter 2019) takes everything, or with `muon` what Muon is not made for: embeddings, heads,
    norms, biases and kernels. `muon` (Jordan et al. 2024) takes the matrices between hidden layers; its updates are
    scaled to AdamW's size (Liu et al. 2025, section 2.2), so that both share one learning rate.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # By owner: embeddings and positions have as many dimensions, and so has a scale that is kept ready to be broadcast.
    owned = (p for m in model.modules() if isinstance(m, _DECAYED) for p in m.parameters(recurse=False))
    decayed = {id(p) for p in owned if p.dim() >= 2}
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
    """Weights of the linear layers inside the units of a network.

    Raises:
        UserError: it has none.
    """
    kinds = units(model)
    found = [
        parameter
        for unit in model.modules()
        if isinstance(unit, kinds)
        for module in unit.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters()
        if parameter.dim() == 2
    ]
    if not found:
        raise UserError(
            "muon needs linear layers in blocks, this network has none", where="training.optimizer", mend="use adamw"
        )
    return found


def fresh_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What one of the optimizers here knows of a parameter before its first step.

    Moments lie in memory as the parameter does: fused AdamW walks all of them by address.
    """
    zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": zeros}
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": zeros, "exp_avg_sq": torch.zeros_like(zeros)}
