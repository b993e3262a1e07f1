"""One piece of work at a time in a thread of its own; what it raises comes out where its result is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs one call after the other beside the training.

    The thread is a daemon: a process that fails ends without waiting for the network.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._result: T | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether there is work whose end nobody has asked for yet."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """Whether `wait` would return at once."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, work: Callable[[], T]) -> None:
        """Begin; the work before has to be waited for."""
        assert not self.busy

        def run() -> None:
            try:
                self._result = work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="vqscale-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> T:
        """The result of the work; raises what it raised."""
        assert self._thread is not None
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        result, self._result = self._result, None
        return result  # type: ignore[return-value]
