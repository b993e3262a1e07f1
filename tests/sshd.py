"""A server of ssh for tests: its own keys and port, on loopback; several host names lead to it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.ranks import LIMIT_S

_PRIVSEP = Path("/run/sshd")
_SERVER = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/client.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 100
LogLevel VERBOSE
"""
_CLIENT = """\
Host {hosts}
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/client
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile {folder}/known
    LogLevel ERROR
"""


def program() -> str | None:
    """sshd, which wants to be called by its whole path."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def missing() -> str:
    """What keeps this machine from running a server; empty when nothing does."""
    if program() is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return "ssh and sshd are not installed (apt-get install openssh-server openssh-client)"
    if not _PRIVSEP.is_dir() and os.geteuid() != 0:
        return f"sshd needs {_PRIVSEP}, which only root can make"
    return ""


@contextmanager
def server(folder: Path, hosts: Sequence[str]) -> Iterator[Path]:
    """A server that runs; gives the configuration file for ssh, which knows the hosts."""
    if os.geteuid() == 0:
        _PRIVSEP.mkdir(parents=True, exist_ok=True)
    for name in ("host", "client"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, capture_output=True)
    port = _free_port()
    (folder / "sshd_config").write_text(_SERVER.format(folder=folder))
    client = folder / "ssh_config"
    client.write_text(_CLIENT.format(folder=folder, hosts=" ".join(hosts), port=port))
    command = [str(program()), "-D", "-e", "-f", str(folder / "sshd_config"), "-o", f"ListenAddress=127.0.0.1:{port}"]
    with (folder / "sshd.log").open("wb") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
    try:
        _wait_for(port, daemon, folder / "sshd.log")
        yield client
    finally:
        daemon.terminate()
        daemon.wait(LIMIT_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, daemon: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + LIMIT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert daemon.poll() is None, log.read_text()
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.02)
