"""Starts a stage again that ended before its time, where a supervisor on this machine runs the stages.

What `launcher.batch` has Slurm do, the supervisor does itself for hosts over ssh and for Kubernetes, by the same
rules (`launcher.retry`). On one machine nothing is started again: what fails there fails there again, and torch's agent
has `resources.max_restarts`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from cluster.kubernetes import KubernetesSettings
from cluster.profile import Profile
from cluster.ssh import SshSettings
from launcher import retry
from launcher.attempt import Request, say
from launcher.backends.base import Job
from launcher.job import job_of
from launcher.retry import Limits, Try
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.files import read_json

_POLL_S = 0.1


def supervisor_name(layout: RunLayout) -> str:
    """What tells this supervisor's tries from those of an earlier one; a requeue by hand begins to count anew."""
    who = read_json(layout.supervisor) or {}
    return f"{who.get('host')}-{who.get('pid')}-{who.get('started')}"


def stage_job(layout: RunLayout, stage: str) -> Job:
    """The job of a stage, without the machines that were left out because of its earlier attempts."""
    tries = retry.read_tries(layout, stage, supervisor_name(layout))
    return job_of(layout, (stage,), without=[name for one in tries for name in one.excluded])


class Again:
    """Decides after each attempt, and waits out the pause.

    Args:
        profile: of the run; says where its stages run, and how often they are tried.
        request: asks to stop.
    """

    def __init__(self, profile: Profile, request: Request) -> None:
        self._section, self._request = _section(profile), request

    def wanted(self, layout: RunLayout, state: RunState, stage: str) -> bool:
        """Whether the stage starts again now; otherwise its message says why not.

        Args:
            layout: the run, or one task, whose newest attempt has failed or was preempted.
            state: how its stages stand; changed, and written.
            stage: name of the stage.
        """
        if self._section is None or not self._section.requeues or self._request.came:
            return False
        name, entry = supervisor_name(layout), state.stages[stage]
        earlier = retry.read_tries(layout, stage, name)
        limits = Limits(self._section.requeues, self._section.retries, self._section.pause_s)
        how = "does not answer" if isinstance(self._section, SshSettings) else "has lost its pod"
        judged = retry.judge(layout, stage, entry, read_json(layout.lost(stage)) or [], earlier, limits, how)
        if judged.refusal:
            kind = judged.failure.kind
            word = "failed" if kind in retry.NEVER else entry.state
            reason = "" if kind in retry.NEVER else f"; not tried again: {judged.refusal}"
            state.stages[stage] = replace(entry, state=word, message=f"{judged.words}{reason}")
            state.write(layout)
            return False
        excluded = self._left_out(layout, stage, judged.failure.suspects, earlier)
        this = Try(entry.attempt, judged.failure.kind, judged.step, judged.failure.message, excluded, judged.pause_s)
        retry.write_tries(layout, stage, name, [*earlier, this])
        words = f"{judged.words}; tried again ({len(earlier) + 1} of {limits.requeues}){this.words}"
        state.stages[stage] = replace(entry, state="waiting", message=words)
        state.write(layout)
        say(f"{stage}: {words}")
        return self._waited(judged.pause_s)

    def _left_out(
        self, layout: RunLayout, stage: str, suspects: tuple[str, ...], earlier: list[Try]
    ) -> tuple[str, ...]:
        """The suspects, if the stage can do without them."""
        assert self._section is not None
        before = [name for one in earlier for name in one.excluded]
        fresh = tuple(name for name in suspects if name not in before)
        processes = layout.read_recipe().resources.of(stage).processes
        return fresh if fresh and self._section.without(before).can_spare(fresh, processes) else ()

    def _waited(self, seconds: float) -> bool:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self._request.came:
            time.sleep(_POLL_S)
        return not self._request.came


def of_run(root: Path, request: Request) -> Again:
    """That of a run directory, by its own record."""
    return Again(Profile.model_validate(read_json(RunLayout(root).info)["profile"]), request)


def _section(profile: Profile) -> SshSettings | KubernetesSettings | None:
    """Slurm has its own queue, and one machine has no others."""
    return profile.ssh or profile.kubernetes
