"""Shows how far a benchmark is: a bar on a terminal, elsewhere plain lines, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A function that is called with a title, steps done and steps in all, while the benchmark of this name runs."""
    if not sys.stderr.isatty():
        yield _plain_lines(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def report(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(f"{name}: {title}", total=total)
            bar.update(tasks[title], completed=done, total=total)

        yield report


def _plain_lines(name: str) -> Callable[[str, int, int], None]:
    """A line at the beginning of each title, and one each quarter of the way."""
    said: dict[str, int] = {}

    def report(title: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 4
        if quarter > said.get(title, -1):
            said[title] = quarter
            print(f"{name}: {title}: {done} of {total}", file=sys.stderr, flush=True)

    return report
