"""Checkpoints over several real processes: any number of ranks and any strategy reads what another wrote."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_helpers import bits, cut, keeper, names, save, tensors, zeros
from tests.ranks import run_ranks
from tests.training_helpers import Kept, one_process
from vqscale.checkpoint import commit, folder
from vqscale.errors import UserError
from vqscale.training.checkpoints.reader import Checkpoint
from vqscale.training.distributed import Ranks, process_group
from vqscale.training.pieces import Piece

pytestmark = pytest.mark.dist

WAYS = ("whole", "rows", "ranges")


@dataclass(frozen=True)
class Seen:
    """What one of two ranks saw."""

    failed: int
    """Saves that left no checkpoint."""
    newest: int
    """Step of the newest one behind the save that failed."""
    torn: tuple[int, list[str]]
    """What `resume` said of a torn one."""
    refused: str
    """What it said of another seed."""


def write_all(root: Path) -> Seen:
    """One rank of two: saves in every way, on a disk that is full, and finds a checkpoint torn."""
    with process_group("cpu", 60) as ranks:
        for how in WAYS:
            checkpoints = keeper(cut(tensors(), how, ranks.rank, ranks.world), root / how)
            checkpoints.save(Kept(), 3)
            checkpoints.finish()
        failed, step = save_on_a_full_disk(root / "full", ranks)
        return Seen(failed, step, *resume_torn(root / "full", ranks))


def save_on_a_full_disk(where: Path, ranks: Ranks) -> tuple[int, int]:
    """Rank 1 alone has no room, for step 6 alone."""
    write = commit._write

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints, steps = keeper(cut(tensors(), "rows", ranks.rank, ranks.world), where), []
    for step in (3, 6, 9):
        if ranks.rank == 1:
            commit._write = full if step == 6 else write
        checkpoints.save(Kept(), step)
        checkpoints.finish()
        ranks.barrier()  # rank 0 has cleared away what was left
        steps.append(folder.steps(where)[0])
        ranks.barrier()
    return checkpoints.failed, steps[1]


def resume_torn(where: Path, ranks: Ranks) -> tuple[tuple[int, list[str]], str]:
    """The state of step 9, which rank 1 checks as the second of the files, is not what it was."""
    if ranks.first:
        file = where / "step-00000009" / "rank-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    ranks.barrier()
    empty = cut(zeros(tensors()), "whole", ranks.rank, ranks.world)
    found = keeper(empty, where).resume(Kept())
    try:
        keeper(empty, where, seed=7).resume(Kept())
    except UserError as error:
        return found, str(error)
    return found, ""


def rewrite(root: Path, target: Path) -> list[bool]:
    """One rank of a world that loads each of these in every way, and saves what it has got."""
    with process_group("cpu", 60) as ranks:
        return load_and_save(root, target, ranks)


def load_and_save(root: Path, target: Path, ranks: Ranks) -> list[bool]:
    right = []
    for before in WAYS:
        for how in WAYS:
            empty, full = (cut(state, how, ranks.rank, ranks.world) for state in (zeros(tensors()), tensors()))
            found = keeper(empty, root / before).resume(Kept())
            right.append(found == (3, []) and locals_of(empty) == locals_of(full))
            keeper(empty, target / (how if how == before else f"{before}-{how}")).save(Kept(), 3, final=True)
    return right


def locals_of(pieces: list[Piece]) -> Any:
    return bits({piece.name: piece.local for piece in pieces})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    """What two ranks wrote and saw."""
    root = tmp_path_factory.mktemp("written")
    return root, run_ranks(2, write_all, root)


def test_every_way_of_cutting_reads_every_other_at_every_number_of_ranks(
    written: tuple[Path, list[Seen]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_ranks(3, rewrite, written[0], tmp_path / "3") == [[True] * 9] * 3
    with one_process(monkeypatch) as ranks:
        assert load_and_save(tmp_path / "3", tmp_path / "1", ranks) == [True] * 9
    fingerprints = set()
    for root, worlds in ((written[0], 2), (tmp_path / "3", 3), (tmp_path / "1", 1)):
        for path in (path for path in root.iterdir() if path.name != "full"):
            checkpoint = Checkpoint(folder.open_valid(path, 3))
            assert bits(checkpoint.tensors()) == bits(tensors())
            assert checkpoint.stored.manifest.world == worlds
            sizes = [file.bytes for name, file in checkpoint.stored.manifest.files.items() if name != "state.json"]
            assert len(sizes) == worlds, "the ranks share the writing"
            fingerprints.add(checkpoint.fingerprint())
    assert len(fingerprints) == 1, "the fingerprint knows neither ranks nor strategy"


@pytest.mark.fault
def test_a_full_disk_on_one_rank_is_known_to_all(written: tuple[Path, list[Seen]]) -> None:
    root, seen = written
    assert [(one.failed, one.newest) for one in seen] == [(1, 3), (1, 3)]
    assert names(root / "full") == ["step-00000003", "step-00000009"]


@pytest.mark.fault
def test_all_ranks_pass_over_what_one_finds_torn(written: tuple[Path, list[Seen]]) -> None:
    one, other = written[1]
    assert one.torn == other.torn
    step, (note,) = one.torn
    assert step == 3
    assert "step-00000009: rank-00001.safetensors is not what the manifest says" in note


def test_what_one_rank_refuses_all_refuse(written: tuple[Path, list[Seen]]) -> None:
    one, other = written[1]
    assert one.refused == other.refused
    assert "was trained with seed 0, the recipe has 7" in one.refused


DYING = """
import os, signal, sys
from pathlib import Path
from tests.checkpoint_helpers import save
from vqscale.checkpoint import commit
from vqscale.training.distributed import process_group

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
os.environ["MASTER_PORT"] = "0"
write, last = commit._write, sys.argv[2]


def dying(path, *given):
    if path.name == last:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *given)


with process_group("cpu", 60):
    save(Path(sys.argv[1]), 3)
    commit._write = dying
    save(Path(sys.argv[1]), 6, keep=1)
"""


@pytest.mark.fault
def test_a_kill_between_data_and_manifest_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = Path(__file__).parents[1]
    command = [sys.executable, "-c", DYING, str(tmp_path), "manifest.json"]
    done = subprocess.run(command, cwd=house, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    unfinished, whole = names(tmp_path)
    assert unfinished.startswith(".step-00000006.")
    assert names(tmp_path / unfinished) == ["rank-00000.safetensors", "state.json"]
    assert whole == "step-00000003"
    with one_process(monkeypatch):
        state = zeros(tensors())
        assert keeper(state, tmp_path).resume(Kept()) == (3, [])
        assert bits(state) == bits(tensors())
        save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000003", "step-00000006"], "what the dead save left is gone"
