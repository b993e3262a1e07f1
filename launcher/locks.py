"""Locks on files: what two commands must not do to one run at the same time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqscale.config.layout import LOCK
from vqscale.errors import UserError


@contextmanager
def held(file: Path, refusal: str, mend: str = "") -> Iterator[None]:
    """Hold a lock, or refuse; the kernel lets go of it when its holder dies, however it dies.

    Args:
        file: the lock; it stays, since whoever removed it could let two hold it.
        refusal: what to say where somebody else holds it.
        mend: what can be done then.

    Raises:
        UserError: somebody else holds it, or the storage cannot lock.
    """
    try:
        lock = file.open("a")
    except FileNotFoundError:
        raise UserError("is not there", where=str(file.parent)) from None
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})", where=str(file)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal, where=str(file.parent), mend=mend) from None
        except OSError as error:
            mend = "put runs on storage that locks files, such as a file system mounted with `flock`"
            raise UserError(f"cannot be locked ({error.strerror})", where=str(file), mend=mend) from None
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Start, requeue or cancel a run, or a folder of several, while nobody else does.

    Raises:
        UserError: somebody else does.
    """
    with held(folder / LOCK, "another command starts, requeues or cancels it", "try again when that is done"):
        yield
