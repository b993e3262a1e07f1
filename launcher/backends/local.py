"""Backend `local`: every stage under torch's elastic agent on this machine, one after the other."""

from __future__ import annotations

from cluster.rendezvous import agent_arguments
from launcher.backends.base import Job, StageCommand
from launcher.backends.supervised import Supervised, rendezvous_id


class LocalBackend(Supervised):
    """Runs stages on this machine."""

    def stage_command(self, job: Job, stage: str, attempt: int) -> StageCommand:
        """Torch's elastic agent on one machine."""
        resources = job.resources(stage)
        rendezvous = agent_arguments(
            rdzv_id=rendezvous_id(job, stage, attempt),
            processes=resources.processes,
            max_restarts=resources.max_restarts,
        )
        return StageCommand(
            stage=stage,
            attempt=attempt,
            argv=self.agent(job, stage, attempt, rendezvous, job.python),
            variables=job.variables(stage, attempt),
            inherit=job.profile.inherit,
            directory=job.source,
            log=job.layout.attempt(stage, attempt) / "agent.log",
            grace_s=job.profile.grace_s,
        )
