"""`vqscale codes show`: what code shards hold, in words and decoded to images."""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.codes_commands import require_tokenizer
from pipelines.data_report import line, print_json, some, summary
from pipelines.data_show import arranged, class_counts, class_lines, source_lines
from vqscale import storage
from vqscale.data.copying import code_folders, open_codes
from vqscale.data.shards import ShardSet
from vqscale.errors import UserError

if TYPE_CHECKING:
    from vqscale.data.codes import OpenCodes

_KEYS = 3  # samples whose keys are shown


def show(options: argparse.Namespace) -> int:
    """Say what code shards hold; --tokenizer and --out decode some of them into a picture."""
    if options.samples < 1:
        raise UserError(f"{options.samples} samples make no sheet", where="--samples", mend="use 1 or more")
    if bool(options.tokenizer) != bool(options.out):
        raise UserError("go together", where="--tokenizer and --out", mend="give both, or neither")
    folders = {folder: open_codes(folder) for folder in code_folders(options.url).values()}
    if options.out:
        storage.write_bytes(options.out, _sheet(next(iter(folders.values())), options.tokenizer, options.samples))
    found = {folder: _facts(shards) for folder, shards in folders.items()}
    if options.json:
        print_json(found)
        return 0
    for folder, shards in folders.items():
        print(line(shards.spec, shards.manifest), *(f"  {text}" for text in _lines(shards, found[folder])), sep="\n")
    if options.out:
        print(f"sheet: {options.out}")
    return 0


def _facts(shards: ShardSet) -> dict[str, Any]:
    """What there is to say, as plain values."""
    manifest = shards.manifest
    plain = sum(level.bytes for level in manifest.levels) * manifest.samples
    return {
        **summary(manifest),
        "fingerprint": manifest.fingerprint,
        "levels": [level.model_dump() for level in manifest.levels],
        f"bytes_vs_{manifest.levels[0].dtype}": manifest.bytes / plain if plain else None,
        "first_keys": _first_keys(shards),
        "class_counts": class_counts(shards, partial(_count, shards)),
        "source": manifest.source,
    }


def _lines(shards: ShardSet, facts: dict[str, Any]) -> list[str]:
    manifest, dtype = shards.manifest, shards.manifest.levels[0].dtype
    ratio = facts[f"bytes_vs_{dtype}"]
    return [
        f"format: {manifest.format}",
        *source_lines(manifest),
        f"skipped: {manifest.skipped}",
        f"tokenizer: {manifest.fingerprint}",
        *(f"level {level.name}: {level.shape}" for level in manifest.levels),
        *([f"size: {ratio:.3f} of the same as {dtype}"] if ratio else []),
        *([f"first keys: {some(facts['first_keys'], _KEYS)}"] if facts["first_keys"] else []),
        *class_lines(facts["class_counts"]),
    ]


def _open(shards: ShardSet, number: int) -> OpenCodes:
    from vqscale.data.code_source import CodeSource

    return CodeSource(shards).open(number)


def _count(shards: ShardSet, number: int) -> Counter[int | str]:
    return Counter(_open(shards, number).labels().tolist())


def _first_keys(shards: ShardSet) -> list[str]:
    """Keys of the first samples of the first shard that holds any."""
    filled = next((number for number, count in enumerate(shards.counts) if count), None)
    return [] if filled is None else _open(shards, filled).read_keys()[:_KEYS]


def _sheet(shards: ShardSet, run: str, samples: int) -> bytes:
    """The first images of the first shard that holds any, decoded."""
    from vqscale.data.code_source import CodeSource

    tokenizer = require_tokenizer(run, shards)
    filled = next((number for number, count in enumerate(shards.counts) if count), None)
    if filled is None:
        raise UserError("holds no codes", where=shards.spec, mend="name shards that do")
    fields, _ = next(CodeSource(shards).read_shard(filled, samples))
    return arranged(tokenizer.decode(tokenizer.centres(fields)), fields["label"], shards.manifest.classes)
