"""Backend `slurm`: a job of Slurm for each stage, each waiting for the one before.

On every node of a job one task runs torch's elastic agent. `launcher.batch` watches over it on the first node.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.rendezvous import agent_arguments
from cluster.slurm import SlurmSettings
from launcher.backends import containers, slurm_jobs
from launcher.backends import slurm_queue as queue
from launcher.backends.base import STAGE_MODULES, Job, Poll, StageCommand
from launcher.backends.slurm_words import explain
from launcher.job import job_of
from launcher.state import RunState, tasks_left
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_bytes

_END_S = 120
"""Longest wait for the end of cancelled jobs, above their grace."""


class Shell(str):
    """Words of a script that the shell expands, as they stand. All other words are quoted."""


_RENDEZVOUS = Shell('"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"')
_ENDPOINT = Shell('"$endpoint"')
_HEAD = """\
set -e -o pipefail
trap '' USR1 USR2  # until launcher.batch listens"""
# Slurm's own address of the first node: its name need not resolve, and the login node is never asked.
FIND_EACH_OTHER = """\
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
endpoint="${address:?Slurm knows no address of $first}:$((20000 + SLURM_JOB_ID % 10000))\""""
# SLURM_NODEID is known inside the tasks only. The first node holds the store in which the agents meet.
_ON_EACH_NODE = """'PET_RDZV_CONF="is_host=$((SLURM_NODEID == 0))" exec "$@"'"""


class SlurmBackend:
    """Runs each stage as a job of Slurm.

    Args:
        modules: main of each stage; tests put their own here.
    """

    def __init__(self, modules: Mapping[str, str] = STAGE_MODULES) -> None:
        self._modules = modules

    def render(self, job: Job, attempts: Mapping[str, int] | None = None) -> tuple[StageCommand, ...]:
        """Commands of `sbatch` and their scripts; a pure function. `{STAGE}` stands for the number of a stage's job."""
        numbers, before = attempts or {}, ("", *job.stages)
        return tuple(
            self._stage(job, stage, after, numbers.get(stage, 1))
            for stage, after in zip(job.stages, before, strict=False)
        )

    def _stage(self, job: Job, stage: str, after: str, attempt: int) -> StageCommand:
        layout = RunLayout(job.run)
        wait = (f"--dependency=afterok:{{{after}}}", "--kill-on-invalid-dep=yes") if after else ()
        return StageCommand(
            stage=stage,
            attempt=attempt,
            argv=("sbatch", "--parsable", *wait, str(layout.script(stage))),
            variables=job.variables(stage),
            inherit=(*job.profile.inherit, "SLURM_CONF"),
            directory=job.run,
            log=layout.log,
            grace_s=job.profile.grace_s,
            script=script(job, stage, self._modules[stage]),
        )

    def check(self, job: Job) -> None:
        """Whether the controller answers; what a job asks for `sbatch` itself refuses.

        Raises:
            UserError: it does not.
        """
        queue.jobs()

    def submit(self, layout: RunLayout) -> Poll:
        """Write the scripts of all unfinished stages and submit them as a chain."""
        return self.submit_after(layout, ())

    def submit_after(self, layout: RunLayout, earlier: Sequence[RunLayout]) -> Poll:
        """As `submit`, and the chain begins when the last jobs of all the others have ended."""
        before = slurm_jobs.jobs(layout)
        alive = slurm_jobs.alive(layout)
        if not set(alive).isdisjoint(before.values()):
            raise UserError("is running already", where=layout.root.name, mend="vqscale cancel ends it")
        if alive:  # of a submission that was cut off
            slurm_jobs.end(layout, alive, _END_S)
        state = RunState.read(layout)
        unfinished = [stage for stage in state.stages if not layout.done(stage).exists()]
        attempts = {stage: state.stages[stage].attempt + 1 for stage in unfinished}
        job = job_of(layout, unfinished)
        submitted: dict[str, str] = {}
        try:
            for command in self.render(job, attempts):
                write_bytes(layout.script(command.stage), command.script.encode())
                argv = [word.format(**submitted) if "{" in word else word for word in command.argv[:-1]]
                argv += _only_those_left(job, layout, command.stage)
                if not submitted:
                    argv += ["--hold", *_behind(earlier)]
                number = queue.submit([*argv, command.argv[-1]], command.directory, command.environment())
                submitted[command.stage] = number
                slurm_jobs.put_down(layout, submitted)
            queue.release(next(iter(submitted.values())))
        except BaseException:
            _take_back(layout, submitted, before)
            raise
        return Poll(True, _words(submitted))

    def poll(self, layout: RunLayout) -> Poll:
        """What the controller says of the jobs, beside what the run directory says."""
        jobs = slurm_jobs.jobs(layout)
        if not jobs:
            return Poll(False, "never submitted", begun=False)
        try:
            known = slurm_jobs.ours(layout, queue.jobs())
        except UserError as error:
            return Poll(None, f"Slurm cannot be asked ({error})", who=_words(jobs))
        alive = {stage: row for stage, row in known.items() if row.alive}
        if alive:
            return Poll(True, _words(jobs), note=_note(RunState.read(layout), jobs, alive))
        return Poll(False, _words(jobs), who=_who(RunState.read(layout), layout, jobs, known))

    def cancel(self, layout: RunLayout) -> None:
        """Cancel all jobs of the run, and wait until Slurm has ended their processes."""
        recorded = slurm_jobs.jobs(layout)
        alive = slurm_jobs.alive(layout) if recorded else []  # without any, Slurm need not be there
        if alive:
            # Before the request: the batch host has to know that it was a person.
            slurm_jobs.put_down(layout, recorded, cancelled=True)
            slurm_jobs.end(layout, alive, read_json(layout.info)["profile"]["grace_s"] + _END_S)
        state = RunState.read(layout)
        state.stop("cancelled", "cancelled")
        state.write(layout)


