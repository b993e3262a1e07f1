import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data_helpers import image_shards, picture
from vqscale.data import tar
from vqscale.data.image_source import ImageSource
from vqscale.data.images import encode_png
from vqscale.data.loader import Loader
from vqscale.data.manifest import write_manifest
from vqscale.data.order import StreamOrder
from vqscale.data.reader import EvaluationReader
from vqscale.data.shards import open_shards
from vqscale.errors import UserError

COUNTS = [31, 40, 25, 38, 29, 40, 33, 21, 40, 37, 36, 22]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object]:
    root = tmp_path_factory.mktemp("shards")
    return str(root), image_shards(root, COUNTS)


def loader(shards, *, rank: int = 0, world: int = 1, **how) -> Loader:
    found = open_shards(shards[0])
    order = StreamOrder(found.counts, seed=1, streams=12, packet=4, shuffle=30)
    return Loader(ImageSource(found, 8), order, rank=rank, world=world, **{"global_batch": 48, **how})


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


COMBINATIONS = [
    (1, 2),
    (1, 3),
    (1, 8),
    (2, 1),
    (2, 3),
    (3, 1),
    (3, 2),
    (4, 1),
    (4, 5),
    (6, 1),
    (6, 2),
    (12, 1),
    (12, 2),
]


@pytest.fixture(scope="module")
def undisturbed(shards) -> list[np.ndarray]:
    """Global batches of one rank with one thread, over more than three epochs."""
    return steps(shards, 1, 3 * sum(COUNTS) // 48 + 2)


@pytest.mark.parametrize(("world", "threads"), COMBINATIONS)
def test_global_batches_depend_on_neither_ranks_nor_threads(shards, undisturbed, world: int, threads: int):
    assert np.array_equal(steps(shards, world, len(undisturbed), threads=threads), undisturbed)


def test_resumes_at_any_step_on_any_number_of_ranks(shards, undisturbed):
    rng = np.random.default_rng(0)
    for start in rng.choice(len(undisturbed) - 3, 20, replace=False).tolist():
        for world in (1, int(rng.choice([2, 3, 4, 6, 12]))):
            assert np.array_equal(steps(shards, world, 3, start_step=start), undisturbed[start : start + 3])


def test_what_was_consumed_is_never_opened_again(shards):
    found, opened = open_shards(shards[0]), []
    order = StreamOrder(found.counts, seed=1, streams=4, packet=4, shuffle=1)
    source: Any = Opened(ImageSource(found, 8), opened)
    with Loader(source, order, rank=0, world=1, global_batch=16, start_step=20, ahead=0) as batches:
        next(batches)
    packets = list(islice(order.packets(0, 1), 200))
    before, after = (
        {shard for packet in part for shard, _ in packet.samples()} for part in (packets[:80], packets[80:])
    )
    assert set(opened) <= after
    assert len(opened) < len(found.urls)
    assert before - set(opened)


class Opened:
    """A source that writes down which shards are opened."""

    def __init__(self, source: ImageSource, opened: list[int]) -> None:
        self._source, self._opened = source, opened

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def open_group(self, numbers: list[int]) -> object:
        self._opened.extend(numbers)
        return self._source.open_group(numbers)


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


def test_a_group_without_a_good_sample_borrows_from_the_next_shards(tmp_path: Path):
    first = dict.fromkeys(range(COUNTS[0]), b"")  # the whole of s0, which is a group of its own
    image_shards(tmp_path, COUNTS, broken=first)
    one, two = (labels_of(tmp_path, world, 25) for world in (1, 2))
    assert np.array_equal(one, two)
    assert not set(one.ravel()) & set(first)


def labels_of(folder: Path, world: int, count: int) -> np.ndarray:
    """Labels of global batches [count, 48], from all ranks."""
    whole = np.full((count, 48), -1)
    for rank in range(world):
        with loader((str(folder), None), rank=rank, world=world, error_budget=1.0) as batches:
            for place, batch in enumerate(islice(batches, count)):
                whole[place][batch.index] = batch.fields["label"]
    return whole


def test_data_without_a_good_sample_are_an_error(tmp_path: Path):
    damaged = str(tmp_path), image_shards(tmp_path, COUNTS, broken=dict.fromkeys(range(500), b""))
    with loader(damaged, error_budget=1.0) as batches, pytest.raises(UserError, match="cannot be read"):
        next(batches)


def test_a_shard_that_was_cut_off_loses_only_what_lies_behind(tmp_path: Path):
    image_shards(tmp_path, COUNTS)
    shard = tmp_path / "s2.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    start = sum(COUNTS[:2])
    lost = set(range(start, start + COUNTS[2])) - {
        int(sample.key) for sample in tar.whole_samples(shard.read_bytes())[0][:-1]
    }
    assert 5 < len(lost) < COUNTS[2] - 5
    with loader((str(tmp_path), None), error_budget=1.0) as batches:
        labels = {label for batch in islice(batches, 25) for label in batch.fields["label"].tolist()}
        assert not labels & lost
        assert labels > set(range(start, start + COUNTS[2])) - lost
        assert set(batches.bad) == {"truncated"}
        assert {name for name, _, _ in batches.bad_samples} == {"s2.tar"}
        assert {start + int(key[1:]) for _, key, _ in batches.bad_samples} == lost


def test_manifest_that_lies_is_an_error(tmp_path: Path):
    manifest = image_shards(tmp_path, COUNTS)
    first = manifest.shards[0].model_copy(update={"samples": 30})
    write_manifest(tmp_path, manifest.model_copy(update={"shards": (first, *manifest.shards[1:])}))
    with (
        loader((str(tmp_path), None)) as batches,
        pytest.raises(UserError, match="holds 31 samples, its manifest says 30"),
    ):
        list(islice(batches, 20))


def threads_left() -> list[str]:
    """Threads of a loader; the search keeps a pool of its own for the life of the process."""
    own = ("vqscale-decode", "vqscale-open", "vqscale-prefetch")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(own)]


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
        reader = EvaluationReader(ImageSource(open_shards(url), 8), manifest.counts, rank, world, batch)
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
    source = ImageSource(open_shards(str(tmp_path)), 8)
    reader = EvaluationReader(source, manifest.counts, 0, 1, 32, error_budget=0.01)
    assert sum(len(part.index) for part in reader) == sum(COUNTS) - 1
    assert reader.bad == {"format": 1}
    with pytest.raises(UserError, match="sample 000040 is bad"):
        list(source.read_shard(1, 16))
    bad: list = []
    keys = [key for _, part in source.read_shard(1, 16, bad) for key in part]
    assert len(keys) == COUNTS[1] - 1
    assert [pick.key for pick in bad] == ["000040"]
