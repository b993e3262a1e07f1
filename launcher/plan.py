"""The plan of a run: what `vqscale plan` prints is what `vqscale submit` starts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.profile import Profile, profile_path
from cluster.rendezvous import Variable
from launcher.backends import backend_for
from launcher.backends.base import ATTEMPT, Job, StageCommand
from launcher.handover import need_of
from launcher.job import make_job
from launcher.precision import settle, slow_stages
from launcher.recipes import find_recipe
from launcher.registry import choose_directory
from launcher.saves import earlier_runs, short_of_time
from launcher.sharing import Shares
from vqscale.config.inputs import check_inputs
from vqscale.config.layout import RunLayout
from vqscale.config.load import dump_yaml, load_model, load_recipe
from vqscale.config.recipe import Recipe
from vqscale.config.section import Places
from vqscale.errors import UserError
from vqscale.faults import VARIABLE, parse_faults
from vqscale.stages import TRAINED

_FROM_PROFILE_ONLY = ("NCCL_", "GLOO_", "OMP_", "TORCH_NCCL_")


@dataclass(frozen=True)
class Plan:
    """A checked job, the commands of its stages, and what the user should know before it starts."""

    job: Job
    commands: tuple[StageCommand, ...]
    warnings: tuple[str, ...]
    recipe: str
    """What was asked for: path, or name of a packaged recipe."""
    overrides: tuple[str, ...] = ()
    """Settings that were changed on the command line, as `dotted.key=value`."""
    shares: Shares | None = None
    """Stages whose output another run makes."""
    named: bool = True
    """Whether the directory was asked for by its name; otherwise another name is as good."""

    def facts(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        job = self.job
        return {
            "name": job.recipe.name,
            "profile": job.profile.model_dump(mode="json"),
            "run": str(job.run),
            "resources": {stage: _facts(job, stage) for stage in job.stages},
            "stages": [command.facts() for command in self.commands],
            "recipe": job.recipe.model_dump(mode="json"),
            "warnings": list(self.warnings),
        }

    def text(self) -> str:
        """The plan as people read it."""
        job, first = self.job, self.commands[0]
        shared = [v for v in first.variables if all(v in command.variables for command in self.commands)]
        width = max(len(variable.name) for command in self.commands for variable in command.variables)
        machine = job.profile.description or job.profile.backend
        lines = [
            f"run        {job.recipe.name} on {job.profile.name} ({machine})",
            f"directory  {job.run}",
            "",
            "resources",
            *(f"  {stage:9}  {_resources(job, stage)}" for stage in job.stages),
            "",
            "environment of every stage",
            *_variables(shared, width),
            f"  taken over from the shell: {' '.join(first.inherit)}",
            "",
            f"stages, started in {first.directory}",
        ]
        for number, command in enumerate(self.commands, 1):
            body = command.shell().replace("\n", "\n    ")
            lines += [f"  {number} {command.stage} (attempt {command.attempt})", f"    {body}"]
            lines += (f"  {line}" for line in _variables([v for v in command.variables if v not in shared], width))
            if command.script:
                lines += ["", *(f"    | {line}".rstrip() for line in command.script.splitlines()), ""]
        lines += ["", "recipe", *(f"  {line}" for line in dump_yaml(job.recipe).splitlines())]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)]) + "\n"


def make_plan(
    recipe: str,
    on: str = "local",
    overrides: Iterable[str] = (),
    *,
    run: Path | None = None,
    stages: str | None = None,
    shares: Shares | None = None,
) -> Plan:
    """Resolve and check everything that can be checked before something starts.

    Args:
        recipe: path, or name of a packaged recipe.
        on: name of a profile, or path of its YAML file.
        overrides: `dotted.key=value` texts.
        run: run directory; chosen from the recipe's name when None.
        stages: comma-separated selection; None for all of the recipe.
        shares: stages whose output another run makes; they are left out.

    Raises:
        UserError: the first thing that is wrong.
    """
    changed = tuple(overrides)
    profile = load_profile(on)
    resolved = settle(absolute_paths(load_recipe(find_recipe(recipe), changed)), profile)
    chosen = select_stages(resolved, stages)
    if shares:
        chosen = tuple(stage for stage in chosen if stage not in shares.stages)
    warnings = [*check_inputs(resolved), *slow_stages(resolved, profile)]
    job = make_job(resolved, profile, run or choose_directory(resolved.name, None), chosen)
    late = short_of_time(earlier_runs(resolved.name, profile.name), profile.grace_s)
    told = (*warnings, *_machine_warnings(job), *late)
    return Plan(job, backend_for(profile).render(job), told, recipe, changed, shares, named=run is not None)


def load_profile(on: str) -> Profile:
    """A profile by name or path.

    Raises:
        UserError: no such profile, or a faulty file.
    """
    try:
        path = profile_path(on)
    except LookupError as error:
        raise UserError(f"no profile '{on}'", where="--on", mend=str(error)) from None
    profile = load_model(Profile, path)
    try:
        return profile.resolved(path.parent)
    except ValueError as error:
        raise UserError(str(error), where=str(path)) from None


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with the files and folders that it names made absolute, as seen from here; URLs stay."""
    data = recipe.data
    places: dict[str, Any] = {name: _absolute(getattr(data, name)) for name in ("train", "validation", "codes")}
    places["remote"] = data.remote.model_copy(update={"cache": _absolute(data.remote.cache)})
    resources = recipe.resources.model_copy(update={"checkpoints": _absolute(recipe.resources.checkpoints)})
    changed = {"data": data.model_copy(update=places), "resources": resources}
    networks = {name: _absolute(getattr(recipe.evaluate, name)) for name in ("features", "lpips")}
    changed |= {"tokenizer": recipe.tokenizer.relocated(_absolute)}
    return recipe.model_copy(update={**changed, "evaluate": recipe.evaluate.model_copy(update=networks)})