def script(job: Job, stage: str, module: str) -> str:
    """The batch script of a stage; a pure function. Values are quoted, but for `setup`, which is shell.

    Args:
        job: recipe, profile and run directory.
        stage: name of the stage.
        module: its main.

    Raises:
        ValueError: the profile has no section `slurm`.
    """
    if job.profile.slurm is None:
        raise ValueError(f"profile {job.profile.name} has no section `slurm`")
    slurm = job.profile.slurm.of(stage)
    exports = [f"export {v.name}={shlex.quote(v.value)}  # {v.source}" for v in job.variables(stage)]
    parts = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in _options(job, slurm, stage)),
        _HEAD,
        "",
        *slurm.setup,
        *exports,
        f"cd {shlex.quote(str(job.source))}",
        "",
        FIND_EACH_OTHER,
        "",
        f"exec {_watched(job, slurm, stage, module)}",
    ]
    return "\n".join(parts) + "\n"


def _options(job: Job, slurm: SlurmSettings, stage: str) -> list[str]:
    """What stands behind #SBATCH: names that the profile's types have checked, and numbers."""
    tasks = job.recipe.resources.array_of(stage)
    asked: dict[str, Any] = {
        "job-name": slurm_jobs.job_name(job.run, stage),
        "array": f"0-{tasks - 1}{_limit(job, stage)}" if tasks > 1 else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": job.places[stage].nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node or None,
        "mem": f"{slurm.memory_gb}G" if slurm.memory_gb else slurm.memory_gb,
        "time": slurm.time_min,
        "exclude": ",".join(slurm.exclude) or None,
        "signal": f"B:{slurm.signal}@{slurm.lead_s}",
        "open-mode": "append",
        "output": "supervisor.log",  # in the run directory, where sbatch is called: a path here could not be quoted
    }
    return [*(f"--{name}={value}" for name, value in asked.items() if value is not None), "--requeue", *slurm.options]


def _limit(job: Job, stage: str) -> str:
    """What stands behind the numbers of an array's tasks."""
    most = job.profile.slurm.at_most(stage) if job.profile.slurm else None
    return f"%{most}" if most else ""


