"""What a profile says of hosts that are reached over ssh, and DeepSpeed's hostfile."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.nodes import Persistence

_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
_ENTRY = re.compile(rf"(?P<name>{_NAME})(?: slots=(?P<slots>[1-9][0-9]{{0,3}}))?(?: address=(?P<address>{_NAME}))?")

Folder = Annotated[str, Field(pattern=r"^/[^\x00-\x1f\x7f]*$")]
"""An absolute path; it is quoted wherever a shell reads it."""
# `Name=value`, handed over as one word. Which names there are: ALLOWED.
Option = Annotated[str, Field(pattern=r"^[A-Za-z]+=[!-~]([ -~]*[!-~])?$")]

ALLOWED = (
    "AddressFamily", "BindAddress", "BindInterface", "CertificateFile", "CheckHostIP", "Ciphers", "Compression",
    "ConnectTimeout", "ConnectionAttempts", "GSSAPIAuthentication", "GSSAPIDelegateCredentials", "GlobalKnownHostsFile",
    "HostKeyAlgorithms", "HostKeyAlias", "HostbasedAuthentication", "IPQoS", "IdentitiesOnly", "IdentityAgent",
    "IdentityFile", "KexAlgorithms", "LogLevel", "MACs", "PreferredAuthentications", "ProxyJump",
    "PubkeyAcceptedAlgorithms", "PubkeyAuthentication", "RekeyLimit", "ServerAliveCountMax", "ServerAliveInterval",
    "StrictHostKeyChecking", "TCPKeepAlive", "UserKnownHostsFile",
)  # fmt: skip
"""Options of ssh that a profile may set. Those that run commands, or change what goes through the connection, belong
into a file of ssh's own (`config`)."""


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    """As ssh knows it: a name, an address, or an alias of ssh's configuration."""
    slots: int | None
    """Processes that it can hold."""
    address: str
    """Where the other hosts reach it."""


def parse_host(text: str) -> Host:
    """A host as it stands in a hostfile: `gpu1`, `gpu1 slots=8`, `gpu1 slots=8 address=10.0.0.1`.

    Raises:
        ValueError: it is something else.
    """
    match = _ENTRY.fullmatch(" ".join(text.split(" ")).strip())
    if match is None:
        raise ValueError(f"{text!r} is no host; write `NAME slots=N`, or `NAME slots=N address=ADDRESS`")
    slots = match["slots"]
    return Host(match["name"], int(slots) if slots else None, match["address"] or match["name"])


