"""Requests to remote storage through fsspec: with a time limit, and tried again while that may help.

The libraries' own retries are off, since they would multiply with these: botocore tries 5 times, s3fs 5 times around
it, and 5 times around a body. Only a request of an upload is tried 5 times by botocore, because the failure of one part
would cost the whole upload.

Light on purpose: fsspec is imported when a remote URL is used.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vqscale.errors import UserError
from vqscale.storage.faults import absent, kind, refuse_password, told

T = TypeVar("T")
OnRetry = Callable[[str], None]
"""Takes the kind of a fault (`faults.kind`) before the request is tried again; called from several threads."""

UPLOAD_TRIES = 5
_POOL = 128  # connections to an object store: so many that no request waits for one within its time limit
_jitter = random.Random()  # its own, so that nobody's seed is disturbed


@dataclass(frozen=True)
class Access:
    """How remote storage is asked, and how patiently."""

    timeout_s: float = 30.0
    """Seconds for a request of up to `block` bytes, after which it is cancelled; larger ones get more in proportion.
    Only fsspec's asynchronous file systems (S3, HTTP, Google, Azure) can be cancelled; the limits of others (sftp, hf)
    are their own."""
    retries: int = 8
    """Failures in a row that are tried again. Any byte that arrives starts the count anew."""
    block: int = 8 << 20
    """Bytes of the largest range that is asked for."""
    connections: int = 4
    """Ranges of one file that are read at once; file systems that are not asynchronous are read one by one."""
    backoff_s: float = 0.2
    """Seconds of rest after the first failure in a row; doubled with each, less up to a half by chance."""
    longest_backoff_s: float = 20.0
    """Seconds that a rest lasts at most."""

    def limit_s(self, length: int) -> float:
        """Seconds for a request that moves so many bytes."""
        return self.timeout_s * max(1.0, length / self.block)


DEFAULT = Access()


def filesystem(url: str | Path, access: Access = DEFAULT, *, tries: int = 1) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and the file's name in it.

    Args:
        url: the file.
        access: its time limits.
        tries: how often botocore may try a request.
    """
    refuse_password(url)
    from fsspec.core import url_to_fs

    schemes = {part.partition("://")[0] for part in str(url).split("::") if "://" in part}
    system, name = url_to_fs(str(url), **_options(schemes, access, tries))
    if type(system).__module__.startswith("s3fs."):
        system.retries = 1  # no option of s3fs; nobody else has an instance with our options
    return system, str(name)


def asynchronous(system: Any) -> bool:
    """Whether requests to a file system can be cancelled and run side by side."""
    return bool(getattr(system, "async_impl", False))


def request(system: Any, method: str, *args: Any, limit_s: float, **more: Any) -> Any:
    """Call a method of a file system; where it is asynchronous, it is cancelled after so many seconds."""
    if not asynchronous(system):
        return getattr(system, method)(*args, **more)
    from fsspec.asyn import sync

    return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=limit_s, **more)


def retried(
    call: Callable[[], T],
    url: str | Path,
    access: Access = DEFAULT,
    on_retry: OnRetry | None = None,
    rest: Callable[[float], object] = time.sleep,
) -> T:
    """Call until it succeeds: what may heal is tried again, with growing rests.

    Args:
        call: raises what the libraries raise.
        url: named in errors.
        access: how often, and how long the rests are.
        on_retry: called before another try.
        rest: sleeps for so many seconds.

    Raises:
        UserError: it does not heal, or failed too often in a row.
    """
    failures = 0
    while True:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            failed = error
        # Outside of the handler, so that the new error does not carry the library's along: that one may quote secrets.
        fault, failures = kind(failed), failures + 1
        if fault is None or failures > access.retries:
            raise told(failed, url, failures) or failed
        if on_retry:
            on_retry(fault)
        longest = min(access.longest_backoff_s, access.backoff_s * 2 ** (failures - 1))
        rest(longest * _jitter.uniform(0.5, 1))


def ask(url: str | Path, method: str, access: Access = DEFAULT, on_retry: OnRetry | None = None) -> Any:
    """One small request about a file, answered past all caches of fsspec; None when there is no such file.

    Raises:
        UserError: the storage cannot be reached.
    """

    def call() -> Any:
        system, name = filesystem(url, access)
        system.invalidate_cache()
        try:
            return request(system, method, name, limit_s=access.timeout_s)
        except FileNotFoundError as error:
            if absent(error):
                return None
            raise  # another fault in disguise

    return retried(call, url, access, on_retry)


def _options(schemes: set[str], access: Access, tries: int) -> dict[str, Any]:
    """Options of file systems by scheme; what the user has configured for fsspec goes before."""
    from fsspec.config import conf

    options: dict[str, Any] = {}
    for scheme in schemes & {"s3", "s3a"}:
        ours = {
            "retries": {"total_max_attempts": tries, "mode": "standard"},
            "connect_timeout": access.timeout_s,
            "read_timeout": access.timeout_s,
            "max_pool_connections": _POOL,
        }
        options[scheme] = {"config_kwargs": ours | conf.get("s3", {}).get("config_kwargs", {})}
    for scheme in schemes & {"http", "https"}:
        # A body that is compressed on its way has other offsets than the file.
        theirs = conf.get("http", {}).get("headers", {}) | conf.get("https", {}).get("headers", {})
        options[scheme] = {"headers": {"Accept-Encoding": "identity"} | theirs}
    return options
