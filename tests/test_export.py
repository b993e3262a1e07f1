"""Exported models: the same codes, images and likelihoods as the run's; whole or not there; a card without blanks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from pipelines.export import main
from tests.trained import copy_of, trained_run
from tests.training_helpers import tf32_allowed
from vqscale import load_prior, load_tokenizer, storage
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.exporting import export_run
from vqscale.files import write_json
from vqscale.model_files import read_exported


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("exported") / "model"
    export_run(RunLayout(trained), where)
    return where


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def require_same(run: Path, place: str | Path) -> None:
    ours, theirs = load_tokenizer(run), load_tokenizer(place)
    codes = ours.encode(images())
    assert codes.keys() == theirs.encode(images()).keys()
    assert all(np.array_equal(grid, theirs.encode(images())[name]) for name, grid in codes.items())
    assert np.array_equal(ours.decode(codes), theirs.decode(codes))
    assert ours.fingerprint == theirs.fingerprint
    grids = [torch.from_numpy(codes[name].astype(np.int64)) for name in reversed(ours.levels)]
    classes = torch.tensor([0, 5, 11])
    with torch.no_grad():
        for first, second in zip(load_prior(run)(grids, classes), load_prior(place)(grids, classes), strict=True):
            assert torch.equal(first, second)


def test_models_are_those_of_the_run(trained: Path, place: Path) -> None:
    require_same(trained, place)


def test_any_storage_will_do(trained: Path) -> None:
    url = "memory://exported/model"
    try:
        export_run(RunLayout(trained), url)
        require_same(trained, url)
    finally:
        fsspec.filesystem("memory").rm("/exported", recursive=True)


@pytest.mark.parametrize("load", [load_tokenizer, load_prior])
def test_fp32_is_exact_on_gpus_where_a_model_is_loaded(trained: Path, load: Callable[[Path], object]) -> None:
    """And where a stage begins: `test_engine_settings.py::test_fp32_is_exact_on_gpus_where_a_stage_begins`."""
    with tf32_allowed() as allowed:
        load(trained)
        assert not allowed()


def test_a_tokenizer_alone(trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "prior")
    exported = export_run(RunLayout(run), tmp_path / "model")
    assert exported.prior is None
    assert set(exported.files) == {"tokenizer.safetensors"}
    with pytest.raises(UserError, match="holds a tokenizer alone"):
        load_prior(tmp_path / "model")
    assert "Without a prior" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.fault
def test_what_is_not_whole_is_refused(trained: Path, place: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        for file in place.iterdir():
            (made / file.name).write_bytes(file.read_bytes())
        return made

    with pytest.raises(UserError, match="neither a run nor an exported model"):
        load_tokenizer(tmp_path)
    flipped = copied("flipped")
    data = bytearray((flipped / "tokenizer.safetensors").read_bytes())
    data[-1] ^= 1
    (flipped / "tokenizer.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"is not the file that config\.json names"):
        load_tokenizer(flipped)
    newer = copied("newer")
    (newer / "config.json").write_text('{"format": "vqscale-model/2"}')
    with pytest.raises(UserError, match="is not the config of an exported model"):
        load_tokenizer(newer)
    other = copied("other")
    tree = json.loads((other / "config.json").read_text())
    tree["tokenizer"]["hidden"] = 6
    (other / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"does not fit config\.json"):
        load_tokenizer(other)
    missing = copied("missing")
    (missing / "prior.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        load_prior(missing)


def test_nothing_is_overwritten_unasked(trained: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds an exported model"):
        export_run(RunLayout(trained), place)
    export_run(RunLayout(trained), place, replace=True)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not an empty folder"):
        export_run(RunLayout(trained), tmp_path, replace=True)
    assert storage.list_names(tmp_path) == ["letter.txt"]


def test_the_card_says_what_is_known(trained: Path, tmp_path: Path) -> None:
    run = RunLayout(copy_of(trained, tmp_path / "run"))
    write_json(run.done("tokenizer"), {"stage": "tokenizer", "seconds": 3.5, "parameters": 1234567, "bad_samples": 2})
    write_json(run.report, {"psnr": 21.987654, "held_out_images": 1200, "usage_top": 0.25, "bits_per_dim": 4.5})
    write_json(run.code / "identity.json", {"commit": "abc123", "uncommitted": False, "sources_sha256": "ff"})
    exported = export_run(run, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    known = ("1,234,567", "| 21.99 | 1200 held-out images |", "codes of level top in use | 0.25 | training images |")
    for said in (*known, "`abc123`", exported.fingerprint):
        assert said in text
    assert "replaced: 2." in text
    assert "Not measured: rfid, fid." in text
    for blank in ("None", "[More", "TODO", "{}"):
        assert blank not in text, blank
    example = re.search(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert example
    known = {"images": images()}
    exec(example[1].replace("PLACE", str(tmp_path / "model")), known)
    assert known["images"].shape == (3, 16, 16, 3)


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trained), str(tmp_path / "model"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fingerprint"] == read_exported(tmp_path / "model").fingerprint
    assert main([str(tmp_path), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: is no run directory")
