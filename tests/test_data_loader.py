import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.data_helpers import image_shards, picture
from vqscale.data.images import ImageSource, encode_png
from vqscale.data.loader import EvaluationReader, Loader
from vqscale.data.order import StreamOrder
from vqscale.errors import UserError

COUNTS = [31, 40, 25, 38, 29, 40, 33, 21, 40, 37, 36, 22]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object]:
    root = tmp_path_factory.mktemp("shards")
    return str(root), image_shards(root, COUNTS)


def loader(shards, *, rank: int = 0, world: int = 1, **how) -> Loader:
    url, manifest = shards
    order = StreamOrder(manifest.counts, seed=1, streams=12, packet=4, shuffle=30)
    return Loader(ImageSource(url, manifest, 8), order, rank=rank, world=world, **{"global_batch": 48, **how})


def steps(shards, world: int, count: int, **how) -> list[np.ndarray]:
    """Global batches, put together from all ranks by `Batch.index`."""
    whole = [np.full(48, -1) for _ in range(count)]
    pictures = [np.zeros((48, 8, 8, 3), np.uint8) for _ in range(count)]
    for rank in range(world):
        with loader(shards, rank=rank, world=world, **how) as batches:
            for place, batch in enumerate(islice(batches, count)):
                assert batch.step == how.get("start_step", 0) + place
                assert batch.fields["image"].flags.c_contiguous
                assert batch.fields["label"].dtype == batch.index.dtype == np.int64
                whole[place][batch.index] = batch.fields["label"]
                pictures[place][batch.index] = batch.fields["image"]
    assert all((labels >= 0).all() for labels in whole)
    if not how.get("flip"):
        for labels, images in zip(whole, pictures, strict=True):
            assert (images == np.stack([picture(label) for label in labels])).all()
    return [
        np.concatenate([labels, images.reshape(48, -1).sum(1)]) for labels, images in zip(whole, pictures, strict=True)
    ]


@pytest.mark.parametrize(("world", "threads"), [(1, 3), (2, 1), (3, 2), (4, 1), (6, 2), (12, 1)])
def test_global_batches_depend_on_neither_ranks_nor_threads(shards, world: int, threads: int):
    assert np.array_equal(steps(shards, world, 25, threads=threads), steps(shards, 1, 25))  # three epochs


def test_resumes_anywhere(shards):
    whole = steps(shards, 1, 30)
    for start, world in ((1, 1), (7, 2), (17, 3), (28, 4)):
        assert np.array_equal(steps(shards, world, 2, start_step=start), whole[start : start + 2])


def test_flips_are_mirrors_that_the_position_decides(shards):
    with loader(shards, flip=True, seed=5, threads=2) as batches, loader(shards) as plain:
        first, other = next(batches), next(plain)
    assert np.array_equal(first.fields["label"], other.fields["label"])
    mirrored = 0
    for image, still in zip(first.fields["image"], other.fields["image"], strict=True):
        mirrored += not np.array_equal(image, still)
        assert np.array_equal(image, still) or np.array_equal(image, still[:, ::-1])
    assert 10 < mirrored < 38
    assert np.array_equal(steps(shards, 2, 3, flip=True, seed=5), steps(shards, 1, 3, flip=True, seed=5))


def test_bad_samples_are_replaced_and_counted(shards, tmp_path: Path):
    bad = {3: b"nothing", 17: encode_png(picture(17))[:60], 200: b"\xff\xd8\xff rubbish"}
    damaged = str(tmp_path), image_shards(tmp_path, COUNTS, broken=bad)
    with loader(damaged, error_budget=0.1, threads=2) as batches, loader(shards) as good:
        for batch, whole in islice(zip(batches, good, strict=True), 8):
            labels, expected = batch.fields["label"], whole.fields["label"]
            moved = labels != expected
            assert set(expected[moved]) <= set(bad)
            assert not set(labels) & set(bad)
            assert (batch.fields["image"] == np.stack([picture(label) for label in labels])).all()
        found = {int(key) for _, key, _ in batches.bad_samples}
        kinds = {(int(key), kind) for _, key, kind in batches.bad_samples}
        assert batches.bad == {"format": 2, "corrupt": 1}
    assert found == set(bad)
    assert (17, "corrupt") in kinds


