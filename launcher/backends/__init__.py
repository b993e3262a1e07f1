"""Ways to run stages: one module a backend, chosen by the profile."""

from __future__ import annotations

from cluster.profile import Profile
from launcher.backends.base import Backend


def backend_for(profile: Profile) -> Backend:
    """The backend that a profile names."""
    from launcher.backends.kubernetes import KubernetesBackend
    from launcher.backends.local import LocalBackend
    from launcher.backends.slurm import SlurmBackend
    from launcher.backends.ssh import SshBackend

    backends: dict[str, type[Backend]] = {
        "local": LocalBackend,
        "slurm": SlurmBackend,
        "ssh": SshBackend,
        "kubernetes": KubernetesBackend,
    }
    return backends[profile.backend]()