def parse_hostfile(text: str) -> tuple[str, ...]:
    """Hosts of a hostfile in DeepSpeed's format: a host a line, `#` begins a comment.

    Raises:
        ValueError: a line is no host, a host comes twice, or there is none; the text names the line.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = " ".join(line.partition("#")[0].split())
        if not entry:
            continue
        try:
            name = parse_host(entry).name
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if name in found:
            raise ValueError(f"line {number}: host {name} stands there twice")
        found[name] = entry
    if not found:
        raise ValueError("names no host; write `NAME slots=N` lines")
    return tuple(found.values())


class SshSettings(Persistence):
    """Hosts over ssh: on each that a stage uses, one of torch's elastic agents starts its share of the processes."""

    hosts: tuple[str, ...] = ()
    """The hosts, each as a line of a hostfile: `gpu1 slots=8`. The first holds the store in which the agents meet.
    `address=` says where the others reach a host, if that is not its name."""
    hostfile: str | None = None
    """File with the hosts instead, in DeepSpeed's format; read when a run is planned, and kept in the run's record."""
    exclude: tuple[Annotated[str, Field(pattern=f"^{_NAME}$")], ...] = ()
    """Hosts that are not used, by their names."""
    slots: Annotated[int, Field(ge=1)] | None = None
    """Processes that a host can hold which does not say so itself; one a GPU, where there are some."""
    cores: Annotated[int, Field(ge=1)]
    """CPU cores of each host; its processes share them."""
    user: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")] | None = None
    """Name on the hosts; ssh's own choice when it is left out."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the hosts' sshd; ssh's own choice when it is left out."""
    config: Folder | None = None
    """Configuration file of ssh, instead of the user's own."""
    options: tuple[Option, ...] = ()
    """Options of ssh as `Name=value`, such as `ProxyJump=login1`."""
    python: Folder | None = None
    """Interpreter on the hosts; the one that submits when it is left out."""
    directory: Folder | None = None
    """Folder of the code on the hosts; the one of the code that submits when it is left out."""
    rendezvous_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of the first host at which the agents meet. Left out: one from 20000 to 29999 that follows from run, stage
    and attempt, so that runs beside each other do not collide."""

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return parse_hostfile("\n".join(hosts)) if hosts else ()

    @field_validator("options")
    @classmethod
    def _are_allowed(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            name = option.partition("=")[0]
            if name not in ALLOWED:
                raise ValueError(f"{name}: not among the options that a profile may set; use `config`, a file of ssh's")
        return options

    @model_validator(mode="after")
    def _one_source(self) -> SshSettings:
        if bool(self.hosts) == bool(self.hostfile):
            raise ValueError("needs either `hosts` or `hostfile`")
        lacking = [host.name for host in map(parse_host, self.hosts) if host.slots is None and self.slots is None]
        if lacking:
            raise ValueError(
                f"host {lacking[0]} does not say how many processes it holds; write `slots=N`, or set `slots`"
            )
        return self

    def resolved(self, folder: Path) -> SshSettings:
        """The same with the hosts of the hostfile in it, which is looked for in `folder`.

        Raises:
            ValueError: the file cannot be read, or is faulty.
        """
        if self.hostfile is None:
            return self
        path = folder / Path(self.hostfile).expanduser()
        try:
            hosts = parse_hostfile(path.read_text(encoding="utf-8"))
            return SshSettings.model_validate({**self.model_dump(), "hosts": hosts, "hostfile": None})
        except (OSError, ValueError) as error:
            raise ValueError(f"hostfile {path}: {_first_fault(error)}") from None

    def used(self, processes: int) -> tuple[Host, ...]:
        """The hosts that so many processes share evenly: as few as hold them, from the first on.

        Raises:
            ValueError: they cannot be shared, or there is no room.
        """
        all_hosts = self.usable
        for number in range(1, len(all_hosts) + 1):
            some = all_hosts[:number]
            if processes % number == 0 and processes // number <= min(map(self._room, some)):
                return some
        room = ", ".join(f"{host.name} {self._room(host)}" for host in all_hosts) or "none"
        raise ValueError(f"{processes} processes cannot be shared evenly by the first hosts (slots: {room})")

    @property
    def cores_per_node(self) -> int:
        """CPU cores of each host."""
        return self.cores

    @property
    def gpus_per_node(self) -> int:
        """0: how many processes a host can hold is counted in slots."""
        return 0

    @property
    def usable(self) -> tuple[Host, ...]:
        """The hosts but for the excluded ones."""
        return tuple(host for host in map(parse_host, self.hosts) if host.name not in self.exclude)

    def without(self, names: Iterable[str]) -> SshSettings:
        """The same without some hosts."""
        return self.model_copy(update={"exclude": (*self.exclude, *names)})

    def can_spare(self, names: Iterable[str], processes: int) -> bool:
        """Whether the other hosts have room for so many processes."""
        try:
            return bool(self.without(names).used(processes))
        except ValueError:
            return False

    def spread(self, processes: int) -> int:
        """Number of hosts for so many processes; raises as `used`."""
        return len(self.used(processes))

    def _room(self, host: Host) -> int:
        return host.slots or self.slots or 0


def _first_fault(error: OSError | ValueError) -> str:
    """What is wrong, without pydantic's frame around it."""
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return error.strerror or "" if isinstance(error, OSError) else str(error)
