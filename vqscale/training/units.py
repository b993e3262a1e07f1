"""The modules of a network that are treated each as one."""

from __future__ import annotations

from torch import nn


def units(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The modules that a network declares to be sharded, recomputed and compiled each as one; those it has."""
    kinds = {type(module) for module in model.modules()}
    return tuple(unit for unit in getattr(model, "units", ()) if unit in kinds)
