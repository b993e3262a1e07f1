"""The words for how runs and stages stand. Light: the help of the command line lists them."""

from __future__ import annotations

from typing import Literal, get_args

StageWord = Literal["waiting", "running", "done", "failed", "preempted", "cancelled"]
STOPPED: tuple[StageWord, ...] = ("failed", "cancelled", "preempted")
"""Words of a run or stage that `requeue` goes on with."""
ENDED = ("done", *STOPPED)
"""Words of a run or stage that does not go on by itself."""

GONE = "gone"
"""Of a run whose directory is not there."""
UNREADABLE = "unreadable"
"""Of a directory that holds no run, or a damaged one."""
STATES = (*get_args(StageWord), GONE, UNREADABLE)
"""All words that a list of runs can show."""
