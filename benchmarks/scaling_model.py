"""How long a training step takes on many GPUs: a model with few parts, each of which can be worked out by hand.

A step is what one process computes, and the collectives that nothing hides. Those of n ranks are rings of α-β links
(Thakur, Rabenseifner, Gropp 2005, section 4.4): each of 2 (n - 1) rounds costs a latency, and each rank sends
2 (n - 1) / n of the bytes. Several nodes do it in three phases: reduce-scatter inside of each node, an all-reduce
between the nodes by every GPU with its share of the bytes, all-gather inside of each node. On many nodes a ring's
latencies are most of it; NCCL takes trees then, so both are there.

What it leaves out makes training slower: ranks that wait for the slowest, loading, saving, other traffic. What it says
is the most that can be expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A way between two ranks or two nodes."""

    bytes_per_s: float
    """In one direction, while the other one is used as well."""
    latency_s: float
    """Of one message, with what starts it."""

    def shared(self, by: float) -> Link:
        """What is left of it for one of `by` users."""
        return Link(self.bytes_per_s / by, self.latency_s)


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike."""

    gpus_per_node: int
    within: Link
    """From a GPU to the next one in its node."""
    between: Link
    """From a node to the next one, by all of its adapters together."""
    trees: bool = False
    """Whether the nodes reduce along two trees instead of a ring."""


@dataclass(frozen=True)
class Step:
    """A training step of data-parallel ranks."""

    compute_s: float
    """What a rank takes by itself."""
    buckets: tuple[int, ...]
    """Bytes of the gradients' all-reduces, in the order in which the backward gets them ready; the last at its end."""
    codebooks: int
    """Bytes of the one all-reduce of the codebooks, after the optimizer's step."""
    window: float = 0.0
    """Share of the computing behind which all buckets but the last can hide."""


@dataclass(frozen=True)
class Outcome:
    """What a step comes to on some number of GPUs."""

    gpus: int
    compute_s: float
    gradients_s: float
    """Of the gradients' all-reduces, what is not hidden."""
    codebooks_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.gradients_s + self.codebooks_s

    @property
    def efficiency(self) -> float:
        """Images a second and GPU, as a share of those of one GPU by itself."""
        return self.compute_s / self.step_s

    @property
    def codebook_share(self) -> float:
        """Of the step."""
        return self.codebooks_s / self.step_s


def ring(size: float, members: int, link: Link) -> float:
    """Seconds of an all-reduce of `size` bytes over a ring."""
    return 2 * half_ring(size, members, link)


def tree(size: float, members: int, link: Link) -> float:
    """Seconds of an all-reduce along two binary trees, up and down again, each with half of the bytes.

    Sanders, Speck, Träff 2009. It moves as much as a ring; a level costs two latencies, one for each child (NCCL counts
    8.5 µs where a step of a ring has 4.0).
    """
    levels = math.ceil(math.log2(members))
    return 4 * levels * link.latency_s + 2 * (members - 1) / members * size / link.bytes_per_s


def half_ring(size: float, members: int, link: Link) -> float:
    """Seconds of a reduce-scatter or an all-gather, of `size` bytes in all."""
    return (members - 1) * link.latency_s + (members - 1) / members * size / link.bytes_per_s


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of an all-reduce of `size` bytes over so many GPUs.

    Raises:
        ValueError: they are neither in one node nor fill whole ones.
    """
    nodes, left = divmod(gpus, cluster.gpus_per_node)
    if not nodes or gpus == cluster.gpus_per_node:
        return ring(size, gpus, cluster.within)
    if left:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {cluster.gpus_per_node}")
    each = cluster.gpus_per_node
    inside = 2 * half_ring(size, each, cluster.within)
    between = tree if cluster.trees else ring
    return inside + between(size / each, nodes, cluster.between.shared(each))


def predict(step: Step, gpus: int, cluster: Cluster) -> Outcome:
    """A step on so many GPUs."""
    if gpus == 1:
        return Outcome(1, step.compute_s, 0.0, 0.0)
    *early, last = [all_reduce(size, gpus, cluster) for size in step.buckets]
    exposed = max(0.0, sum(early) - step.window * step.compute_s) + last
    return Outcome(gpus, step.compute_s, exposed, all_reduce(step.codebooks, gpus, cluster))


def fitted(small_s: float, large_s: float, large: int) -> Link | None:
    """The link over which two ranks took so long for an all-reduce of a few bytes, and for one of `large` bytes.

    None where the large one was not slower, so that noise is all there is.
    """
    if large_s <= small_s:
        return None
    return Link(large / (large_s - small_s), small_s / 2)


def up_to(most: int, gpus_per_node: int) -> Sequence[int]:
    """Numbers of GPUs to look at: one node, then doubled until `most`."""
    found = [gpus_per_node]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found
