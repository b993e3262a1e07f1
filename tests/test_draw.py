"""`vqscale sample`: images from a run into any folder, around codes that are known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import draw, sample
from pipelines.draw import main
from pipelines.given import completed, from_file, grids_of
from tests.trained import copy_of, save_prior, save_tokenizer, trained_run
from tests.training_helpers import stage_of, whole_stage
from vqscale.config.layout import RunLayout
from vqscale.data.drawn import open_drawn
from vqscale.data.images import decode, encode_png
from vqscale.data.keep import HALVES, hide, kept_cells, pixel_mask
from vqscale.errors import UserError
from vqscale.loading import load_tokenizer

SIZE = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("draw") / "run")


def images_in(folder: Path) -> np.ndarray:
    drawn = open_drawn(folder)
    return drawn.read(range(len(drawn.labels)))


def codes_in(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, np.ndarray]:
    """What is decoded while a command draws."""
    seen: list[dict[str, np.ndarray]] = []
    decode_codes = draw.TrainedTokenizer.decode

    def watch(tokenizer: Any, codes: dict[str, np.ndarray]) -> np.ndarray:
        seen.append(codes)
        return decode_codes(tokenizer, codes)

    monkeypatch.setattr(draw.TrainedTokenizer, "decode", watch)
    assert main([str(run), "--out", str(folder), *words]) == 0
    return {name: np.concatenate([codes[name] for codes in seen]) for name in seen[0]}


def test_it_draws_what_the_stage_draws(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    staged = copy_of(run, tmp_path / "run", sample={"per_class": 1, "seed": 7, "top_k": 5, "classes": ["03", "11"]})
    whole_stage(sample, stage_of("sample", staged))
    words = ["--seed", "7", "--top-k", "5", "--classes", "03, 11", "--per-class", "1", "--batch", "1", "--json"]
    assert main([str(run), "--out", str(tmp_path / "out"), *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["output"], facts["folder"]) == (2, "png", str(tmp_path / "out"))
    assert np.array_equal(images_in(tmp_path / "out"), images_in(staged / "samples"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["03", "11", "samples.json", "sheet.png"]


def test_settings_act(run: Path, tmp_path: Path) -> None:
    """Each option changes the images, as its setting of the recipe does; and none of them is lost on the way."""
    found = {}
    for words in (
        (),
        ("--seed", "1"),
        ("--temperature", "3"),
        ("--top-k", "1"),
        ("--top-p", "0.2"),
        ("sample.seed=2",),
    ):
        folder = tmp_path / str(len(found))
        assert main([str(run), "--out", str(folder), "--count", "12", "--temperature", "9", *words]) == 0
        found[words] = images_in(folder).tobytes()
    assert len(set(found.values())) == len(found)
    assert main([str(run), "--out", str(tmp_path / "g"), "--count", "12", "--guidance", "3", "--output", "npz"]) == 0
    assert images_in(tmp_path / "g").tobytes() not in found.values()
    with np.load(tmp_path / "g" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == list(range(12))


def test_a_folder_is_kept_finished_or_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--out", str(tmp_path / "out"), "--count", "4"]
    assert main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")} == before
    capsys.readouterr()
    assert main([*words, "--seed", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds images of another drawing; name another folder, or replace them with --force" in line
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")} == before
    assert main([*words, "--seed", "1", "--force"]) == 0
    assert len(images_in(tmp_path / "out")) == 4


@pytest.mark.dist
def test_processes_change_nothing(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--out", str(tmp_path / "one"), "--count", "30"]) == 0
    command = [sys.executable, "-m", "pipelines.draw", str(run), "--count", "30", "--processes", "2"]
    house = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], capture_output=True, text=True, cwd=house, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(images_in(tmp_path / "two"), images_in(tmp_path / "one"))
    wrong = subprocess.run(
        [*command, "--out", str(tmp_path / "two"), "--seed", "1"],
        capture_output=True,
        text=True,
        cwd=house,
        timeout=120,
        check=False,
    )
    assert wrong.returncode == 2
    assert [line for line in wrong.stderr.splitlines() if line.startswith("error:")] == [
        f"error: {tmp_path / 'two'}: holds images of another drawing; name another folder, or replace them with --force"
    ]
    assert "Traceback" not in wrong.stderr


def test_top_codes_are_kept_and_details_drawn(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = np.random.default_rng(0).integers(0, 16, (3, 2, 2))
    np.savez(tmp_path / "codes.npz", top=top, label=np.array([1, 2, -1]))
    words = ["--from-codes", str(tmp_path / "codes.npz"), "--count", "7"]
    codes = codes_in(run, tmp_path / "out", monkeypatch, *words)
    assert np.array_equal(codes["top"], top[np.arange(7) % 3])
    assert len(np.unique(codes["bottom"].reshape(7, -1), axis=0)) == 7
    assert open_drawn(tmp_path / "out").labels == (1, 2, -1, 1, 2, -1, 1)
    assert decode((tmp_path / "out" / "sheet.png").read_bytes(), 64).std() > 5
    codes = codes_in(run, tmp_path / "again", monkeypatch, *words, "--classes", "4,5")
    assert open_drawn(tmp_path / "again").labels == (4, 4, 4, 5, 5, 5, 4)
    assert np.array_equal(codes["top"], top[np.arange(7) % 3])


def test_single_codes_of_a_file_are_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    known = {"top": rng.integers(-1, 16, (5, 2, 2)), "bottom": rng.integers(-1, 16, (5, 4, 4))}
    np.savez(tmp_path / "codes.npz", **known)
    codes = codes_in(run, tmp_path / "out", monkeypatch, "--from-codes", str(tmp_path / "codes.npz"))
    for name, wanted in known.items():
        assert np.array_equal(codes[name][wanted >= 0], wanted[wanted >= 0])


def test_codes_of_a_shard(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = next((run / "codes" / "train").glob("*.tar"))
    tokenizer, grids = load_tokenizer(run), grids_of(RunLayout(run).read_recipe())
    whole = from_file(shard, ["top", "bottom"], grids, tokenizer.fingerprint)
    words = ["--from-codes", str(shard), "--count", "20"]
    codes = codes_in(run, tmp_path / "out", monkeypatch, *words)
    assert np.array_equal(codes["top"], whole.codes["top"])
    assert not np.array_equal(codes["bottom"], whole.codes["bottom"])
    assert open_drawn(tmp_path / "out").labels == whole.labels
    with pytest.raises(UserError, match="holds codes of another tokenizer"):
        from_file(shard, [], grids, "another")


def pictures(folder: Path, count: int = 3) -> np.ndarray:
    folder.mkdir()
    images = np.random.default_rng(3).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(encode_png(image))
    return images


def test_details_of_images_are_drawn(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(tmp_path / "in")
    expected = load_tokenizer(run).encode(images)
    codes = codes_in(run, tmp_path / "out", monkeypatch, "--details-of", str(tmp_path / "in"))
    assert np.array_equal(codes["top"], expected["top"])
    assert not np.array_equal(codes["bottom"], expected["bottom"])
    words = ("--details-of", str(tmp_path / "in" / "1.png"), "--levels", "bottom", "--count", "2")
    codes = codes_in(run, tmp_path / "one", monkeypatch, *words)
    assert np.array_equal(codes["bottom"], expected["bottom"][[1, 1]])


@pytest.mark.parametrize("keep", HALVES)
def test_the_kept_half_stays_and_the_hidden_one_says_nothing(
    run: Path, keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, tokenizer = pictures(tmp_path / "in"), load_tokenizer(run)
    mask = pixel_mask(keep, SIZE)
    assert mask.sum() == SIZE**2 // 2
    known = completed(tokenizer, images, keep)
    changed = np.where(mask[..., None], images, 255 - images)
    assert completed(tokenizer, changed, keep).identity == known.identity
    assert known.pictures is not None
    assert np.array_equal(known.pictures[:, mask], images[:, mask])
    codes = codes_in(run, tmp_path / "out", monkeypatch, "--complete", str(tmp_path / "in"), "--keep", keep)
    for name, side in (("bottom", 4), ("top", 2)):
        cells = kept_cells(mask, side)
        assert cells.sum() == side**2 // 2
        assert np.array_equal(codes[name][:, cells], known.codes[name][:, cells])
        assert (known.codes[name][:, ~cells] == -1).all()


def test_a_mask_of_ones_own(run: Path, tmp_path: Path) -> None:
    drawn = np.zeros((SIZE, SIZE, 3), np.uint8)
    drawn[:5, :9] = 255
    (tmp_path / "mask.png").write_bytes(encode_png(drawn))
    mask = pixel_mask(str(tmp_path / "mask.png"), SIZE)
    assert np.array_equal(mask, drawn[..., 0] > 0)
    assert kept_cells(mask, 4).sum() == 2
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    hidden = hide(images, mask)
    assert np.array_equal(hidden[:, mask], images[:, mask])
    flat = np.where(mask[..., None], 77, images).astype(np.uint8)
    assert (hide(flat, mask) == 77).all()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--temperature", "-1"], "'temperature' is"),
        (["--classes", "noon"], "no class 'noon'"),
        (["--complete", "in"], "--complete and --keep go together"),
        (["--complete", "in", "--keep", "top-haf"], "did you mean 'top-half'?"),
        (["--complete", "nowhere.png", "--keep", "top-half"], "cannot be read"),
        (["--complete", "in", "--keep", "top-half", "--details-of", "in"], "exclude each other"),
        (["--details-of", "in", "--levels", "topp"], "no level 'topp'; did you mean 'top'?"),
        (["--details-of", "in", "--levels", "top,bottom"], "no level would be drawn"),
        (["--levels", "top"], "goes with --from-codes"),
        (["--details-of", "empty"], "holds no images"),
        (["--from-codes", "in/0.png"], "is no .npz with codes"),
        (["--from-codes", "wide.npz"], "top is int64 [3, 4, 4]"),
        (["--from-codes", "large.npz"], "codes outside of 0 to 15"),
        (["--from-codes", "label.npz"], "label 12 is no class"),
        (["--from-codes", "other.npz"], "has an array 'middle'"),
        (["--from-codes", "uneven.npz"], "different length"),
        (["--processes", "0"], "0 processes"),
        (["prior.dropout=1"], "settings begin with sample."),
        (["--cuont", "3"], "did you mean '--count'?"),
    ],
)
def test_bad_input_is_one_line(
    run: Path,
    words: list[str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    top = np.zeros((3, 2, 2), np.int64)
    files: dict[str, dict[str, np.ndarray]] = {
        "wide": {"top": np.zeros((3, 4, 4), np.int64)},
        "large": {"top": top + 16},
        "label": {"top": top, "label": np.array([0, 12, 0])},
        "other": {"middle": top},
        "uneven": {"top": top, "label": np.array([0])},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    assert main([str(run), "--out", "out", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
    assert not (tmp_path / "out").exists()


def test_no_run_and_no_prior(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is no run; vqscale ls lists them" in capsys.readouterr().err
    bare = copy_of(run, tmp_path / "bare")
    save_tokenizer(bare, 1, step=16)
    save_prior(bare, 1, step=16)
    (tmp_path / "bare" / "codes" / "train" / "manifest.json").unlink()
    assert main([str(bare), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "codes/train" in line
