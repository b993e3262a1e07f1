"""The checkpoints of one training: saved beside it, found again, and what became of each is said.

A save has three parts. The ranks agree: on who writes what, and that there is room. Each copies its share (`Staging`);
that is all that training waits for. The rest is done by a thread: writing, hashing, and the commit, for which the ranks
need each other once more. It talks over a process group of its own (`Group`), and no other save begins before it has
ended, so neither training's collectives nor those of two saves can be mixed up.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from vqscale.checkpoint import folder
from vqscale.checkpoint.commit import Attempt
from vqscale.errors import UserError
from vqscale.faults import NO_FAULTS, Faults
from vqscale.training.checkpoints.background import Background
from vqscale.training.checkpoints.faults import no_room, storage_fault
from vqscale.training.checkpoints.fitting import changed_settings, require_codes, require_none, require_seed
from vqscale.training.checkpoints.group import Group
from vqscale.training.checkpoints.held import Held, hold
from vqscale.training.checkpoints.reader import Checkpoint
from vqscale.training.checkpoints.resuming import choose, load
from vqscale.training.checkpoints.seams import Engine, Journal, Task
from vqscale.training.checkpoints.staging import Layout, Plan, StagedPlanner, Staging, layout_of, make_plan
from vqscale.training.checkpoints.writer import Record, Writer
from vqscale.training.pieces import EXTRA, Piece, whole


@dataclass(frozen=True)
class Outcome:
    """What became of a save; the same on all ranks, but for the times."""

    step: int
    fault: str = ""
    """Why there is no checkpoint; empty when it was committed."""
    stall_s: float = 0.0
    """Seconds that this rank's training waited for it."""
    write_s: float = 0.0
    """Seconds from staging to the commit."""
    bytes: int = 0
    """Of all ranks' tensors."""
    warning: str = ""
    """What else went wrong."""


