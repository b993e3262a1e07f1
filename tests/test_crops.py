"""Several squares of each training image at extraction."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import extract_codes
from tests.data_helpers import image_shards, picture
from tests.recipes import tiny_recipe, write_recipe
from tests.trained import save_tokenizer
from tests.training_helpers import stage_of, whole_stage
from vqscale.config.inputs import check_inputs
from vqscale.config.load import load_recipe
from vqscale.data.bad import BadSample
from vqscale.data.code_source import CodeSource
from vqscale.data.crops import SMALLEST, Crops
from vqscale.data.images import decode, decode_whole, encode_jpeg, encode_png
from vqscale.data.manifest import read_manifest
from vqscale.data.shards import open_shards
from vqscale.errors import UserError
from vqscale.loading import load_tokenizer

SIZE = 16


def ramp(height: int, width: int) -> np.ndarray:
    """An image whose red is its row and whose green is its column."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, 0 * x], -1).astype(np.uint8)


def cut(image: np.ndarray, keys: list[str], count: int = 4, seed: int = 0) -> np.ndarray:
    out = np.zeros((len(keys), count, SIZE, SIZE, 3), np.uint8)
    assert Crops(count, seed).decode_each([encode_png(image)] * len(keys), keys, out) == []
    return out


def test_squares_follow_from_seed_key_and_number() -> None:
    image = ramp(60, 90)
    keys = [f"{n:04d}" for n in range(50)]
    found = cut(image, keys)
    assert np.array_equal(cut(image, keys[::-1])[::-1], found)
    assert np.array_equal(cut(image, keys, count=2), found[:, :2])
    centre = decode(encode_png(image), SIZE)
    assert all(np.array_equal(one, centre) for one in found[:, 0])
    further = found[:, 1:].reshape(-1, *centre.shape)
    assert len(np.unique(further.reshape(len(further), -1), axis=0)) > 140
    assert not np.array_equal(cut(image, keys, seed=1)[:, 1:], found[:, 1:])


def test_squares_lie_anywhere_and_are_not_enlarged() -> None:
    """Sides go from 0.8 of the short side up to it, and places from edge to edge."""
    squares = cut(ramp(60, 90), [str(n) for n in range(200)], count=3)[:, 1:].reshape(-1, SIZE, SIZE, 3).astype(float)
    first, last = squares[:, 0, 0], squares[:, -1, -1]
    sides = (last - first)[:, 0] / (1 - 1 / SIZE)
    assert (sides.min(), sides.max()) == (pytest.approx(60 * SMALLEST, abs=2), pytest.approx(60, abs=2))
    assert (first.min(axis=0)[:2] < 4).all()
    assert last[:, 0].max() > 55
    assert last[:, 1].max() > 85
    room = cut(ramp(17, 17), [str(n) for n in range(50)])[:, 1:].reshape(-1, SIZE, SIZE, 3)
    assert (room[:, -1, -1, 0].astype(int) - room[:, 0, 0, 0] >= SIZE - 2).all(), "never fewer pixels than wanted"