def _watched(job: Job, slurm: SlurmSettings, stage: str, module: str) -> str:
    """`launcher.batch` with srun, the shell on each node, and torch's agent: a line each."""
    profile, nodes = job.profile, job.places[stage].nodes
    inside = containers.Inside(profile.container, job.run, job.source)
    agent = agent_arguments(
        rdzv_id=_RENDEZVOUS,
        processes=job.processes_per_node(stage),
        max_restarts=job.resources(stage).max_restarts,
        nodes=nodes,
        endpoint=_ENDPOINT,
    )
    lines: list[tuple[str, ...]] = [
        (job.python, "-m", "launcher.batch", "--run", str(job.run), "--stage", stage),
        ("--requeues", str(slurm.requeues), "--retries", str(slurm.retries), "--pause", str(slurm.pause_s)),
        ("--grace", str(profile.grace_s), "--"),
        (
            "srun",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={slurm.cpus_per_task}",
        ),
        # An agent that was asked to stop ends with 1: that must not end the others, which may still be saving.
        ("--kill-on-bad-exit=0", f"--wait={profile.grace_s}", "--label"),
        containers.srun_options(inside, (variable.name for variable in job.variables(stage))),
        ("bash", "-c", Shell(_ON_EACH_NODE), "agent"),
        containers.before_command(inside, slurm.gpus_per_node),
        (inside.python(job.python), "-m", "torch.distributed.run", *agent[:6]),
        agent[6:12],
        agent[12:],
        ("--redirects", "3", "-m", "--", module, "--run", str(job.run)),
    ]
    return " \\\n    ".join(" ".join(map(_quoted, line)) for line in lines if line)


def _quoted(word: str) -> str:
    return word if isinstance(word, Shell) else shlex.quote(word)


def _only_those_left(job: Job, layout: RunLayout, stage: str) -> list[str]:
    """Where some tasks of an array are done already, the numbers of the others; sbatch takes it before the script's."""
    tasks = job.recipe.resources.array_of(stage)
    left = tasks_left(layout, stage, tasks)
    if tasks == 1 or len(left) == tasks:
        return []
    return [f"--array={','.join(map(str, left))}{_limit(job, stage)}"]


def _behind(earlier: Sequence[RunLayout]) -> list[str]:
    """The option by which a chain waits for the last jobs of others, however these end."""
    last = [list(jobs.values())[-1] for jobs in map(slurm_jobs.jobs, earlier) if jobs]
    return [f"--dependency=afterany:{':'.join(last)}"] if last else []


def _take_back(layout: RunLayout, submitted: Mapping[str, str], before: Mapping[str, str]) -> None:
    """A chain is whole, or there is none. What Slurm cannot be asked to end stays recorded, and held."""
    try:
        # One that was accepted without an answer among them.
        accepted = list(dict.fromkeys([*submitted.values(), *slurm_jobs.alive(layout)]))
        if accepted:
            queue.cancel(accepted)
    except UserError:
        return
    slurm_jobs.put_down(layout, before)


def _words(jobs: Mapping[str, str]) -> str:
    return f"Slurm job{'s' if len(jobs) > 1 else ''} {', '.join(jobs.values())}"


def _note(state: RunState, jobs: Mapping[str, str], alive: Mapping[str, queue.Row]) -> str:
    """What a living job waits for, or where Slurm and the run directory disagree."""
    stage, row = next(iter(alive.items()))
    what = f"Slurm job {jobs[stage]} ({stage}) {explain(row, jobs[stage])}"
    word = state.stages[stage].state
    if state.word in ("failed", "cancelled"):
        return f"but {what}"
    if word == "running":
        return "" if row.state in ("RUNNING", "COMPLETING") else f"but {what}"
    return what


def _who(state: RunState, layout: RunLayout, jobs: Mapping[str, str], known: Mapping[str, queue.Row]) -> str:
    """The job that should be running, and how it ended as far as Slurm remembers."""
    stage = next((stage for stage in jobs if state.stages[stage].state != "done"), None)
    if stage is None or state.word not in ("running", "waiting"):  # nobody misses it: the accounting is not asked
        return _words(jobs)
    row = known.get(stage) or slurm_jobs.ours(layout, queue.history([jobs[stage]])).get(stage)
    return f"Slurm job {jobs[stage]}" + (f" ({row.state})" if row else "")
