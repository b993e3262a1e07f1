from pathlib import Path
from typing import Any

import pytest

from pipelines import generate, pack
from pipelines.stage import Stage
from tests.ranks import torchrun
from tests.recipes import write_recipe
from vqscale.config.layout import RunLayout
from vqscale.data.clock_reader import read_clocks
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import read_manifest
from vqscale.data.shards import open_shards
from vqscale.data.verify import verify
from vqscale.events import newest
from vqscale.files import read_json


class OneRank:
    """A world of one, without a process group."""

    rank, world, first = 0, 1, True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass


def stage(name: str, run: Path) -> Any:
    layout = RunLayout(run)
    return Stage(name, layout, layout.read_recipe(), OneRank(), 1)  # type: ignore[arg-type]


def run_directory(path: Path, processes: int) -> Path:
    path.mkdir()
    write_recipe(path / "recipe.yaml", resources__processes=processes, data__image_size=32)
    return path


def hashes(run: Path) -> list[str]:
    manifests = [read_manifest(run / "shards" / split) for split in ("train", "validation")]
    return [shard.sha256 for manifest in manifests for shard in manifest.shards]


def test_clocks_become_shards(tmp_path: Path):
    run = run_directory(tmp_path / "run", 1)
    assert generate.main(stage("generate", run))["images"] == 80
    assert pack.main(stage("pack", run)) == {"train_samples": 64, "validation_samples": 16}
    train = read_manifest(run / "shards" / "train")
    assert (train.samples, len(train.shards), len(train.classes)) == (64, 4, 12)
    assert train.source["kept_unchanged"] == 64
    assert verify(open_shards(str(run / "shards" / "train"))) == []
    fields, _ = next(ImageSource(open_shards(str(run / "shards" / "train")), 32).read_shard(0, 16))
    assert (read_clocks(fields["image"]).hour == fields["label"]).mean() > 0.9


def test_stages_go_on_where_they_were(tmp_path: Path):
    run = run_directory(tmp_path / "run", 1)
    generate.main(stage("generate", run))
    pack.main(stage("pack", run))
    expected = hashes(run)
    files = [path for path in run.rglob("*") if path.suffix in (".png", ".tar")]
    before = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    lost = next((run / "shards" / "train").glob("*.tar"))
    lost.write_bytes(b"cut")
    generate.main(stage("generate", run))
    pack.main(stage("pack", run))
    assert hashes(run) == expected
    assert verify(open_shards(str(run / "shards" / "train"))) == []
    held = [path for path in files if path.parent.name == "validation"]
    assert all(path.stat().st_mtime_ns == before[path] for path in held)  # what was whole is not written again


@pytest.mark.dist
def test_two_ranks_write_the_same_shards(tmp_path: Path):
    both, alone = run_directory(tmp_path / "both", 2), run_directory(tmp_path / "alone", 1)
    for name, module in (("generate", generate), ("pack", pack)):
        torchrun(2, "-m", "--", f"pipelines.{name}", "--run", str(both))
        module.main(stage(name, alone))
    assert hashes(both) == hashes(alone)
    layout = RunLayout(both)
    assert read_json(layout.done("generate"))["images"] == 80
    assert read_json(layout.done("pack"))["train_samples"] == 64
    event = newest(layout.events("pack"), "").get("")
    assert event is not None
    assert event["step"] == event["total"] == 80
