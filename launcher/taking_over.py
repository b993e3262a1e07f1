"""Takes over a run whose supervisor was on a machine that is gone: a pod that has another name now, a lost host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from launcher import process
from launcher.supervise import require_free
from vqscale.config.layout import RunLayout
from vqscale.files import read_json, write_json


def left_elsewhere(layout: RunLayout) -> dict[str, Any] | None:
    """The supervisor of a run, where it was started on another machine, which cannot be asked; else None."""
    identity: dict[str, Any] | None = read_json(layout.supervisor)
    return identity if identity and process.is_alive(identity) is None else None


@contextmanager
def taken_over(layout: RunLayout, identity: dict[str, Any]) -> Iterator[str]:
    """Forget a supervisor that cannot be asked; it is remembered again where nothing comes of it.

    Yields:
        What nobody could make sure of.

    Raises:
        UserError: it still holds its lock, as far as the file system tells other machines.
    """
    require_free(layout)
    layout.supervisor.unlink()
    host, pid = identity["host"], identity["pid"]
    try:
        yield f"{host} could not be asked whether supervisor {pid} or what it started still runs; then both write here"
    except BaseException:
        write_json(layout.supervisor, identity)
        raise