def test_a_whole_jpeg_is_shrunk_as_far_as_is_wanted() -> None:
    data = encode_jpeg(np.kron(ramp(64, 96), np.ones((4, 4, 1))).astype(np.uint8), 95)
    for least, side in ((200, 256), (128, 128), (65, 128), (20, 32)):
        assert decode_whole(data, least).shape[0] == side
    grey = io.BytesIO()
    Image.fromarray(ramp(20, 30)[:, :, 0]).save(grey, "PNG")
    assert decode_whole(grey.getvalue(), 4).shape == (20, 30, 3)
    with pytest.raises(BadSample, match="corrupt"):
        decode_whole(encode_png(ramp(30, 30))[:60], 4)
    with pytest.raises(BadSample, match="format"):
        decode_whole(b"\xff\xd8\xffnothing", 4)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run over stored images of 24 pixels, one of which cannot be read."""
    image_shards(tmp_path / "train", [10, 10], size=24, broken={3: b"no image"})
    image_shards(tmp_path / "validation", [8], size=24)
    made = tmp_path / "run"
    made.mkdir()
    extract(made, crops=1)
    return made


def extract(run: Path, **settings: object) -> None:
    shards = {split: str(run.parent / split) for split in ("train", "validation")}
    data = {"image_size": SIZE, "streams": 2, "packet": 2, "error_budget": 0.1, **shards}
    write_recipe(run / "recipe.yaml", data=data, extract={"batch": 7, "block": 8, **settings})
    if not (run / "checkpoints").exists():
        save_tokenizer(run, 0)
    whole_stage(extract_codes, stage_of("extract", run))


def codes_of(run: Path, split: str) -> tuple[dict[str, np.ndarray], list[str]]:
    source = CodeSource(open_shards(str(run / "codes" / split)))
    parts = [part for n in range(len(source.manifest.shards)) for part in source.read_shard(n, 1000)]
    fields = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return fields, [key for _, keys in parts for key in keys]


def test_crops_are_samples_of_their_own(run: Path) -> None:
    plain, plain_keys = codes_of(run, "train")
    held_out = (run / "codes" / "validation" / "s0.tar").read_bytes()
    extract(run, crops=3, flips=True)
    fields, keys = codes_of(run, "train")
    endings = ["", "~flip", "~crop1", "~crop1~flip", "~crop2", "~crop2~flip"]
    assert keys == [f"{key}{ending}" for key in plain_keys for ending in endings]
    assert len(plain_keys) == 19
    tokenizer = load_tokenizer(run)
    out = np.empty((19, 3, SIZE, SIZE, 3), np.uint8)
    Crops(3, 0).decode_each([encode_png(picture(int(key), 24)) for key in plain_keys], plain_keys, out)
    for name in tokenizer.levels:
        by_image = fields[name].reshape(19, 6, *fields[name].shape[1:])
        assert np.array_equal(by_image[:, 0], plain[name])
        for place in range(3):
            squares = out[:, place]
            assert np.array_equal(by_image[:, 2 * place], tokenizer.encode(squares)[name])
            assert np.array_equal(by_image[:, 2 * place + 1], tokenizer.encode(squares[:, :, ::-1].copy())[name])
    assert fields["label"].tolist() == plain["label"].repeat(6).tolist()
    assert (run / "codes" / "validation" / "s0.tar").read_bytes() == held_out
    manifest = read_manifest(run / "codes" / "train")
    assert (manifest.skipped, manifest.source["crops"]) == (1, 3)


def test_other_crops_are_extracted_again(run: Path) -> None:
    shard = run / "codes" / "train" / "s1.tar"
    extract(run, crops=2)
    two, written = codes_of(run, "train"), shard.stat().st_mtime_ns
    extract(run, crops=2)
    assert shard.stat().st_mtime_ns == written
    extract(run, crops=3)
    assert len(codes_of(run, "train")[1]) == 57
    extract(run, crops=2)
    assert codes_of(run, "train")[1] == two[1]


def test_crops_without_room_are_refused(run: Path) -> None:
    recipe = run / "recipe.yaml"
    cramped = load_recipe(recipe, ["extract.crops=2", "data.image_size=24"])
    with pytest.raises(UserError, match="2 squares of 24 pixels cannot be cut from images of 24") as caught:
        check_inputs(cramped)
    assert len(str(caught.value).splitlines()) == 1
    assert check_inputs(load_recipe(recipe, ["extract.crops=2"]))
    recipe.write_text(recipe.read_text().replace("crops: 1", "crops: 2").replace("image_size: 16", "image_size: 24"))
    with pytest.raises(UserError, match="cannot be cut from images of 24"):
        extract_codes.main(stage_of("extract", run))
    with pytest.raises(UserError, match="no room for crops"):
        tiny_recipe(extract__crops=2)
    shards = {"image_size": SIZE, "train": "a", "validation": "b", "streams": 2, "packet": 2}
    with pytest.raises(UserError, match="cut on the CPU"):
        tiny_recipe(extract__crops=2, data=shards | {"decoder": "cuda"})
