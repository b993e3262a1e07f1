"""What a stage reads is verified before its processes start: one clear line where something is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.handover import check_handover
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState
from pipelines import extract_codes, generate, pack
from tests.recipes import write_recipe
from tests.test_extraction import save_tokenizer
from tests.training_helpers import stage_of, whole_stage
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json
from vqscale.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def layout(home: Path) -> RunLayout:
    """A run that is ready for its prior."""
    made = create(make_plan(str(write_recipe(home / "r.yaml")), run=home / "mine"))
    for name, module in (("generate", generate), ("pack", pack)):
        module.main(stage_of(name, made.root))
        write_json(made.done(name), {"stage": name})
    save_tokenizer(made.root, 0)
    write_json(made.done("tokenizer"), {"stage": "tokenizer"})
    write_json(made.done("extract"), whole_stage(extract_codes, stage_of("extract", made.root)))
    return made


def test_what_is_whole_is_handed_over(layout: RunLayout) -> None:
    for stage in ("generate", "pack", "tokenizer", "extract", "prior"):
        check_handover(layout, stage)


def lose_marker(layout: RunLayout) -> None:
    layout.done("tokenizer").unlink()


def lose_checkpoint(layout: RunLayout) -> None:
    for path in (layout.root / "checkpoints/tokenizer").glob("*/manifest.json"):
        path.unlink()


def cut_shard(layout: RunLayout) -> None:
    path = next((layout.root / "shards/train").glob("*.tar"))
    path.write_bytes(path.read_bytes()[:-512])


def lose_manifest(layout: RunLayout) -> None:
    (layout.codes("validation") / "manifest.json").unlink()


def lose_code_shard(layout: RunLayout) -> None:
    next(layout.codes("train").glob("*.tar")).unlink()


def other_tokenizer(layout: RunLayout) -> None:
    write_json(layout.done("extract"), {**read_json(layout.done("extract")), "fingerprint": "0" * 64})


@pytest.mark.parametrize(
    ("stage", "spoil", "expected"),
    [
        ("extract", lose_marker, "extract: stage 'tokenizer' has not finished; vqscale requeue mine"),
        ("extract", lose_checkpoint, "checkpoints/tokenizer: has no committed checkpoint; run the stage 'tokenizer'"),
        ("tokenizer", cut_shard, "shards/train/"),
        ("prior", lose_manifest, "codes/validation"),
        ("prior", lose_code_shard, "codes/train/"),
        ("prior", other_tokenizer, "made by another tokenizer than the extraction says"),
        ("sample", lambda layout: None, "sample: stage 'prior' has not finished"),
    ],
)
def test_what_is_not_is_named(layout: RunLayout, stage: str, spoil: Callable[[RunLayout], None], expected: str) -> None:
    spoil(layout)
    with pytest.raises(UserError) as caught:
        check_handover(layout, stage)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_pack_wants_images(layout: RunLayout) -> None:
    for path in sorted(layout.images("validation").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UserError, match=r"images/validation: holds no images; run the stage 'generate' first"):
        check_handover(layout, "pack")


def test_nothing_is_started_then_and_no_gpu_waits(layout: RunLayout) -> None:
    """Under the real supervisor and on the batch host: the attempt fails as a fault of the user's."""
    lose_code_shard(layout)
    assert subprocess.run([sys.executable, "-m", "launcher.supervise", str(layout.root)], cwd=ROOT).returncode == 1
    entry = RunState.read(layout).stages["prior"]
    assert (entry.state, entry.attempt) == ("failed", 1)
    assert entry.message.startswith("cannot start: ")
    assert read_json(layout.failure("prior"))["kind"] == "user"
    assert not layout.attempt("prior", 1).exists(), "no process was started"


def test_every_stage_can_be_asked_for(layout: RunLayout) -> None:
    """Those behind the first that is missing each name what they miss."""
    for stage in STAGES[STAGES.index("sample") :]:
        with pytest.raises(UserError, match="has not finished"):
            check_handover(layout, stage)
