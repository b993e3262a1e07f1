"""A stage that acts as it is told: `python -m tests.fake_stages.play --run RUN --stage S --act ACT`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from vqscale.config.layout import RunLayout
from vqscale.events import EventLog
from vqscale.files import write_bytes, write_json


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--stage")
    parser.add_argument("--act")
    arguments = parser.parse_args()
    layout, stage = RunLayout(arguments.run), arguments.stage
    if "VQSCALE_TASK" in os.environ:
        layout = layout.of_task(int(os.environ["VQSCALE_TASK"]))
    attempt = int(os.environ["VQSCALE_ATTEMPT"])
    if arguments.act == "done":
        events = EventLog(layout.events(stage), stage, attempt, "images/s", 4)
        events.log(2, rate=100.0, loss=0.5)
        events.log(4, rate=100.0, loss=0.25)
        write_json(layout.done(stage), {"stage": stage, "attempt": attempt})
        if layout.task == 2:  # the last one finishes the stage
            write_json(layout.whole.done(stage), {"stage": stage, "attempt": attempt})
        sys.exit(1)  # an exit code decides nothing
    if arguments.act == "late":  # as if another machine had written it
        code = f"import time, pathlib; time.sleep(1); pathlib.Path({str(layout.done(stage))!r}).write_text('{{}}')"
        subprocess.Popen([sys.executable, "-c", code], env={}, start_new_session=True)
        sys.exit(0)
    if arguments.act == "fail":
        failure = {"stage": stage, "kind": "user", "rank": 0, "message": "the dog ate the shards"}
        write_json(layout.failure(stage), failure)
        sys.exit(1)
    if arguments.act == "mute":
        print("Segmentation fault", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGKILL)
    hang(layout, stage)


def hang(layout: RunLayout, stage: str) -> None:
    """Like a rank that cannot be asked: in a session of its own, deaf to TERM, with a child."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()  # now it is deaf
    write_bytes(layout.stage(stage) / "pids", f"{os.getpid()} {child.pid}".encode())
    time.sleep(600)


if __name__ == "__main__":
    main()
