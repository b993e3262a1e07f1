"""Codes that a user gives, around which the others are drawn: from a file, or from images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vqscale.arguments import did_you_mean
from vqscale.config.recipe import Recipe
from vqscale.data.codes import OpenCodes, empty_fields
from vqscale.data.drawn import DrawnSet
from vqscale.data.image_source import EXTENSIONS
from vqscale.data.images import Pixels
from vqscale.data.keep import hide, kept_cells, pixel_mask, read_image
from vqscale.data.labels import NO_LABEL
from vqscale.data.sheet import labelled_sheet
from vqscale.errors import UserError
from vqscale.loading import TrainedTokenizer
from vqscale.storage import open_shard

DRAWN = -1
"""Stands where a code is drawn."""

SHEET_ROWS, SHEET_IMAGES = 32, 11

Codes = dict[str, NDArray[np.int64]]
Grids = Mapping[str, tuple[int, int]]
"""Level name → side of its grid and size of its codebook, the finest level first."""


@dataclass(frozen=True)
class Given:
    """What is known of some images."""

    codes: Codes
    """Level name → int64 [n, side, side], `DRAWN` where one is drawn."""
    labels: tuple[int, ...]
    """Class of each; -1 for none."""
    pictures: Pixels | None = None
    """What can be seen of them, uint8 [n, S, S, 3]; None where only codes are given."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def identity(self) -> str:
        """Hash of the codes."""
        digest = hashlib.sha256()
        for name in sorted(self.codes):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.codes[name]).data)
        return digest.hexdigest()[:32]

    def rows(self, numbers: Sequence[int]) -> Codes:
        """Codes of the drawn images by number: image i has those of i modulo their count."""
        rows = np.asarray(numbers) % len(self)
        return {name: array[rows] for name, array in self.codes.items()}

    def sheet(self, drawn: DrawnSet) -> Pixels:
        """A row for each of the first that are given, uint8 [H, W, 3]: what can be seen of it, then what was drawn."""
        rows = {}
        for row in range(min(len(self), SHEET_ROWS)):
            images = drawn.read(range(row, len(drawn.labels), len(self))[:SHEET_IMAGES])
            rows[str(row)] = images if self.pictures is None else np.concatenate([self.pictures[row : row + 1], images])
        return labelled_sheet({name: images for name, images in rows.items() if len(images)})

    def labels_to_draw(self, count: int | None, classes: Sequence[int]) -> tuple[int, ...]:
        """Class of every image: the chosen classes take turns, each with all that is given; else those that came along.

        Args:
            count: images in all; by default as many as are given, for each of the classes.
            classes: the chosen ones; may be empty.
        """
        size = len(self)
        total = count or size * max(1, len(classes))
        if classes:
            return tuple(classes[number // size % len(classes)] for number in range(total))
        return tuple(self.labels[number % size] for number in range(total))


def from_file(path: Path, levels: Sequence[str], grids: Grids, fingerprint: str) -> Given:
    """Codes of an `.npz` with an integer array [n, side, side] for each level that is given, -1 where a code is drawn,
    and perhaps `label` [n]; or of a code shard.

    Args:
        path: the file.
        levels: those that are kept; by default all that the `.npz` has, and all but the finest of a code shard.
        grids: those of the tokenizer.
        fingerprint: the tokenizer's.

    Raises:
        UserError: it cannot be read, or has other levels, shapes or codes than the tokenizer.
    """
    fields = _read_shard(path, fingerprint) if path.suffix == ".tar" else _read_npz(path)
    labels = fields.pop("label", None)
    for name, array in fields.items():
        _check_codes(name, array, grids, str(path))
    counts = {len(array) for array in (*fields.values(), *([] if labels is None else [labels]))}
    if len(counts) != 1 or 0 in counts:
        raise UserError("has arrays of different length, or empty ones", where=str(path), mend="a row an image in each")
    kept = levels or (list(grids)[1:] if path.suffix == ".tar" else list(fields))
    missing = [name for name in kept if name not in fields]
    if missing:
        raise UserError(f"has no codes of {missing[0]}", where=str(path), mend=f"it has {', '.join(fields)}")
    count = counts.pop()
    known = {name: fields[name].astype(np.int64) for name in kept}
    return Given(_filled(known, grids, count), _labels(labels, count))


def from_images(tokenizer: TrainedTokenizer, images: Pixels, levels: Sequence[str], grids: Grids) -> Given:
    """Images uint8 [n, S, S, 3] of whose codes some levels are kept; by default all but the finest.

    Args:
        tokenizer: encodes them.
        images: the images.
        levels: those that are kept.
        grids: those of the tokenizer.

    Raises:
        UserError: none would be drawn, or none kept.
    """
    kept = list(levels or list(grids)[1:])
    if not kept or len(kept) == len(grids):
        what = "all levels would be drawn" if not kept else "no level would be drawn"
        raise UserError(what, where="--levels", mend=f"the tokenizer has {', '.join(grids)}")
    codes = tokenizer.encode(images)
    known = {name: codes[name].astype(np.int64) for name in kept}
    return Given(_filled(known, grids, len(images)), (NO_LABEL,) * len(images), images)


def completed(tokenizer: TrainedTokenizer, images: Pixels, keep: str) -> Given:
    """Images uint8 [n, S, S, 3] of which a part is kept; the codes of the rest are drawn.

    Args:
        tokenizer: encodes what is kept.
        images: what is hidden of them has no influence.
        keep: which part, as for `pixel_mask`.

    Raises:
        UserError: no such part, or it is too small to hold a code.
    """
    mask = pixel_mask(keep, tokenizer.image_size)
    seen = hide(images, mask)
    known: Codes = {}
    for name, codes in tokenizer.encode(seen).items():
        cells = kept_cells(mask, codes.shape[1])
        known[name] = np.where(cells, codes.astype(np.int64), DRAWN)
    if all((codes == DRAWN).all() for codes in known.values()):
        raise UserError(f"no code lies in what {keep} keeps", where="--keep", mend="keep more of the image")
    shown = np.where(mask[..., None], images, 128).astype(np.uint8)
    return Given(known, (NO_LABEL,) * len(images), shown)


def read_images(path: Path, size: int) -> Pixels:
    """One image file, or all in a folder by name: uint8 [n, size, size, 3].

    Raises:
        UserError: there is none, or one cannot be read.
    """
    found = sorted(one for one in path.rglob("*") if one.suffix[1:].lower() in EXTENSIONS) if path.is_dir() else [path]
    if not found:
        raise UserError("holds no images", where=str(path), mend=f"files with {', '.join(EXTENSIONS)}")
    return np.stack([read_image(one, size) for one in found])


def grids_of(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Side of the grid and size of the codebook of each level, the finest first.

    Raises:
        UserError: there are no codes.
    """
    if recipe.levels[0].continuous:
        what = f"a tokenizer of kind {recipe.tokenizer.kind} has continuous latents, no codes that could be given"
        raise UserError(what, where="vqscale sample", mend="leave out --from-codes, --complete and --details-of")
    return {level.name: (level.grid, level.codes) for level in recipe.levels}


def require_levels(levels: Sequence[str], grids: Grids) -> None:
    """Whether the tokenizer has these levels.

    Raises:
        UserError: it has not.
    """
    for name in levels:
        if name not in grids:
            hint = did_you_mean(name, list(grids))
            raise UserError(f"no level '{name}'", where="--levels", mend=f"{hint}levels: {', '.join(grids)}")


def _read_npz(path: Path) -> Codes:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"is no .npz with codes ({error})", where=str(path), mend="write it by numpy.savez") from None


def _read_shard(path: Path, fingerprint: str) -> Codes:
    shard = OpenCodes(open_shard(path), str(path))
    if shard.index.fingerprint != fingerprint:
        raise UserError("holds codes of another tokenizer", where=str(path), mend="name codes that this run extracted")
    fields = empty_fields(shard.index.levels, shard.index.samples)
    shard.read(fields, 0)
    return fields


def _check_codes(name: str, array: NDArray[np.integer], grids: Grids, where: str) -> None:
    if name not in grids:
        raise UserError(f"has an array '{name}'", where=where, mend=f"levels: {', '.join(grids)}; and label")
    side, size = grids[name]
    if array.ndim != 3 or array.shape[1:] != (side, side) or not np.issubdtype(array.dtype, np.integer):
        what = f"{name} is {array.dtype} {list(array.shape)}"
        raise UserError(what, where=where, mend=f"integers [n, {side}, {side}]")
    if array.size and (array.min() < DRAWN or array.max() >= size):
        raise UserError(f"{name} has codes outside of 0 to {size - 1}", where=where, mend="-1 where a code is drawn")


def _filled(known: Codes, grids: Grids, count: int) -> Codes:
    """All levels, those that are not known to be drawn."""
    drawn = {name: np.full((count, side, side), DRAWN, np.int64) for name, (side, _) in grids.items()}
    return drawn | known


def _labels(labels: NDArray[np.integer] | None, count: int) -> tuple[int, ...]:
    return (NO_LABEL,) * count if labels is None else tuple(labels.astype(np.int64).tolist())
