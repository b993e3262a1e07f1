"""Hosts out of network namespaces, for tests: each has an address, a name, and process ids of its own. Root only.

A bridge on this machine joins them, so that a link can be taken down like a cable that is pulled. Killing the first
process of a host is a power-off: all others on it die with it, and with the link down before, nobody hears of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqscale.errors import UserError

PROGRAMS = ("ip", "nsenter", "unshare")
"""What has to be installed."""

_ENTER = 'hostname "$1"; mount -t proc proc /proc; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


@dataclass(frozen=True)
class Hosts:
    """So many hosts, `node1`, `node2`, ..., on a network of their own."""

    number: int
    """Of the network, 1 to 254; its addresses are 10.77.NUMBER.x, this machine's 10.77.NUMBER.1."""
    nodes: int
    file: Path
    """What the hosts see as `/etc/hosts`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hosts."""
        return tuple(f"node{node}" for node in range(1, self.nodes + 1))

    @property
    def here(self) -> str:
        """Address of this machine on the network."""
        return f"10.77.{self.number}.1"

    def address(self, name: str) -> str:
        """Address of a host."""
        return f"10.77.{self.number}.{10 + int(name.removeprefix('node'))}"

    def make(self) -> None:
        """Make the network; one that an earlier process left is replaced.

        Raises:
            UserError: programs or rights are missing, or the kernel refuses.
        """
        self.end()
        lines = [f"{self.here} ctl", "127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        self.file.write_text("\n".join([*lines, ""]), encoding="utf-8")
        bridge = self._bridge
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.here}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for name in self.names:
            space, cable = self._space(name), self._cable(name)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", bridge, "up")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def end(self) -> None:
        """Remove what there is of the network."""
        for name in self.names:
            for what in (("netns", "del", self._space(name)), ("link", "del", self._cable(name))):
                with contextlib.suppress(UserError):
                    _ip(*what)
        with contextlib.suppress(UserError):
            _ip("link", "del", self._bridge)

    def link(self, name: str, up: bool) -> None:
        """Plug the cable of a host in, or pull it."""
        _ip("link", "set", self._cable(name), "up" if up else "down")

    def on(self, name: str, command: Sequence[str]) -> tuple[str, ...]:
        """The command that runs another one on a host, as its first process."""
        enter = ("nsenter", f"--net=/run/netns/{self._space(name)}")
        alone = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")
        return (*enter, *alone, "sh", "-c", _ENTER, "sh", name, str(self.file), *command)

    @property
    def _bridge(self) -> str:
        return f"vq{self.number}"

    def _space(self, name: str) -> str:
        return f"vq{self.number}-{name}"

    def _cable(self, name: str) -> str:
        return f"vq{self.number}-{name.removeprefix('node')}"


def missing() -> str:
    """What hosts need and this machine has not; empty when it has all."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (apt-get install -y iproute2 util-linux)"
    return "" if os.geteuid() == 0 else "only root makes network namespaces"


def free_number() -> int:
    """Number of a network that nobody has made here."""
    taken = set(os.listdir("/sys/class/net"))
    return next(number for number in range(1, 255) if f"vq{number}" not in taken)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr.strip(), where=f"ip {' '.join(words)}")
