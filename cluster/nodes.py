"""What clusters of several nodes share: how processes are spread over them, how often a stage is tried again."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.section import Section


class Persistence(Section):
    """How often a stage that ended before its time is started again; of the profile's section about nodes."""

    requeues: Annotated[int, Field(ge=0)] = 20
    """How often a stage that was preempted, or failed by something that may pass, is started again, in all."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often in a row, without progress between, a stage is tried again that failed by a node, the network or a
    hang; by something unknown, once."""
    pause_s: Annotated[int, Field(ge=0)] = 30
    """Pause before the first of these retries; each further one in a row waits twice as long, 15 minutes at most."""


def spread(processes: int, nodes: int | None, gpus_per_node: int) -> int:
    """Nodes for so many processes.

    Args:
        processes: processes of a stage.
        nodes: as the profile says; None for as few as have a GPU for each process, or one where there are no GPUs.
        gpus_per_node: GPUs of each node.

    Raises:
        ValueError: the processes cannot be shared evenly.
    """
    fewest = -(-processes // gpus_per_node) if gpus_per_node else 1
    number = nodes or fewest
    if processes % number:
        raise ValueError(f"{processes} processes cannot be shared evenly by {number} nodes")
    return number
