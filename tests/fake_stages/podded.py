"""What runs in a pod: `python -m tests.fake_stages.podded RUN STAGE ACT`.

The act `done` ends; `wait` waits for its end, and saves when it gets TERM; `stay` waits and cannot save.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from vqscale.config.layout import RunLayout
from vqscale.files import write_json


def main() -> None:
    layout, stage, act = RunLayout(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
    index = int(os.environ["JOB_COMPLETION_INDEX"])

    def save(number: int, frame: FrameType | None) -> None:
        write_json(layout.preempted(stage), {"attempt": int(os.environ["VQSCALE_ATTEMPT"]), "step": 3})
        sys.exit(1)

    if act == "wait":
        signal.signal(signal.SIGTERM, save)
    print("holds the store:", os.environ["PET_RDZV_CONF"].partition("=")[2], flush=True)
    folder = layout.stage(stage)
    (folder / f"on-{index}").touch()
    while act != "done" and not (folder / f"go-{index}").exists():
        time.sleep(0.02)
    while index == 0 and len(list(folder.glob("on-*"))) < 2:
        time.sleep(0.02)
    if index == 0:
        write_json(layout.done(stage), {"pods": 2})


if __name__ == "__main__":
    main()
