from pathlib import Path
from typing import Any

import pytest

from tests.data_helpers import image_folder, image_shards
from vqscale.config.inputs import check_inputs
from vqscale.config.recipe import Recipe
from vqscale.data.manifest import read_manifest, write_manifest
from vqscale.data.pack import pack_images
from vqscale.errors import UserError


def recipe(**data: Any) -> Recipe:
    training = {"steps": 1, "global_batch": 48, "learning_rate": 1e-3}
    levels = [{"name": "bottom", "downsample": 2}, {"name": "top", "downsample": 2}]
    settings = {"image_size": 8, "streams": 4, "packet": 4, **data}
    return Recipe.model_validate(
        {
            "name": "t",
            "data": settings,
            "tokenizer": {"levels": levels, "training": training},
            "prior": {"networks": [{}], "training": training},
        }
    )


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, str]:
    pack_images(image_folder(tmp_path / "src"), str(tmp_path / "out"), size=8, holdout=6, shard_samples=6)
    return {"train": str(tmp_path / "out" / "train"), "validation": str(tmp_path / "out" / "validation")}


def test_good_shards_pass(shards: dict[str, str]):
    assert check_inputs(recipe(**shards)) == []


def test_weights_that_are_missing_are_said_before_anything_starts(shards: dict[str, str], tmp_path: Path):
    plain = recipe(**shards, image_size=16)
    there, absent = tmp_path / "there.pth", tmp_path / "absent.pth"
    there.write_bytes(b"")
    for paths, faulty in (([str(there)], False), ([str(there), str(absent)], True)):
        tree = plain.model_dump()
        tree["tokenizer"]["losses"]["perceptual"] = {"weights": paths}
        found = Recipe.model_validate(tree)
        if faulty:
            with pytest.raises(UserError, match=f"^tokenizer.losses.perceptual.weights: no file {absent}"):
                check_inputs(found)
        else:
            check_inputs(found)


def test_stored_size_is_a_warning(shards: dict[str, str]):
    warnings = check_inputs(recipe(**shards, image_size=16))
    assert len(warnings) == 2
    assert "stored at 8 pixels" in warnings[0]
    assert "resized from 8 to 4" in check_inputs(recipe(**shards, image_size=4))[0]


def test_faults_name_file_or_key(shards: dict[str, str], tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        check_inputs(recipe(train=str(tmp_path / "none"), validation=shards["validation"]))
    with pytest.raises(UserError, match="4 shards cannot feed 6 streams"):
        check_inputs(recipe(**shards, streams=6))
    with pytest.raises(UserError, match="packet of 8"):
        check_inputs(recipe(**shards, packet=8))
    with pytest.raises(UserError, match=r"data\.validation: .*shard-00000.tar is training data"):
        check_inputs(recipe(train=shards["train"], validation=shards["train"] + "/"))
    image_shards(tmp_path / "other", [5])
    with pytest.raises(UserError, match="has no classes, but"):
        check_inputs(recipe(train=shards["train"], validation=str(tmp_path / "other")))
    Path(shards["train"], "shard-00002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00002\.tar: shard is missing"):
        check_inputs(recipe(**shards))


def test_codes_are_no_images(shards: dict[str, str]):
    manifest = read_manifest(shards["validation"]).model_copy(update={"format": "vqscale-codes/1"})
    write_manifest(shards["validation"], manifest)
    with pytest.raises(UserError, match="not images"):
        check_inputs(recipe(**shards))


def test_clocks_feed_the_streams():
    assert check_inputs(recipe(clocks={"train": 96, "shards": 6})) == []
    with pytest.raises(UserError, match=r"data\.clocks\.shards: 3 shards cannot feed 4"):
        check_inputs(recipe(clocks={"train": 96, "shards": 3}))
    with pytest.raises(UserError, match="packet of 4"):
        check_inputs(recipe(clocks={"train": 12, "shards": 4}))
