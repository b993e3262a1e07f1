"""DCP's way out: one safetensors file a rank, and a manifest where DCP has a pickle."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from vqscale.checkpoint.commit import Attempt, encode_state
from vqscale.checkpoint.manifest import STATE, Manifest
from vqscale.faults import NO_FAULTS, Faults
from vqscale.training.checkpoints.staging import Plan, StagedPlanner, file_name


@dataclass(frozen=True)
class Record:
    """What stands in a checkpoint beside the tensors."""

    world: int
    strategy: str
    made_by: dict[str, str]
    """Recipe, code and versions, for people."""
    state: dict[str, Any]
    """Plain values that a resumed training needs."""


class Writer(StorageWriter):
    """Writes one checkpoint; used once.

    Args:
        attempt: where it goes.
        rank: of this process.
        plan: who writes what.
        record: what else belongs to it.
        faults: what is to go wrong on demand.
    """

    def __init__(self, attempt: Attempt, rank: int, plan: Plan, record: Record, faults: Faults = NO_FAULTS) -> None:
        self._attempt, self._rank, self._plan, self._record, self._faults = attempt, rank, plan, record, faults

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Where it goes is known already."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up on every rank."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes: make the folder."""
        self._attempt.begin()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's file, which the planner has staged as a whole."""
        assert isinstance(planner, StagedPlanner)
        results, name = [], file_name(self._rank)
        if len(planner.file):
            record = self._attempt.write(name, planner.file)
            results.append(WriteResult(MetadataIndex(name), record.bytes, record))
        self._faults.at("during-save", self._attempt.step)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written: state, manifest, commit."""
        files = {one.index.fqn: one.storage_data for mine in results for one in mine}
        files[STATE] = self._attempt.write(STATE, encode_state(self._record.state))
        manifest = Manifest(
            step=self._attempt.step,
            world=self._record.world,
            strategy=self._record.strategy,
            made_by=self._record.made_by,
            files=files,
            tensors=self._plan.tensors,
        )
        self._attempt.commit(manifest)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP asks for it where it has to choose a writer itself; here it never has to."""
        return True
