"""Whose checkpoints a training goes on from, and what it does where its own are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import train_tokenizer
from pipelines.stage import Stage
from tests.checkpoint_helpers import names
from tests.training_helpers import clock_run, one_process
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import write_json


def trained(run: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train the tokenizer as its stage does; the number of lines that its events have then."""
    layout = RunLayout(run)
    with one_process(monkeypatch) as ranks:
        train_tokenizer.main(Stage("tokenizer", layout, layout.read_recipe(), ranks, 1))
    return len(layout.events("tokenizer").read_text().splitlines())


@pytest.mark.fault
def test_a_training_whose_checkpoints_are_gone_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not mounted looks as one of a run that has not begun."""
    run = clock_run(tmp_path / "run")
    first = trained(run, monkeypatch)
    events, place = RunLayout(run).events("tokenizer"), run / "checkpoints" / "tokenizer"
    place.rename(tmp_path / "unmounted")
    with pytest.raises(
        UserError, match=r"step 8 was committed, but .* \(there is none\).*begin anew on purpose, remove"
    ):
        trained(run, monkeypatch)
    (tmp_path / "unmounted").rename(place)
    for name in names(place):
        (place / name / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000008: rank-00000.safetensors has 0 bytes.*passed over\); bring"):
        trained(run, monkeypatch)
    assert names(place), "nothing of them was removed"
    events.unlink()
    assert trained(run, monkeypatch) == pytest.approx(first, abs=3), "all of it again"


def test_a_run_of_the_same_id_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are those of one home, and free again when a run is deleted; a folder of checkpoints is for all."""
    place = tmp_path / "all"
    run, again = (clock_run(tmp_path / name, resources__checkpoints=str(place)) for name in ("one", "two"))
    write_json(RunLayout(run).info, {"id": "same", "created": 1.5, "host": "here"})
    write_json(RunLayout(again).info, {"id": "same", "created": 2.5, "host": "here"})
    trained(run, monkeypatch)
    before = names(place / "same" / "tokenizer")
    with pytest.raises(UserError, match=r"made 1970-01-01T00:00:01\.5.* on here; this one .*00:02"):
        trained(again, monkeypatch)
    assert names(place / "same" / "tokenizer") == before
    assert trained(run, monkeypatch) > 0, "its own run goes on"
