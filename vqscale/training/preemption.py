"""Preemption: a signal sets a flag, the ranks agree on it at a step's boundary, and all of them save.

A handler that saved would save in the middle of a step, and ranks that acted on their own flags would save at different
steps and wait for each other for ever. So the handler only remembers, and one small all-reduce a step tells everybody.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from vqscale.training.distributed import gloo_group

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""What schedulers and the elastic agent send. SIGUSR1 is left alone: NCCL uses it."""


class PreemptedError(Exception):
    """The ranks agreed to stop, and the step they stopped at is saved."""

    def __init__(self, step: int, signal_name: str, save_s: float) -> None:
        self.step, self.signal_name, self.save_s = step, signal_name, save_s
        super().__init__(f"{signal_name}: saved at step {step} in {save_s:.1f} s")

    def facts(self) -> dict[str, Any]:
        """Plain values for the stage's marker."""
        return {"step": self.step, "signal": self.signal_name, "save_s": round(self.save_s, 3)}


class Notice:
    """Whether this stage was asked to stop.

    The agreement costs no waiting: its all-reduce begins with a step and is read at the step's end, over a group of
    gloo's, so that a GPU is not waited for either. A signal is therefore acted on after the step that follows it, at
    the latest.

    Args:
        group: all ranks, over gloo.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.received: signal.Signals | None = None
        """The first signal that came to this rank."""
        self._group = group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._asking: dist.Work | None = None

    def begin(self) -> None:
        """Begin to ask all ranks; collective, returns at once."""
        self._flag.fill_(int(self.received or 0))
        self._asking = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> str:
        """The signal that some rank had received when all began to ask; empty where none had."""
        if self._asking is None:
            return ""
        self._asking.wait()
        self._asking = None
        return signal.Signals(int(self._flag)).name if int(self._flag) else ""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)


@contextmanager
def preemption() -> Iterator[Notice]:
    """Listen for `SIGNALS`, and give the handlers back afterwards; collective. Only the main thread can listen.

    A process that is forked inherits the handlers; whoever forks one resets them there.
    """
    notice = Notice(gloo_group())
    if threading.current_thread() is not threading.main_thread():
        yield notice
        return
    before = {number: signal.signal(number, notice._receive) for number in SIGNALS}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
