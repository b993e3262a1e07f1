"""Which shards there are in a folder, or fit a pattern; asks the storage, where `shards` asks manifests."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vqscale import storage
from vqscale.data.manifest import no_manifest
from vqscale.data.shards import expand, fixed_folder, is_pattern
from vqscale.errors import UserError

_COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$")
_DIGITS = re.compile(r"(\d+)", re.ASCII)
_GLOB = re.compile(r"[*\[]")
_REPEATED = re.compile(r"(?<![:/])/{2,}")


class Listed(NamedTuple):
    """Shards below one folder."""

    folder: str
    """Path or URL."""
    names: tuple[str, ...]
    """Paths below the folder, in the order in which their samples are to be numbered."""

    @property
    def urls(self) -> list[str]:
        """Where each shard lies."""
        return [storage.join(self.folder, name) for name in self.names]


def list_shards(specs: Sequence[str]) -> list[Listed]:
    """Find shards, whether or not a manifest lists them.

    Args:
        specs: folders (their `*.tar`), single `.tar` files, or patterns with braces and globs. Braces give the order of
            the shards; what a folder or a glob finds is sorted by name, with numbers in names by their value.

    Returns:
        One for each folder: the one that is named, or the deepest before the pattern's first brace or glob.

    Raises:
        UserError: no such folder, nothing that fits, or tars that cannot be read at random.
    """
    found: dict[str, dict[str, None]] = {}
    for spec in specs:
        folder, names = _list(_REPEATED.sub("/", spec))
        found.setdefault(folder, {}).update(dict.fromkeys(names))
    return [Listed(folder, tuple(names)) for folder, names in found.items()]


def below_one_folder(parts: Sequence[Listed]) -> Listed:
    """The same shards below the deepest folder that all have in common, as an absolute path or a URL.

    Raises:
        UserError: they have none.
    """
    folders = [_absolute(part.folder) for part in parts]
    paths = [folder.split("/") for folder in folders]
    depth = next(
        (at for at, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1), min(map(len, paths))
    )
    shared = "/".join(paths[0][:depth])
    if not shared or shared.endswith(":/"):
        raise UserError(
            f"one manifest cannot list {folders[0]} and {folders[-1]}", where="--out", mend="write one for each"
        )
    urls = [storage.join(folder, name) for folder, part in zip(folders, parts, strict=True) for name in part.names]
    return Listed(shared, tuple(url.removeprefix(f"{shared}/") for url in urls))


def _list(spec: str) -> tuple[str, list[str]]:
    if _COMPRESSED.search(spec):
        raise _compressed(spec)
    if spec.endswith(".json"):
        raise UserError("is a manifest, not shards", where=spec, mend="name the shards that it should list")
    local = storage.local_path(spec)
    if not is_pattern(spec) or (local and local.is_dir()):
        folder = spec.rstrip("/") or "/"
        return folder, _tars(folder)
    folder, listings = fixed_folder(spec), dict[str, list[str] | None]()
    pattern = spec if folder != "." or spec.startswith("./") else f"./{spec}"
    urls = [url for one in expand(pattern) for url in _glob(one, listings)]
    if not urls:
        raise UserError(
            "fits no shard", where=spec, mend="check the pattern; in quotes, so that the shell leaves it alone"
        )
    return folder, [url.removeprefix(f"{folder}/") for url in urls]


def _absolute(folder: str) -> str:
    return folder if "://" in folder else os.path.abspath(folder)


def _tars(folder: str) -> list[str]:
    names = storage.list_names(folder)
    if not names:
        raise no_manifest(folder)  # which says what is wrong with the folder
    tars = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    if tars:
        return sorted(tars, key=_natural)
    compressed = [name for name in names if _COMPRESSED.search(name)]
    if compressed:
        raise _compressed(storage.join(folder, compressed[0]))
    raise UserError(
        "holds no .tar", where=folder, mend=f"name the folder of the shards, or a pattern such as '{folder}/*/*.tar'"
    )


def _glob(pattern: str, listings: dict[str, list[str] | None]) -> Iterator[str]:
    """The URLs that fit a pattern without braces, folder by folder; without globs the pattern itself.

    Args:
        pattern: path or URL.
        listings: names of the folders that have been listed.
    """
    match = _GLOB.search(pattern)
    if not match:
        yield pattern
        return
    start = pattern.rfind("/", 0, match.start()) + 1
    folder, (part, _, rest) = pattern[: start - 1], pattern[start:].partition("/")
    if folder not in listings:
        listings[folder] = storage.list_names(folder)
    hidden = part.startswith(".")
    fitting = [name for name in listings[folder] or () if fnmatch.fnmatchcase(name, part)]
    for name in sorted(fitting, key=_natural):
        if name.startswith(".") == hidden:
            yield from _below(f"{pattern[:start]}{name}", rest, listings)


def _below(url: str, rest: str, listings: dict[str, list[str] | None]) -> Iterator[str]:
    if not rest:
        yield url
    elif _GLOB.search(rest):
        yield from _glob(f"{url}/{rest}", listings)
    elif storage.size(f"{url}/{rest}") is not None:  # not every folder that fits need have the file
        yield f"{url}/{rest}"


def _natural(name: str) -> list[str | int]:
    """Sorts `shard-10` behind `shard-2`."""
    return [int(part) if at % 2 else part for at, part in enumerate(_DIGITS.split(name))]


def _compressed(where: str) -> UserError:
    return UserError(
        "is a compressed tar, which cannot be read at random",
        where=where,
        mend="unpack it (gunzip for .gz), or write shards from it with `vqscale data pack`",
    )
