"""`vqscale codes pull`, `push` and `verify`."""

from __future__ import annotations

import argparse
from typing import Any

from pipelines.data_commands import EXIT_FAULTS, by_shard, threads
from pipelines.data_report import line, megabytes, print_json, progress
from vqscale import storage
from vqscale.data.copying import Copied, choose, code_folders, copy_codes, open_codes
from vqscale.data.shards import ShardSet
from vqscale.errors import UserError


def copy(options: argparse.Namespace) -> int:
    """Copy code shards between folders and URLs that fsspec knows, each compared with its hash.

    What was stopped goes on when the same command is given again. A folder that holds some of these shards already
    gets the others.
    """
    results = {}
    for split, folder in code_folders(options.src).items():
        target = storage.join(options.dest, split) if split else options.dest
        if folder.rstrip("/") == target.rstrip("/"):
            raise UserError("is where the shards are", where=storage.shown(target), mend="name another DEST")
        shards = open_codes(folder)
        whole = split == "validation"
        numbers = choose(
            len(shards.urls),
            ranges="" if whole else options.shards,
            fraction=None if whole else options.fraction,
        )
        with progress("copying", "MB") as report:
            results[target] = copy_codes(shards, target, numbers, progress=megabytes(report), **threads(options))
    if options.json:
        print_json({storage.shown(target): _summary(copied) for target, copied in results.items()})
        return 0
    for target, copied in results.items():
        was = f"{copied.shards} shards were copied ({copied.bytes / 1e6:,.1f} MB), the others were there"
        print(f"{line(storage.shown(target), copied.manifest)}; {was}")
    return 0


def _summary(copied: Copied) -> dict[str, Any]:
    manifest = copied.manifest
    held = {"shards": len(manifest.shards), "samples": manifest.samples, "bytes": manifest.bytes}
    return {**held, "copied_shards": copied.shards, "copied_bytes": copied.bytes, "fingerprint": manifest.fingerprint}


def verify(options: argparse.Namespace) -> int:
    """Read every code shard and compare size, sha256, levels, tokenizer and number of samples with the manifest.

    Ends with exit code 1 when there are faults.
    """
    from vqscale.data.verify import verify as check

    folders = {folder: open_codes(folder) for folder in code_folders(options.url).values()}
    if options.tokenizer:
        require_tokenizer(options.tokenizer, *folders.values())
    found = {}
    for folder, shards in folders.items():
        with progress("verifying", "MB") as report:
            found[folder] = check(shards, by_shard(shards, megabytes(report)), bad=None, **threads(options))
    if options.json:
        print_json({folder: _outcome(shards, found[folder]) for folder, shards in folders.items()})
    else:
        for folder, shards in folders.items():
            bad, total = found[folder], len(shards.urls)
            what = f"{len(bad)} of {total} shards have faults" if bad else f"{total} shards are as their manifest says"
            print(*bad, f"{shards.spec}: {what}", sep="\n")
    return EXIT_FAULTS if any(found.values()) else 0


def _outcome(shards: ShardSet, faults: list[str]) -> dict[str, Any]:
    manifest = shards.manifest
    held = {"shards": len(shards.urls), "samples": manifest.samples, "fingerprint": manifest.fingerprint}
    return {**held, "faults": faults}


def require_tokenizer(run: str, *codes: ShardSet) -> Any:
    """The tokenizer of a run, which must have made the codes.

    Raises:
        UserError: there is none, or the codes are another one's.
    """
    from vqscale.loading import load_tokenizer

    tokenizer = load_tokenizer(run)
    for shards in codes:
        if shards.manifest.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"these codes were made by another tokenizer than that of {run}",
                where=shards.spec,
                mend="name the run that extracted them",
            )
    return tokenizer
