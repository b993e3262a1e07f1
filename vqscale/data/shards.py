"""The shards that a recipe names: folders, manifests, brace patterns, globs, or a list of these.

Light on purpose, like the manifest: the launcher checks with it what a recipe reads. Which samples there are is
always said by a manifest, so that the order of samples is known before any shard is opened; shards that have none
get one by `vqscale data index`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from vqscale import storage
from vqscale.data.manifest import MANIFEST, Manifest, no_manifest, parse_manifest, read_manifest
from vqscale.errors import UserError

_AGAIN = "copy it again, or write the shards again"
_CHECKED = 256  # remote shards whose size is asked for; each is a request
_REPEATED = re.compile(r"(?<![:/])/{2,}")
_GLOB = "*["  # `?` is none: it begins the query of a URL


@dataclass(frozen=True)
class ShardSet:
    """Shards of one data set, from one place or from several.

    The shards are numbered in the order of their manifest, and of the list where there are several manifests; a
    pattern chooses among them and does not change their order.
    """

    spec: str
    """What was asked for, as shown in messages."""
    manifest: Manifest
    """What all shards hold; names are unique."""
    urls: tuple[str, ...]
    """Where each shard lies."""
    labels: tuple[str, ...]
    """Of each shard, where its labels are (`Manifest.label`)."""

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return self.manifest.counts

    def name(self, shard: int) -> str:
        """Name of a shard in messages and records: its path below the manifest."""
        return self.manifest.shards[shard].name

    @cached_property
    def flat_names(self) -> tuple[str, ...]:
        """For each shard a file name without folders, for what is made of it, shard by shard."""
        return tuple(shard.name.replace("/", "--") for shard in self.manifest.shards)


def open_shards(spec: str | Sequence[str]) -> ShardSet:
    """Find the shards and read their manifests; opens no shard.

    Args:
        spec: a folder with a `manifest.json`, a manifest (`.json`), a pattern of shards (`.tar`, with braces such as
            `{000..099}` or `{a,b}`, and globs with `*` and `[...]`) below such a folder, or a list of these. Paths or
            URLs.

    Raises:
        UserError: nothing there, no manifest, a pattern that fits nothing, or parts that do not go together.
    """
    if isinstance(spec, str):
        return _part(spec)
    parts = [_part(one) for one in spec]
    if not parts:
        raise UserError("names no shards", mend="list folders, manifests or patterns")
    return parts[0] if len(parts) == 1 else _merged(parts)


def is_pattern(spec: str) -> bool:
    """Whether a path or URL is a pattern, or a single shard, rather than a folder or a manifest."""
    return _has_glob(spec) or "{" in spec or spec.endswith(".tar")


def expand(pattern: str) -> list[str]:
    """The URLs that a pattern's braces stand for; globs in them stay.

    Raises:
        UserError: unbalanced braces.
    """
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError("has unbalanced braces", where=pattern, mend="write {000..099} or {a,b}") from None


def fixed_folder(pattern: str) -> str:
    """The deepest folder of a pattern before its first brace or glob."""
    cut = min((at for at in map(pattern.find, ("{", *_GLOB)) if at >= 0), default=len(pattern))
    return pattern[:cut].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")


def check_shards(shards: ShardSet) -> None:
    """Compare the sizes of the files with the manifest; reads no shard.

    Every local shard is looked at; of remote ones, where each look is a request, at most 256 from first to last.

    Raises:
        UserError: names the first shard that is missing or has another size.
    """
    numbers = range(len(shards.urls))
    local = [number for number in numbers if storage.local_path(shards.urls[number])]
    remote = [number for number in numbers if not storage.local_path(shards.urls[number])]
    for number in local:
        _check_size(shards, number)
    if remote:
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(lambda number: _check_size(shards, number), remote[:: -(-len(remote) // _CHECKED)]):
                pass


def _check_size(shards: ShardSet, number: int) -> None:
    where, expected = shards.urls[number], shards.manifest.shards[number].bytes
    found = storage.size(where)
    if found is None:
        raise UserError("shard is missing", where=where, mend=_AGAIN)
    if found != expected:
        raise UserError(f"shard has {found} bytes, its manifest says {expected}", where=where, mend=_AGAIN)


def _part(spec: str) -> ShardSet:
    if spec.startswith("pipe:"):
        raise UserError("is a command, not a place", where=spec, mend="name a URL that fsspec knows, such as s3://...")
    local = storage.local_path(spec)
    if is_pattern(spec) and not (local and local.is_dir()):  # a folder may have such signs in its name
        return _chosen(_REPEATED.sub("/", spec))
    if spec.endswith(".json"):
        return _whole(spec, parse_manifest(spec), spec.rpartition("/")[0] or ".")
    return _whole(spec, read_manifest(spec), spec)


def _whole(spec: str, manifest: Manifest, folder: str) -> ShardSet:
    base = manifest.base or folder
    urls = tuple(storage.join(base, shard.name) for shard in manifest.shards)
    return ShardSet(storage.shown(spec), manifest, urls, (manifest.label,) * len(urls))


def _chosen(pattern: str) -> ShardSet:
    """Shards by pattern, from the manifest in the folder before the pattern, or those beside the shards."""
    if fixed_folder(pattern) == "." and not pattern.startswith("./"):
        pattern = f"./{pattern}"  # as the URLs of a manifest in this folder are made
    folder, urls = fixed_folder(pattern), expand(pattern)
    if _has_manifest(folder):
        return _fitting(pattern, _whole(pattern, read_manifest(folder), folder), urls)
    folders = dict.fromkeys(fixed_folder(url) for url in urls)
    if set(folders) == {folder} or not all(map(_has_manifest, folders)):
        raise _unlisted(pattern, folder)
    found = [_fitting(pattern, _part(below), [url for url in urls if fixed_folder(url) == below]) for below in folders]
    return found[0] if len(found) == 1 else _merged(found)


def _fitting(pattern: str, shards: ShardSet, urls: list[str]) -> ShardSet:
    exact, globs = {url for url in urls if not _has_glob(url)}, [url for url in urls if _has_glob(url)]
    places = [place for place, url in enumerate(shards.urls) if url in exact or any(_fits(url, glob) for glob in globs)]
    unknown = exact - {shards.urls[place] for place in places}
    if unknown or not places:
        raise UserError(
            f"{min(unknown)} is not in the manifest" if unknown else "fits no shard of the manifest",
            where=pattern,
            mend="correct the pattern, or list all shards of the folder anew with vqscale data index --force",
        )
    manifest = shards.manifest.model_copy(update={"shards": tuple(shards.manifest.shards[place] for place in places)})
    labels = tuple(shards.labels[place] for place in places)
    return ShardSet(storage.shown(pattern), manifest, tuple(shards.urls[place] for place in places), labels)


def _fits(url: str, glob: str) -> bool:
    """Whether a URL fits a glob, in which `*` stays within one folder, as in a shell."""
    parts, wanted = url.split("/"), glob.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _merged(parts: list[ShardSet]) -> ShardSet:
    first = parts[0]
    for part in parts[1:]:
        for key in ("format", "classes", "levels", "fingerprint"):
            if getattr(part.manifest, key) != getattr(first.manifest, key):
                raise UserError(
                    f"has other {key} than {first.spec}",
                    where=part.spec,
                    mend="name shards that were packed or indexed alike",
                )
    sizes = {part.manifest.image_size for part in parts}
    shards = tuple(
        shard.model_copy(update={"name": f"{number}/{shard.name}"})
        for number, part in enumerate(parts)
        for shard in part.manifest.shards
    )
    manifest = first.manifest.model_copy(
        update={
            "shards": shards,
            "base": "",
            "image_size": sizes.pop() if len(sizes) == 1 else None,
            "skipped": sum(part.manifest.skipped for part in parts),
            "source": {"merged_from": [part.spec for part in parts]},
        }
    )
    return ShardSet(
        ", ".join(dict.fromkeys(part.spec for part in parts)),
        manifest,
        tuple(_all(part.urls for part in parts)),
        tuple(_all(part.labels for part in parts)),
    )


def _all(lists: Iterable[Sequence[str]]) -> list[str]:
    return [one for some in lists for one in some]


def _has_glob(text: str) -> bool:
    return any(sign in text for sign in _GLOB)


def _has_manifest(folder: str) -> bool:
    return storage.size(storage.join(folder, MANIFEST)) is not None


def _unlisted(pattern: str, folder: str) -> UserError:
    error = no_manifest(folder)
    if error.what.startswith("no such folder"):
        return error
    return UserError(
        f"no manifest.json in {folder} says what these shards hold",
        where=pattern,
        mend=f"make one: vqscale data index '{pattern}'",
    )
