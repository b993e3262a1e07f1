"""The machines that a prediction is about, from a profile."""

from __future__ import annotations

from benchmarks.scaling_model import Cluster, Link
from cluster.network import Network
from cluster.profile import Profile, profile_path
from vqscale.config.load import load_model
from vqscale.errors import UserError


def cluster_of(name: str | None) -> tuple[Cluster, str]:
    """Nodes and links of a profile, and in words where the figures come from; None for the defaults of `Network`.

    Raises:
        UserError: there is no such profile, or it is faulty.
    """
    if name is None:
        return _cluster(
            Network(), 8
        ), "defaults: nodes of eight H100 or H200, eight adapters of 400 Gbit/s (--on PROFILE)"
    try:
        path = profile_path(name)
    except LookupError as error:
        raise UserError(f"no profile '{name}'", where="--on", mend=str(error)) from None
    profile = load_model(Profile, path)
    section = profile.slurm or profile.ssh or profile.kubernetes
    gpus = (section.gpus_per_node if section else 0) or profile.network.gpus_per_node
    stated = "network" in profile.model_fields_set
    source = "its section `network`" if stated else "defaults of the section `network`, which it does not have"
    return _cluster(profile.network, gpus), f"profile {profile.name}: {source}"


def _cluster(network: Network, gpus: int) -> Cluster:
    return Cluster(
        gpus,
        Link(network.within_gb_s * 1e9, network.within_latency_us * 1e-6),
        Link(network.between_gb_s * 1e9, network.between_latency_us * 1e-6),
    )
