"""What a step takes of the machine: memory, and floating-point operations as a share of what the device can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from resource import getpagesize
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

TRAINING = 3
"""Operations of forward and backward, in forward passes: the backward computes gradients of inputs and of weights."""

_PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0,
    "L4": 121.0, "A40": 150.0, "A10": 125.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip
"""Dense bf16 TFLOP/s with fp32 sums that NVIDIA's data sheets name; the first that is part of a GPU's name counts."""


def peak_tflops(device: torch.device) -> float | None:
    """The device's peak at bf16 in TFLOP/s, by its name; None for CPUs and for GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """Peak of a GPU by the name that CUDA gives it, such as `NVIDIA H100 80GB HBM3`; None if it is not in the table."""
    return next((peak for known, peak in _PEAK_TFLOPS.items() if known in name), None)


def describe(world: int, device: torch.device) -> str:
    """Ranks, device and its peak, in two lines."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    peak = peak_tflops(device)
    known = f"{peak:g} TFLOP/s in bf16" if peak else "n/a: no peak is known for this device"
    return f"{world} rank{'s' if world > 1 else ''}, each on {name}\nshare of peak: {'of ' if peak else ''}{known}"


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


@torch.no_grad()
def forward_flops(network: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """Floating-point operations of one call: products of matrices, convolutions and attention, as torch counts them.

    The search for the nearest codes is not among them: on the CPU it writes into memory of its own, which torch does
    not count, and on a GPU it is a kernel of ours.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        network(*inputs, **options)
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Of attention, from the shapes that the counter puts in the tensors' place."""
    return int(sdpa_flop_count(query, key, value))


def _recurrence(x: Any, matrices: Sequence[Any]) -> int:
    """Of a recurrence over a sequence [T, B, in]: each step of a sample meets every matrix once."""
    return int(2 * x[0] * x[1] * sum(math.prod(shape) for shape in matrices))


_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: lambda x, *rest, **_: _recurrence(x, rest[:2]),
    torch.ops.aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrence(x, [w for w in weights if len(w) == 2]),
}
"""What torch's counter leaves out. A causal mask is not subtracted, as on a GPU."""


def memory_figures(device: torch.device) -> dict[str, float]:
    """GiB of this rank: what its process holds, and on a GPU the most that torch had allocated since the last call."""
    figures = {"memory/process": resident_bytes() / 2**30}
    if device.type == "cuda":
        figures["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return figures


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * getpagesize()


def compute_figures(flops_a_sample: float, samples_a_second: float, peak: float | None) -> Mapping[str, float]:
    """TFLOP/s of one device, and the share of its peak where that is known.

    Args:
        flops_a_sample: of forward and backward; what is computed twice to save memory counts once.
        samples_a_second: of this device alone.
        peak: in TFLOP/s.
    """
    tflops = flops_a_sample * samples_a_second / 1e12
    return {"speed/tflops": tflops} | ({"speed/share_of_peak": tflops / peak} if peak else {})
