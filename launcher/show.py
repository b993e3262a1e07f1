"""The page of a run: all that its directory says, in one place."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from launcher.report import figures
from launcher.state import RunState, StageState
from launcher.status import RunStatus, read_status
from launcher.wording import below, duration
from vqscale.checkpoint import folder
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.files import read_json
from vqscale.masking import shown
from vqscale.stages import TRAINED

_NAMED = ("torch", "accelerate", "numpy", "vqscale")
"""Packages whose versions are named; all of them are in code/environment.json."""


def page_facts(layout: RunLayout) -> dict[str, Any]:
    """Plain values for `--json`.

    Raises:
        UserError: the directory holds no run, or no valid recipe.
    """
    status, info, state = read_status(layout), read_json(layout.info), RunState.read(layout)
    recipe, report = layout.read_recipe(), read_json(layout.report)
    return {
        **status.facts(),
        "name": recipe.name,
        "recipe": info.get("recipe"),
        "overrides": info.get("overrides", []),
        "moves": info.get("moves", []),
        **{key: info.get(key) for key in ("command", "directory", "host", "user", "warnings")},
        "code": _code(layout),
        "attempts": {name: _attempts(layout, state, name) for name in state.stages},
        "checkpoints": {stage: _checkpoints(layout, recipe, stage) for stage in TRAINED if stage in state.stages},
        "report": report,
        "tensorboard": f"tensorboard --logdir {shlex.quote(str(layout.tensorboard))}",
    }


def page(layout: RunLayout) -> str:
    """The same as people read it.

    Raises:
        UserError: the directory holds no run, or no valid recipe.
    """
    facts, status = page_facts(layout), read_status(layout)
    parts = (_head(facts, status), _code_lines(facts), _stage_lines(facts, status), _output_lines(layout, facts))
    return "\n".join(line for part in parts for line in part)


def _code(layout: RunLayout) -> dict[str, Any]:
    identity = read_json(layout.code / "identity.json") or {}
    surroundings = read_json(layout.code / "environment.json") or {}
    packages = surroundings.get("packages", {})
    return {
        **identity,
        "diff": str(layout.code / "uncommitted.diff") if identity.get("uncommitted") else None,
        "python": str(surroundings.get("python", "")).partition(" ")[0],
        "platform": surroundings.get("platform"),
        "packages": {name: packages[name] for name in _NAMED if name in packages},
    }


def _attempts(layout: RunLayout, state: RunState, stage: str) -> list[dict[str, Any]]:
    """All attempts of a stage; of an array, those of each task, which has a name then."""
    tasks = state.stages[stage].tasks
    owns = [layout] if tasks == 1 else [layout.of_task(task) for task in range(tasks)]
    entries = [RunState.read(own).stages.get(stage, StageState()) for own in owns]
    return [
        {"task": own.task, **asdict(one), "newest": one == newest, "logs": str(own.attempt(stage, one.attempt))}
        for own, entry in zip(owns, entries, strict=True)
        for newest in entry.attempts[-1:]
        for one in entry.attempts
    ]


def _checkpoints(layout: RunLayout, recipe: Recipe, stage: str) -> dict[str, Any]:
    """Steps are listed where that is quick; elsewhere `vqscale checkpoints ls` asks the storage."""
    where = layout.checkpoints(recipe, stage)
    return {"where": shown(where), "steps": None if "://" in where else folder.steps(where)}


def _head(facts: dict[str, Any], status: RunStatus) -> Iterator[str]:
    yield f"run          {status.id}: {status.words}"
    yield f"directory    {status.path}"
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.created))
    yield f"made         {created} by {facts['user']} on {facts['host']}, in {facts['directory']}"
    if facts["command"]:
        yield f"command      {shown(shlex.join(['vqscale', *facts['command'][1:]]))}"
    yield f"recipe       {facts['recipe'] or facts['name']}" + "".join(f" {shown(one)}" for one in facts["overrides"])
    yield f"profile      {status.profile}"
    for move in facts["moves"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(move["time"]))
        yield " ".join([f"moved        {when} to {move['profile']}", *map(shown, move["overrides"])])
    yield from (f"warning      {warning}" for warning in facts["warnings"] or [])


def _code_lines(facts: dict[str, Any]) -> Iterator[str]:
    code = facts["code"]
    commit = code.get("commit") or "no commit"
    extra = [f"uncommitted changes in {code['diff']}"] if code["diff"] else []
    extra += [f"{len(code['untracked'])} files that git does not know"] if code.get("untracked") else []
    yield f"code         {commit} of {code.get('source')}" + "".join(f", {text}" for text in extra)
    versions = ", ".join(f"{name} {version}" for name, version in code["packages"].items())
    yield f"versions     Python {code['python']}, {versions}; {code['platform']}"


def _stage_lines(facts: dict[str, Any], status: RunStatus) -> Iterator[str]:
    yield ""
    for stage in status.stages:
        attempts = facts["attempts"][stage.stage]
        yield f"{stage.stage:<12} {stage.state}"
        yield from (f"  {_attempt_line(attempt)}" for attempt in attempts)
    yield from below(status)


def _attempt_line(attempt: dict[str, Any]) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt["started"]))
    state, message = attempt["state"], f": {attempt['message']}" if attempt["message"] else ""
    if attempt["ended"]:
        state = f"{state} after {duration(attempt['ended'] - attempt['started'])}"
    elif not attempt["newest"]:
        state = "lost: who watched over it was killed"
    task = "" if attempt["task"] is None else f"task {attempt['task']} "
    return f"{task}attempt {attempt['attempt']}  {began}  {state}{message}"


def _output_lines(layout: RunLayout, facts: dict[str, Any]) -> Iterator[str]:
    yield ""
    for stage, found in facts["checkpoints"].items():
        steps = found["steps"]
        told = f"steps {', '.join(map(str, steps))}" if steps else "none" if steps is not None else "not listed"
        yield f"checkpoints  {stage}: {told} in {found['where']}"
    if isinstance(facts["report"], dict):
        values = ", ".join(f"{name} {text}" for name, text in figures(facts["report"]))
        yield f"report       {values} ({layout.report})"
    yield f"tensorboard  {facts['tensorboard']}"