def test_too_many_bad_samples_stop_the_run(tmp_path: Path):
    bad = dict.fromkeys(range(0, sum(COUNTS), 9), b"nothing")
    damaged = str(tmp_path), image_shards(tmp_path, COUNTS, broken=bad)
    with (
        loader(damaged, error_budget=0.01) as batches,
        pytest.raises(UserError, match=r"samples are bad .*format"),
    ):
        for _ in islice(batches, 20):
            pass


def test_faults_of_the_threads_reach_the_consumer(tmp_path: Path):
    manifest = image_shards(tmp_path, COUNTS)
    (tmp_path / "s4.tar").unlink()
    batches = loader((str(tmp_path), manifest))
    with pytest.raises(UserError, match=r"s4\.tar: no such file"):
        list(islice(batches, 30))
    assert not threads_left()


def test_a_group_without_a_good_sample_is_an_error(tmp_path: Path):
    damaged = str(tmp_path), image_shards(tmp_path, COUNTS, broken=dict.fromkeys(range(500), b""))
    with loader(damaged, error_budget=1.0) as batches, pytest.raises(UserError, match="can be read"):
        next(batches)


def test_manifest_that_lies_is_an_error(shards):
    url, manifest = shards
    first = manifest.shards[0].model_copy(update={"samples": 30})
    lying = manifest.model_copy(update={"shards": (first, *manifest.shards[1:])})
    with (
        loader((url, lying)) as batches,
        pytest.raises(UserError, match="holds 31 samples, its manifest says 30"),
    ):
        list(islice(batches, 20))


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vqscale")]


def test_close_leaves_no_thread(shards):
    batches = loader(shards, threads=3)
    next(batches)
    assert batches.wait_s > 0
    batches.close()
    batches.close()
    assert not threads_left()
    assert list(batches) == []
    loader(shards).close()  # never read from
    assert not threads_left()


def test_global_batch_must_divide(shards):
    with pytest.raises(UserError, match="multiple of 8"):
        loader(shards, world=2, global_batch=12)
    assert not threads_left()


@pytest.mark.parametrize(("world", "batch"), [(1, 50), (2, 7), (5, 64), (20, 3)])
def test_evaluation_reads_each_sample_once(shards, world: int, batch: int):
    url, manifest = shards
    seen: list[int] = []
    for rank in range(world):
        reader = EvaluationReader(ImageSource(url, manifest, 8), manifest.counts, rank, world, batch)
        sizes = []
        for part in reader:
            assert np.array_equal(part.index, part.fields["label"])
            assert (part.fields["image"] == np.stack([picture(label) for label in part.index])).all()
            seen.extend(part.index.tolist())
            sizes.append(len(part.index))
        assert all(size == batch for size in sizes[:-1])
        assert sum(sizes) == reader.samples
    assert sorted(seen) == list(range(sum(COUNTS)))


def test_evaluation_counts_bad_samples(tmp_path: Path):
    manifest = image_shards(tmp_path, COUNTS, broken={40: b"no"})
    source = ImageSource(str(tmp_path), manifest, 8)
    reader = EvaluationReader(source, manifest.counts, 0, 1, 32, error_budget=0.01)
    assert sum(len(part.index) for part in reader) == sum(COUNTS) - 1
    assert reader.bad == {"format": 1}
    with pytest.raises(UserError, match="sample 000040 is bad"):
        list(source.read_shard(1, 16))
    bad: list = []
    keys = [key for _, part in source.read_shard(1, 16, bad) for key in part]
    assert len(keys) == COUNTS[1] - 1
    assert [pick.key for pick in bad] == ["000040"]
