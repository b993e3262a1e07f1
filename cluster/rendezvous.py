"""How the processes of a stage find each other: arguments and variables for torch's elastic agent."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR2")
"""Signals that the elastic agent passes on. By itself it leaves out SIGUSR2, which schedulers send ahead of a
preemption: the agent would die of it and leave its processes behind."""

NODE = "VQSCALE_NODE"
"""Variable with the name by which the launcher knows the node that a process runs on."""


@dataclass(frozen=True)
class Variable:
    """An environment variable of a stage, and who set it."""

    name: str
    value: str
    source: str


def agent_arguments(
    *,
    rdzv_id: str,
    processes: int,
    max_restarts: int,
    nodes: int = 1,
    least_nodes: int = 0,
    endpoint: str = "",
    holds_store: bool | None = None,
    address: str = "",
) -> tuple[str, ...]:
    """Arguments of `python -m torch.distributed.run` on one node.

    One machine meets on loopback, at a port that the kernel chooses, so that two runs never collide.

    Args:
        rdzv_id: name of the rendezvous; the same on all nodes, different for every attempt.
        processes: processes a node.
        max_restarts: how often the agent starts its processes again after a failure.
        nodes: number of nodes.
        least_nodes: go on with so many when others are lost; 0 needs all of them.
        endpoint: `host:port` that all nodes reach; needed for more than one.
        holds_store: whether this node holds the store in which the nodes meet. All others end when it is lost. None
            lets torch decide by the endpoint's address.
        address: where the other nodes reach this one; the name that it has for itself when it is left out.

    Raises:
        ValueError: several nodes without an endpoint. Localhost would leave each node waiting for itself.
    """
    if nodes > 1 and not endpoint:
        raise ValueError(f"a rendezvous of {nodes} nodes needs an endpoint (host:port) that all of them reach")
    own = address or ("" if endpoint else "127.0.0.1")
    # A lost node is noticed after three missed seconds instead of three times five, and not waited for longer.
    settings = ["keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3"] if least_nodes else []
    settings += [f"is_host={int(holds_store)}"] if holds_store is not None else []
    asked = f"{least_nodes}:{nodes}" if least_nodes else str(nodes)
    return (
        *("--nnodes", asked, "--nproc-per-node", str(processes), "--max-restarts", str(max_restarts)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint or "127.0.0.1:0", "--rdzv-id", rdzv_id),
        *(("--rdzv-conf", ",".join(settings)) if settings else ()),
        *("--signals-to-handle", ",".join(FORWARDED)),
        *(("--local-addr", own) if own else ()),
    )


def agent_environment(*, grace_s: int) -> tuple[Variable, ...]:
    """Variables that torch's elastic agent needs.

    Args:
        grace_s: seconds between the agent's TERM and its KILL to the processes it started.
    """
    source = "cluster.rendezvous"
    return (
        # Rank 0 then opens a store of its own; the agent's would live on over a restart with stale keys.
        Variable("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1", source),
        Variable("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(grace_s), f"{source} (grace_s of the profile)"),
    )


def thread_environment(threads: int, processes: int, cores: int) -> tuple[Variable, ...]:
    """Threads of each process: as asked, or an even share of the cores.

    Args:
        threads: CPU threads of each process; 0 shares evenly.
        processes: processes on this machine.
        cores: cores that may be used here.
    """
    if threads:
        return (Variable("OMP_NUM_THREADS", str(threads), "resources.threads"),)
    share = max(1, cores // processes)
    return (Variable("OMP_NUM_THREADS", str(share), f"{cores} cores / {processes} processes"),)


def inherited(environment: Mapping[str, str], allowed: Iterable[str]) -> dict[str, str]:
    """The variables of `environment` whose names match the allow-list (names with `*`)."""
    patterns = tuple(allowed)
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