def select_stages(recipe: Recipe, text: str | None, layout: RunLayout | None = None) -> tuple[str, ...]:
    """The stages to run, in the recipe's order.

    Args:
        recipe: says which stages there are.
        text: comma-separated names; None for all.
        layout: an existing run, whose finished stages need not run again.

    Raises:
        UserError: unknown name, or a stage whose input nobody makes.
    """
    if text is None:
        return recipe.stages
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in recipe.stages]
    if unknown or not asked:
        what = f"no stage '{unknown[0]}' in this recipe" if unknown else "names no stage"
        raise UserError(what, where="--stages", mend=f"stages: {', '.join(recipe.stages)}")
    for name in asked:
        need = need_of(recipe, name)
        finished = layout is not None and need is not None and layout.done(need).exists()
        if need in recipe.stages and need not in asked and not finished:
            raise UserError(f"'{name}' reads the output of '{need}'", where="--stages", mend=f"add {need}")
    return tuple(name for name in recipe.stages if name in asked)


def _absolute(text: Places) -> Places:
    if not isinstance(text, str):
        return tuple(str(_absolute(one)) for one in text)
    return text if not text or "://" in text else str(Path(text).expanduser().absolute())


def _variables(variables: Iterable[Variable], width: int) -> list[str]:
    return [f"  {v.name:{width}} = {v.value}    from {v.source}" for v in variables if v.name != ATTEMPT]


def _facts(job: Job, stage: str) -> dict[str, Any]:
    place = {"nodes": job.places[stage].nodes, "cores": job.places[stage].cores}
    own = job.resources(stage).model_dump(mode="json", exclude={"stages"})
    return {**own, **place, "array": job.recipe.resources.array_of(stage)}


def _resources(job: Job, stage: str) -> str:
    resources, place, tasks = job.resources(stage), job.places[stage], job.recipe.resources.array_of(stage)
    threads = next(v.value for v in job.variables(stage) if v.name == "OMP_NUM_THREADS")
    return (
        f"{f'{tasks} tasks of ' if tasks > 1 else ''}processes: {resources.processes} on {place.nodes} "
        f"node{'s' if place.nodes > 1 else ''} of {place.cores} cores, threads each: {threads}, "
        f"device: {resources.device}{_trained(job, stage) if stage in TRAINED else ''}, "
        f"restarts: {resources.max_restarts}"
    )


def _trained(job: Job, stage: str) -> str:
    return f", {job.resources(stage).strategy}, {getattr(job.recipe, stage).training.precision}"


def _crowded(job: Job, stage: str) -> str:
    """What is wrong where a stage's threads outnumber the cores; empty where they do not."""
    processes, threads = job.processes_per_node(stage), max(1, job.resources(stage).threads)
    cores = job.places[stage].cores
    if processes * threads <= cores:
        return ""
    return f"{processes} processes x {threads} threads will wait for each other on {cores} cores"


def _machine_warnings(job: Job) -> list[str]:
    warnings = list(dict.fromkeys(filter(None, (_crowded(job, stage) for stage in job.stages))))
    if os.environ.get(VARIABLE):
        faults = "; ".join(map(str, parse_faults(os.environ[VARIABLE])))
        warnings.append(f"{VARIABLE} disturbs this run on purpose: {faults}")
    ignored = [
        name for name in sorted(os.environ)
        if name.startswith(_FROM_PROFILE_ONLY) and name not in job.profile.environment
    ]  # fmt: skip
    if ignored:
        warnings.append(f"{', '.join(ignored)} of this shell do not reach the stages; set them in the profile")
    return warnings
