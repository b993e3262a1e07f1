"""An agent on a host that waits for its end: `python -m tests.fake_stages.hosted RUN STAGE`.

It has a child that is deaf to TERM, in a session of its own. USR2 makes it save.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launcher.on_host import HOST_TAG
from vqscale.config.layout import RunLayout
from vqscale.files import write_bytes, write_json


def main() -> None:
    layout, stage = RunLayout(Path(sys.argv[1])), sys.argv[2]
    host = os.environ[HOST_TAG].partition(":")[0]

    def save(number: int, frame: FrameType | None) -> None:
        write_json(layout.preempted(stage), {"attempt": int(os.environ["VQSCALE_ATTEMPT"]), "step": 3})
        print("saved", flush=True)
        sys.exit(1)  # as torch's agent does

    signal.signal(signal.SIGUSR2, save)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()  # now it is deaf
    write_bytes(layout.stage(stage) / f"on-{host}", json.dumps({"pid": os.getpid(), **os.environ}).encode())
    while True:
        time.sleep(600)


if __name__ == "__main__":
    main()
