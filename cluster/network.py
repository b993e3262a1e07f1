"""What a profile says of the network between GPUs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.section import Section

Positive = Annotated[float, Field(gt=0)]


class Network(Section):
    """Links between GPUs, in one direction each; what `vqscale bench scaling --on PROFILE` predicts from.

    The defaults are those of eight H100 or H200 with NVLink 4 and eight adapters of 400 Gbit/s. The latencies are
    NCCL's own figures for a step of a ring with its protocol LL128 (`src/graph/tuning.cc`).
    """

    within_gb_s: Positive = 450.0
    """From one GPU to the others of its node, in GB/s."""
    within_latency_us: Positive = 1.9
    """Of a step from GPU to GPU in a node, in microseconds."""
    between_gb_s: Positive = 400.0
    """From one node to the others, all its adapters together, in GB/s."""
    between_latency_us: Positive = 4.0
    """Of a step from node to node, in microseconds."""
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    """GPUs of a node, where the profile's section about its nodes does not say it."""