class Checkpoints:
    """Saves a training and brings it back; every method runs on every rank, and `save` and `resume` are collective.

    Leave it by `with`: then a save that is under way is waited for. Saves need a process group to exist.

    Args:
        engine: what is trained.
        where: folder or URL of the stage's checkpoints.
        device: of the tensors.
        seed: the run's.
        made_by: what people want to know of the origin, such as the recipe's name.
        faults: what is to go wrong on demand.
    """

    def __init__(
        self,
        engine: Engine,
        where: str | Path,
        device: torch.device,
        *,
        seed: int,
        made_by: Mapping[str, str] | None = None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self._engine, self._where, self._seed, self._faults = engine, str(where), seed, faults
        self._made_by = {"torch": torch.__version__, **(made_by or {})}
        self._group, self._staging = Group(), Staging(device)
        self._background: Background[Outcome] = Background()
        self._planned: tuple[Layout, Plan] | None = None
        self.failed = 0
        """Saves that left no checkpoint."""
        self.longest_s = 0.0
        """Seconds of the longest save so far, from the request to the commit."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A training that fails still wants the checkpoint that is on its way; one that is killed has no time.
        if self._background.busy and (error is None or isinstance(error, Exception)):
            self._report(self._background.wait(), None)

    def save(self, task: Task, step: int, journal: Journal | None = None, *, final: bool = False) -> None:
        """Save behind step `step`; when it returns, training may go on and change everything.

        A save that its storage does not take (no room, no network) is reported and counted, and training goes on.

        Args:
            task: for what it keeps besides.
            step: finished steps.
            journal: on rank 0.
            final: nothing comes after it: it is waited for, and has to succeed.

        Raises:
            UserError: the final one could not be written.
            CheckpointError: the last save failed by a fault of the program.
        """
        began = time.perf_counter()
        self.finish(journal)
        self._faults.at("before-save", step)
        state = hold([*self._engine.pieces(), *task.pieces(), *_extra_pieces(task)])
        plan = self._plan(state)
        token, refusal = self._agree(plan.total)
        if refusal:
            self._conclude(Outcome(step, refusal), journal, final)
            return
        file = self._staging.fill(plan, state)
        stalled = time.perf_counter() - began
        attempt = Attempt(self._where, step, token)
        if self._engine.training.checkpoint_async and not final:
            self._background.start(lambda: self._write(attempt, plan, file, stalled))
        else:
            outcome = self._write(attempt, plan, file, stalled)
            self._conclude(replace(outcome, stall_s=time.perf_counter() - began), journal, final)

    def poll(self, journal: Journal | None = None) -> None:
        """Report a save that has ended meanwhile; between any two steps, not collective.

        Raises:
            CheckpointError: it failed by a fault of the program.
        """
        if self._background.ended:
            self.finish(journal)

    def finish(self, journal: Journal | None = None) -> None:
        """Wait for the save that is under way, and report it.

        Raises:
            CheckpointError: it failed by a fault of the program.
        """
        if self._background.busy:
            self._report(self._background.wait(), journal)

    def resume(self, task: Task, events: Path | None = None) -> tuple[int, list[str]]:
        """Load the newest valid checkpoint; collective.

        Rank 0 looks which ones there are; the ranks share the checking of the files. All of them go by what all found.

        Args:
            task: is filled.
            events: of the stage, which tell whether there has to be one.

        Returns:
            Its step (0: there is none), and lines about what was passed over or has changed.

        Raises:
            UserError: it does not fit the recipe, is another run's, is gone, or cannot be reached.
        """
        stored, notes = choose(self._where, self._group, self._made_by)
        if stored is None:
            self._group.first_says(lambda: require_none(self._where, events, notes))
            return 0, notes
        chosen, training = Checkpoint(stored), self._engine.training
        saved = self._group.first_says(chosen.state)
        require_seed(stored, saved, self._seed)
        require_codes(stored, self._made_by)
        self._engine.materialise_optimizer()
        filled = load(stored, self._engine, task, self._group)
        self._engine.loaded()
        task.load_extra_state(chosen.tensors(f"{EXTRA}/", but=filled))
        return chosen.step, notes + changed_settings(saved.get("training", {}), training.model_dump(mode="json"))

    def _plan(self, state: dict[str, Held]) -> Plan:
        """The plan of the save before, unless a rank holds something else now."""
        layout = layout_of(state)
        if self._planned is None or any(self._group.gather(self._planned[0] != layout)):
            self._planned = layout, make_plan(state, self._group)
        return self._planned[1]

    def _agree(self, size: int) -> tuple[str, str]:
        """Rank 0's token for a save of so many bytes, and why there will be none, if a rank has a reason."""
        answers = self._group.gather((secrets.token_hex(4), no_room(self._where, size)))
        return answers[0][0], next((refusal for _, refusal in answers if refusal), "")

    def _write(self, attempt: Attempt, plan: Plan, file: memoryview, stalled: float) -> Outcome:
        """Write, commit, and let old ones go; in the thread. All ranks come to the same end."""
        began = time.perf_counter()
        record = Record(self._group.world, self._engine.strategy, self._made_by, self._state(attempt.step))
        outcome = Outcome(attempt.step, stall_s=stalled, bytes=plan.total)
        try:
            dcp.save(
                {},  # the planner has all of it
                storage_writer=Writer(attempt, self._group.rank, plan, record, self._faults),
                planner=StagedPlanner(plan, file),
                process_group=self._group.process_group,
            )
        except CheckpointException as error:
            if self._group.first:
                attempt.abandon()
            return replace(outcome, fault=storage_fault(error))
        self._faults.at("after-save", attempt.step)
        warning = self._retire(attempt.step) if self._group.first else ""
        write_s = time.perf_counter() - began
        self.longest_s = max(self.longest_s, stalled + write_s)
        return replace(outcome, write_s=write_s, warning=warning)

    def _retire(self, step: int) -> str:
        try:
            folder.retire(self._where, step, self._engine.training.keep, self._made_by)
        except (OSError, UserError) as error:
            return f"old checkpoints could not be removed ({error})"
        return ""

    def _state(self, step: int) -> dict[str, Any]:
        training = self._engine.training
        # Neither generators nor loaders have a state of their own: dropout, restarts, donors and the data order are
        # functions of the seed and the step (`vqscale.seeds`, `vqscale.data.order`).
        return {
            "step": step,
            "seed": self._seed,
            "position": step * training.global_batch,
            "training": training.model_dump(mode="json"),
        }

    def _conclude(self, outcome: Outcome, journal: Journal | None, final: bool) -> None:
        self._report(outcome, journal)
        if final and outcome.fault:
            raise UserError(
                f"the checkpoint of the last step {outcome.step} could not be written ({outcome.fault})",
                where=self._where,
                mend="mend the storage, then `vqscale requeue` the run: it goes on from the checkpoint before",
            )

    def _report(self, outcome: Outcome, journal: Journal | None) -> None:
        self.failed += bool(outcome.fault)
        for line in filter(None, (outcome.fault and f"no checkpoint: {outcome.fault}", outcome.warning)):
            if self._group.first:
                print(f"warning: step {outcome.step}: {line}", flush=True)
        if journal is None:
            return
        times = {"stall_s": outcome.stall_s, "write_s": outcome.write_s}
        figures = {f"checkpoint/{name}": value for name, value in times.items()} if not outcome.fault else {}
        journal.scalars(outcome.step, figures | {"checkpoint/failed": float(self.failed)})
        facts: dict[str, Any] = {"committed": not outcome.fault, "bytes": outcome.bytes, **times}
        if outcome.fault or outcome.warning:
            facts["fault"] = outcome.fault or outcome.warning
        journal.event("checkpoint", outcome.step, **facts)


def _extra_pieces(task: Task) -> list[Piece]:
    return [whole(f"{EXTRA}/{name}", tensor) for name, tensor in task.extra_state().items()]
