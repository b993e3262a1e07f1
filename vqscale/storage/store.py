"""Opens shards wherever they are: local ones mapped, remote ones in memory or through the cache."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

from vqscale import storage
from vqscale.storage import Buffer, remote
from vqscale.storage.access import DEFAULT, Access
from vqscale.storage.cache import Draft, ShardCache, url_key


class Store:
    """Opens whole shards for random access; several threads may do so at once.

    A remote shard that differs from its hash is read once more. If it differs again, it is used all the same and
    reported, since one flipped bit has to cost an image and not a shard; but it is not kept, and read once only the
    next time.

    Args:
        access: how patiently remote storage is read.
        cache: keeps remote shards; without one they lie in memory as long as they are referred to.
        on_mismatch: takes the URL of a shard that differs from its hash; called from the thread that opens it.
    """

    def __init__(
        self,
        access: Access = DEFAULT,
        cache: ShardCache | None = None,
        on_mismatch: Callable[[str], None] | None = None,
    ) -> None:
        self._access, self._cache, self._on_mismatch = access, cache, on_mismatch
        self._lock = threading.Lock()
        self._under_way: dict[tuple[str, str, int | None], Future[Buffer]] = {}
        self.retries: Counter[str] = Counter()
        """Requests that were tried again, by the kind of fault (`faults.kind`)."""
        self.bytes_read = 0
        """Bytes of remote shards that were read."""
        self.cache_hits = 0
        """Shards that the cache had."""
        self.cache_misses = 0
        """Shards that it had not."""
        self.mismatched: list[str] = []
        """URLs, as they may be shown, of shards that differ from their hash; each once."""

    def open(self, url: str, *, sha256: str = "", size: int | None = None) -> Buffer:
        """A whole shard.

        Args:
            url: path or URL.
            sha256: hash of its content; empty where it is not known. Local shards are not compared with it.
            size: its bytes, where known.

        Raises:
            UserError: the shard is absent, cannot be read, was changed while it was read, or has another size.
        """
        if storage.local_path(url) is not None:
            return storage.open_shard(url)
        asked = (url, sha256, size)
        with self._lock:
            other = self._under_way.get(asked)
            mine = self._under_way.setdefault(asked, Future())
        if other is not None:
            return other.result()
        try:
            mine.set_result(self._fetch(url, sha256, size))
        except BaseException as error:
            mine.set_exception(error)
        finally:
            with self._lock:
                del self._under_way[asked]
        return mine.result()

    def _fetch(self, url: str, sha256: str, size: int | None) -> Buffer:
        if self._cache is None:
            return self._read(url, sha256, size)
        kept = self._cache.get(_key(sha256)) if _key(sha256) else None
        if kept is not None:
            self._count(cache_hits=1)
            return kept
        found = remote.look(url, self._access, size=size, on_retry=self._retry)
        if not _key(sha256) and not found.identity:  # nothing would tell a later content from this one
            self._count(cache_misses=1)
            return self._read(url, sha256, size)
        return self._keep(self._cache, url, sha256, found)

    def _keep(self, cache: ShardCache, url: str, sha256: str, found: remote.Found) -> Buffer:
        """Read a shard into the cache, or take what another process has put there meanwhile."""
        missed = False

        def fill(draft: Draft) -> bool:
            nonlocal missed
            missed = True

            def read() -> str:
                remote.copy_remote(url, found, draft.write, self._access, self._retry)
                self._count(bytes_read=found.size or 0)
                return draft.sha256() if sha256 else ""

            return self._agrees(url, sha256, read)

        key = _key(sha256) or url_key(url, found.size or 0, found.identity)
        buffer = cache.open(key, found.size or 0, fill)
        self._count(cache_misses=int(missed or buffer is None), cache_hits=int(not missed and buffer is not None))
        return self._read(url, sha256, found.size) if buffer is None else buffer

    def _read(self, url: str, sha256: str, size: int | None) -> Buffer:
        """Read a shard into memory."""
        buffer: Buffer = b""

        def read() -> str:
            nonlocal buffer
            buffer = b""  # two whole shards at once would be too many
            buffer = remote.read_remote(url, self._access, size=size, on_retry=self._retry)
            self._count(bytes_read=len(buffer))
            return hashlib.sha256(buffer).hexdigest() if sha256 else ""

        self._agrees(url, sha256, read)
        return buffer

    def _agrees(self, url: str, sha256: str, read: Callable[[], str]) -> bool:
        """Whether what was read has the hash, at the second time at the latest; if not, report it."""
        where = storage.shown(url)
        if read() == sha256.lower():
            return True
        if where in self.mismatched:
            return False
        if read() == sha256.lower():
            return True
        with self._lock:
            if where not in self.mismatched:
                self.mismatched.append(where)
        if self._on_mismatch:
            self._on_mismatch(where)
        return False

    def _retry(self, kind: str) -> None:
        with self._lock:
            self.retries[kind] += 1

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self, name, getattr(self, name) + number)


def _key(sha256: str) -> str:
    """A hash as a key; empty where there is none, or what stands there is no hash."""
    digits = sha256.lower()
    return digits if len(digits) == 64 and set(digits) <= set("0123456789abcdef") else ""
