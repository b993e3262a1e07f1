"""What Slurm's reasons mean, in words for people who do not run clusters, and what can be done."""

from __future__ import annotations

from launcher.backends.slurm_queue import Row

_ANEW = "vqscale cancel, correct the profile, vqscale requeue --on PROFILE"
"""A run keeps the profile that it was made with, until it is given another one."""
_WAITS = {
    "Resources": "waits for free nodes",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for the stage before",
    "BeginTime": "waits until its start time, as every requeued job does for a while",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved",
    "Licenses": "waits for licences",
    "Reservation": "waits for its reservation to begin",
    "Cleaning": "ends what its last start has left",
    "None": "has not been looked at yet",
}
_STUCK = {
    "DependencyNeverSatisfied": ("can never start: the stage before failed", "vqscale cancel, then vqscale requeue"),
    "JobHeldUser": ("is held by its user", "scontrol release {job}"),
    "JobHeldAdmin": ("is held by an administrator", "ask who runs the cluster"),
    "launch failed requeued held": ("is held: a node could not start it", "scontrol release {job}"),
    "JobHoldMaxRequeue": ("is held: it was requeued too often", "scontrol release {job}"),
    "BadConstraints": ("asks for what no node has", _ANEW),
    "PartitionDown": ("waits for its partition, which is down", "ask who runs the cluster"),
    "PartitionInactive": ("waits for its partition, which is inactive", "ask who runs the cluster"),
    "PartitionNodeLimit": ("asks for more nodes than its partition gives", _ANEW),
    "PartitionTimeLimit": ("asks for more time than its partition gives", _ANEW),
    "InvalidAccount": ("names an account that is not valid", _ANEW),
    "InvalidQOS": ("names a quality of service that is not valid", _ANEW),
    "NodeDown": ("waits for a node that is down", "sinfo -R says why"),
}
_RUNS = {
    "RUNNING": "runs",
    "COMPLETING": "is ending",
    "CONFIGURING": "waits for its nodes to boot",
    "SUSPENDED": "is suspended",
    "REQUEUED": "is being put back into the queue",
    "REQUEUE_HOLD": "is held after it was requeued",
    "RESIZING": "changes its size",
    "STOPPED": "is stopped",
}
_LIMITS = ("QOS", "Assoc", "MaxJobs", "MaxNodes", "MaxCpu", "MaxMem", "MaxTRES", "MaxGRES", "MaxWall", "MaxSubmit")


def explain(row: Row, job: str) -> str:
    """State of a job in a line: plain words, Slurm's own behind them, and the mend where there is one.

    Args:
        row: what the controller says.
        job: its number, for the mend.
    """
    # Some reasons carry more behind them: `ReqNodeNotAvail, UnavailableNodes:node[1-2]`.
    reason = row.reason.strip("() ")
    words, mend = _meaning(row.state, reason, reason.partition(",")[0].replace("_", " ").strip())
    told = reason if row.state == "PENDING" and reason not in ("", "None") else row.state
    return f"{words} ({told})" + (f": {mend.format(job=job)}" if mend else "")


def _meaning(state: str, whole: str, reason: str) -> tuple[str, str]:
    if state != "PENDING":
        mend = "scontrol release {job}" if state == "REQUEUE_HOLD" else ""
        return _RUNS.get(state, f"is {state.lower()}"), mend
    for name in (whole, reason):
        if name in _STUCK:
            return _STUCK[name]
    if reason.startswith(_LIMITS):
        return "waits for a limit of your account: others of your jobs have to end first", ""
    return _WAITS.get(reason or "None", "waits"), ""
