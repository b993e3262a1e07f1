"""How the processes of a stage are shared by nodes that are alike."""

from __future__ import annotations


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
