"""A trace of some steps, on demand: `vqscale trace RUN` asks, rank 0 answers while the training goes on."""

from __future__ import annotations

import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from vqscale.files import read_json


class Tracer:
    """Looks for a request now and then, and records the steps that follow it.

    Args:
        request: the file that asks, `{"steps": n}`; removed when the trace is written.
        folder: where traces go, `step-N.json.gz` for https://ui.perfetto.dev or chrome://tracing, and a table as text.
    """

    def __init__(self, request: Path, folder: Path) -> None:
        self._request, self._folder = request, folder
        self._running: profile | None = None
        self._first = self._left = 0

    def look(self, step: int) -> None:
        """Begin where somebody asks; called between two steps, cheap enough for each log line."""
        if self._running is not None:
            return
        asked = read_json(self._request)
        if not isinstance(asked, dict):
            return
        self._first, self._left = step, int(asked.get("steps", 1))
        self._running = profile(activities=_activities(), record_shapes=True, profile_memory=True)
        self._running.start()

    def step(self) -> Path | None:
        """A step was taken; returns the trace's path when it was the last one that was asked for."""
        if self._running is None:
            return None
        self._running.step()
        self._left -= 1
        if self._left > 0:
            return None
        self._running.stop()
        path = self._write(self._running)
        self._running = None
        self._request.unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Leave nothing running; a request that was not finished stays for the next attempt."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def _write(self, done: profile) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{self._first}.json.gz"
        done.export_chrome_trace(str(path))
        table = done.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        head = f"steps from {self._first}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        path.with_name(f"step-{self._first}.txt").write_text(head + table)
        return path


def _activities() -> list[ProfilerActivity]:
    from torch import cuda

    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda.is_available() else [])]
