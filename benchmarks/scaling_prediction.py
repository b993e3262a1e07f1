"""What `scaling_model` makes of a run of benchmark `scaling`: on this machine, to be compared, and on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.result import Compared, Curve, Prediction
from benchmarks.scaling_model import Cluster, Link, Outcome, Step, all_reduce, fitted, predict, up_to

MOST = 1_024
GPU_BATCH, SMALL_BATCH = 128, 16
GPU_RATE = 12_000
"""Images a second of one H200, where none can be measured: what we want of it, and assume."""
BACKWARD = 2 / 3
"""Share of the backward in a step's computing, by operations."""


@dataclass(frozen=True)
class Measured:
    """Medians of a run."""

    step_s: Mapping[str, float]
    """Of `one`, `pair`, `quartet`, `two` and `four`."""
    reduce_s: Mapping[tuple[str, int], float]
    """(`small`, `codebooks`, `gradients` or `large`, ranks) → an all-reduce."""
    sizes: Mapping[str, int]
    """Bytes of these four."""
    buckets: tuple[int, ...]
    """Bytes of DDP's all-reduces, in their order."""
    cores: int
    """Of this machine."""
    gpu_step_s: float | None
    """A step of `GPU_BATCH` images on a GPU of this machine; None without one."""


def forecast(measured: Measured, cluster: Cluster, source: str) -> Prediction:
    """Compare the model with this machine, then ask it about a cluster."""
    link = fitted(measured.reduce_s["small", 2], measured.reduce_s["large", 2], measured.sizes["large"])
    compute = measured.gpu_step_s or GPU_BATCH / GPU_RATE
    step = Step(compute, measured.buckets, measured.sizes["codebooks"], BACKWARD)
    small = replace(step, compute_s=compute * SMALL_BATCH / GPU_BATCH)
    here = replace(step, compute_s=measured.step_s["one"])
    gpus = up_to(MOST, cluster.gpus_per_node)
    trees = replace(cluster, trees=True)
    full, smaller, slow = ([predict(one, number, cluster) for number in gpus] for one in (step, small, here))
    faster = [predict(step, number, trees) for number in gpus]
    share = "images a second and GPU, as a share of those of one GPU"
    return Prediction(
        assumptions=assumptions(measured, cluster, source),
        inputs={
            "gpu_step_s": compute,
            "process_step_s": measured.step_s["one"],
            "codebook_bytes": measured.sizes["codebooks"],
            **{f"gradient_bucket_{number}_bytes": size for number, size in enumerate(measured.buckets)},
            "gpus_per_node": cluster.gpus_per_node,
            "within_gb_s": cluster.within.bytes_per_s / 1e9,
            "within_latency_us": cluster.within.latency_s * 1e6,
            "between_gb_s": cluster.between.bytes_per_s / 1e9,
            "between_latency_us": cluster.between.latency_s * 1e6,
            **({"gloo_gb_s": link.bytes_per_s / 1e9, "gloo_latency_us": link.latency_s * 1e6} if link else {}),
        },
        curves={
            "efficiency": _curve(full, f"{GPU_BATCH} images a GPU, rings", share, "efficiency"),
            "efficiency_trees": _curve(faster, f"{GPU_BATCH} images a GPU, trees between nodes", share, "efficiency"),
            f"efficiency_batch_{SMALL_BATCH}": _curve(
                smaller, f"{SMALL_BATCH} images a GPU, each as fast, rings", share, "efficiency"
            ),
            "efficiency_this_machine": _curve(slow, "a GPU as slow as a process here, rings", share, "efficiency"),
            "codebook_share": _curve(
                full,
                f"the codebooks' all-reduce, {GPU_BATCH} images a GPU, rings",
                "share of the step",
                "codebook_share",
            ),
        },
        compared=compared(measured, link) if link else {},
    )


def compared(measured: Measured, link: Link) -> dict[str, Compared]:
    """Collectives and steps of 2 and 4 ranks here; the link is fitted to other sizes, on 2 ranks."""
    found = {}
    for name, alone, world in (("two", "pair", 2), ("four", "quartet", 4)):
        here = _this_machine(link, world, measured.cores)
        for what in ("codebooks", "gradients"):
            expected = all_reduce(measured.sizes[what], world, here)
            found[f"{what}_{world}"] = Compared(
                predicted=1e3 * expected, measured=1e3 * measured.reduce_s[what, world], unit="ms"
            )
        step = Step(measured.step_s[alone], measured.buckets, measured.sizes["codebooks"])
        found[f"step_{world}"] = Compared(
            predicted=1e3 * predict(step, world, here).step_s, measured=1e3 * measured.step_s[name], unit="ms"
        )
    return found


def _this_machine(link: Link, world: int, cores: int) -> Cluster:
    """Its ranks as one node; those that share a core share what it can copy."""
    here = link.shared(max(1.0, world / cores))
    return Cluster(world, here, here)


def _curve(outcomes: list[Outcome], what: str, y: str, key: str) -> Curve:
    return Curve(what=what, x="GPUs", y=y, points=tuple((one.gpus, getattr(one, key)) for one in outcomes))


def assumptions(measured: Measured, cluster: Cluster, source: str) -> tuple[str, ...]:
    """All that has to hold."""
    if measured.gpu_step_s is None:
        compute = f"a GPU trains on {GPU_RATE:,} images a second: assumed, not measured, since torch sees no GPU here"
    else:
        compute = f"a GPU takes {1e3 * measured.gpu_step_s:.2f} ms for a step, as measured on one here"
    return (
        compute,
        f"network from {source}: {cluster.gpus_per_node} GPUs a node, {cluster.within.bytes_per_s / 1e9:g} GB/s and "
        f"{cluster.within.latency_s * 1e6:g} µs from GPU to GPU, {cluster.between.bytes_per_s / 1e9:g} GB/s and "
        f"{cluster.between.latency_s * 1e6:g} µs from node to node; nobody else uses it",
        "every GPU keeps its batch, so the global batch grows with their number",
        "gradients in fp32 and in DDP's buckets as seen here, codebooks in one all-reduce behind the optimizer's step",
        "rings: reduce-scatter in each node, an all-reduce between nodes by each GPU with its share, then all-gather; "
        "or two trees between the nodes, which have fewer latencies and which NCCL takes where they are faster",
        f"all buckets but the last one hide behind the backward, {BACKWARD:.0%} of the computing; the last one and the "
        "codebooks hide behind nothing",
        "no rank waits for a slower one, for data or for a save: what is predicted is the most that can be expected",
        "on this machine: the link is fitted to all-reduces of 4 bytes and of the largest size on 2 ranks; nothing "
        "hides, since the cores that would copy are the ones that compute; ranks above "
        f"{measured.cores} cores share them",
    )
