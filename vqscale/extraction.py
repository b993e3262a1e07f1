"""Images to code shards: decoded in threads ahead of the tokenizer, encoded, and written in a thread behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqscale import storage
from vqscale.data.ahead import ShardPart, read_ahead
from vqscale.data.bad import BadCount, BadPick
from vqscale.data.code_records import PLAIN, CodeRecord, Views
from vqscale.data.codes import CodeBlock, write_code_shard
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import CodeLevel
from vqscale.loading import Arrays, TrainedTokenizer

DIFFERENCES = ("codes_differ_from_fp32", "posteriors_differ_from_fp32")
"""Names of what `Extraction.difference_from_fp32` gives: of codes, and of Gaussian posteriors."""

_COMPARED = 256  # images whose codes are compared with those of fp32


@dataclass(frozen=True)
class Extraction:
    """How images become code shards. What is written depends on neither threads nor ranks."""

    tokenizer: TrainedTokenizer
    levels: Sequence[CodeLevel]
    """Levels of its code grids, from the finest to the coarsest."""
    batch: int
    """Images that are encoded at once."""
    block: int
    """Samples of a block."""
    threads: int
    """Threads that decode."""
    views: Views = PLAIN
    """What of each image is encoded; the source's crops are the same."""

    def shards(self, source: ImageSource, shards: Sequence[int], folder: str, count: BadCount) -> Iterator[CodeRecord]:
        """Write code shards in their order, and give each one's record when it is written; bad images are left out.

        Args:
            source: the images.
            shards: numbers of the image shards.
            folder: for the code shards, which are called as the image shards.
            count: counts and judges the bad images.

        Raises:
            UserError: too many bad images.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="vqscale-write") as writer:
            writing: list[Future[CodeRecord]] = []
            for shard, parts in groupby(self._parts(source, shards), key=lambda part: part.shard):
                url = storage.join(folder, source.shards.flat_names[shard])
                writing.append(writer.submit(self._write, url, self._encode_shard(parts, count)))
                if len(writing) > 1:
                    yield writing.pop(0).result()
            for last in writing:
                yield last.result()

    def difference_from_fp32(self, source: ImageSource) -> dict[str, float]:
        """What would be different of the first 256 images if the networks ran in fp32.

        Returns:
            One of `DIFFERENCES`: the share of the codes that would be others, or the mean distance between means in
            standard deviations.
        """
        held: list[NDArray[np.uint8]] = []
        for part in self._parts(source, range(len(source.manifest.shards))):
            held.append(part.fields["image"])
            if sum(map(len, held)) >= _COMPARED:
                break
        images = np.concatenate(held)[:_COMPARED]
        ours, theirs = (
            self._encode(images),
            replace(self, tokenizer=replace(self.tokenizer, bf16=False))._encode(images),
        )
        if self.tokenizer.network.continuous:
            apart = [_deviations(ours[name], theirs[name]) for name in ours]
            return {DIFFERENCES[1]: float(np.concatenate(apart).mean())}
        different = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
        return {DIFFERENCES[0]: different / sum(map(np.size, ours.values()))}

    def _parts(self, source: ImageSource, shards: Sequence[int]) -> Iterator[ShardPart]:
        return read_ahead(source, source.manifest.counts, shards, batch=self.batch, threads=self.threads)

    def _encode_shard(self, parts: Iterable[ShardPart], count: BadCount) -> _Encoded:
        """All codes of one shard, whose compression and writing can then go on beside the next one's encoding."""
        bad: list[BadPick] = []
        usage = {level.name: np.zeros(level.codes, np.int64) for level in self.levels if level.codes}
        blocks = []
        for part in parts:
            bad.extend(part.bad)
            count.add(part.read, part.bad)
            blocks.append(self._encode_part(part))
            for name, counts in usage.items():
                counts += np.bincount(blocks[-1].codes[name].ravel(), minlength=len(counts))
        return _Encoded(blocks, bad, usage)

    def _write(self, url: str, encoded: _Encoded) -> CodeRecord:
        fingerprint = self.tokenizer.fingerprint
        return CodeRecord(
            shard=write_code_shard(url, _recut(encoded.blocks, self.block), self.levels, fingerprint),
            fingerprint=fingerprint,
            **self.views._asdict(),
            skipped=len(encoded.bad),
            bad=tuple((pick.key, pick.kind) for pick in encoded.bad),
            usage={name: counts.tolist() for name, counts in encoded.usage.items()},
        )

    def _encode_part(self, part: ShardPart) -> CodeBlock:
        images, endings = part.fields["image"], self.views.endings
        if self.views.flips:
            images = np.stack([images, images[..., ::-1, :]], axis=-4)
        keys = [f"{key}{ending}" for key in part.keys for ending in endings]
        codes = self._encode(images.reshape(-1, *images.shape[-3:]))
        return CodeBlock(codes, part.fields["label"].repeat(len(endings)), keys)

    def _encode(self, images: NDArray[np.uint8]) -> Arrays:
        starts = range(0, len(images), self.batch)
        parts = [self.tokenizer.encode(images[start : start + self.batch]) for start in starts]
        names = self.tokenizer.levels if parts else ()
        return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _deviations(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far apart the means of posteriors [n, 2C, side, side] are, in units of the second ones' deviations."""
    (mean, _), (other, log_std) = (np.split(own, 2, axis=1) for own in (ours, theirs))
    return (np.abs(mean - other) / np.exp(log_std)).ravel()


class _Encoded(NamedTuple):
    """One shard on its way from the tokenizer to its file."""

    blocks: list[CodeBlock]
    bad: list[BadPick]
    usage: dict[str, NDArray[np.int64]]


def _recut(blocks: Iterable[CodeBlock], size: int) -> Iterator[CodeBlock]:
    """The same samples in blocks of `size`; the last one may have fewer."""
    held: list[CodeBlock] = []
    for block in blocks:
        if block.keys:
            held.append(block)
        while sum(len(one.keys) for one in held) >= size:
            whole = _joined(held)
            yield _part_of(whole, 0, size)
            held = [_part_of(whole, size, len(whole.keys))] if len(whole.keys) > size else []
    if held:
        yield _joined(held)


def _joined(blocks: Sequence[CodeBlock]) -> CodeBlock:
    codes = {name: np.concatenate([block.codes[name] for block in blocks]) for name in blocks[0].codes}
    labels = np.concatenate([block.labels for block in blocks])
    return CodeBlock(codes, labels, [key for block in blocks for key in block.keys])


def _part_of(block: CodeBlock, start: int, stop: int) -> CodeBlock:
    codes = {name: grids[start:stop] for name, grids in block.codes.items()}
    return CodeBlock(codes, block.labels[start:stop], block.keys[start:stop])
