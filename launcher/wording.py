"""Figures of runs and stages as text, the same on a terminal, in a pipe and on the page of a run."""

from __future__ import annotations

from launcher.status import RunStatus, StageStatus


def stage_line(stage: StageStatus) -> str:
    """A stage in one line of text."""
    parts = [f"{stage.stage:<10} {stage.state:<9}"]
    if stage.attempt > 1:
        parts.append(f"attempt {stage.attempt}")
    if stage.state != "running" and stage.seconds is not None:
        parts.append(f"after {duration(stage.seconds)}")
    parts += [text for text in (progress(stage), loss(stage), rate(stage), bad_samples(stage)) if text]
    if stage.eta_s is not None:
        parts.append(f"ETA {duration(stage.eta_s)}")
    if stage.saved:
        parts.append(f"saved at step {stage.saved.step}")
    if stage.message:
        parts.append(stage.message)
    return "  ".join(parts)


def bad_samples(stage: StageStatus) -> str:
    """`3 bad samples (2 corrupt, 1 label)`, or nothing when there are none."""
    if not stage.bad:
        return ""
    total, kinds = sum(stage.bad.values()), ", ".join(f"{count} {kind}" for kind, count in stage.bad.items())
    return f"{total} bad sample{'s' if total > 1 else ''} ({kinds}), listed in stages/{stage.stage}/quarantine.jsonl"


def progress(stage: StageStatus, word: str = "step ") -> str:
    """`step 120/600`, as far as it is known."""
    if stage.step is None:
        return ""
    return f"{word}{stage.step}/{stage.total}" if stage.total else f"{word}{stage.step}"


def loss(stage: StageStatus, word: str = "loss ") -> str:
    """`loss 0.0123`, when there is one."""
    return f"{word}{stage.loss:.4g}" if isinstance(stage.loss, (int, float)) else ""


def rate(stage: StageStatus) -> str:
    """`812 images/s`, when it is known."""
    return f"{stage.rate:,.0f} {stage.unit}".rstrip() if stage.rate else ""


def duration(seconds: float) -> str:
    """`42 s`, `3:05` (minutes) or `2:03:05` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def eta(stage: StageStatus) -> str:
    """Time left, when it is known."""
    return duration(stage.eta_s) if stage.eta_s is not None else ""


def saved(stage: StageStatus) -> str:
    """`400 (5 min ago)`: step and age of the newest checkpoint, when there is one."""
    return f"{stage.saved.step} ({ago(stage.saved.age_s)})" if stage.saved else ""


def ago(seconds: float) -> str:
    """`42 s ago`, `5 min ago`, `3 h ago` or `2 d ago`."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def below(status: RunStatus) -> list[str]:
    """What is said below the table of a run: why it failed, and the stages' bad samples."""
    counted = [f"{stage.stage}: {bad_samples(stage)}" for stage in status.stages if stage.bad]
    tasks = [f"{s.stage}: {s.message}" for s in status.stages if s.tasks > 1 and s.state == "running" and s.message]
    return [line for line in (status.message, *tasks, *counted) if line]


def beside(status: RunStatus) -> list[str]:
    """What is said below the table of several runs: a run's note, and why it failed."""
    return [f"{status.id}: {line}" for line in (status.note, status.message) if line]


def what_next(status: RunStatus) -> str:
    """What can be done with a run as it stands, in a line; empty where its note says so."""
    run = status.id
    if status.note:
        return ""
    if not status.over:
        return f"vqscale logs {run} -f shows what it prints, vqscale cancel {run} ends it"
    if status.state == "done":
        made = {stage.stage for stage in status.stages}
        drawn = f", vqscale sample {run} --out DIR draws images, vqscale export {run} DIR hands its models on"
        return f"vqscale show {run} is its page{drawn if 'prior' in made else ''}"
    why = f"vqscale logs {run} --failed says why, " if status.state == "failed" else ""
    return f"{why}vqscale requeue {run} goes on from where it stopped"
