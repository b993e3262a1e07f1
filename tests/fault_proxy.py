"""An HTTP proxy between a client and a server that does to its answers what networks do, and counts it.

Each request gets a connection of its own, so that every fault is drawn for every request.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

CHUNK = 64 << 10
"""Bytes of an answer that are passed on at once, and for which a reset and the latency are drawn."""
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass(frozen=True)
class Faults:
    """What happens to answers."""

    unavailable: float = 0.0
    """Share of requests that are answered 503."""
    reset: float = 0.0
    """Share of chunks at which the connection is reset."""
    cut: float = 0.0
    """Share of chunks at which the connection is closed without a word."""
    latency_s: float = 0.0
    """Seconds before each chunk."""
    bytes_per_s: float = 0.0
    """Speed of each connection; 0 does not limit it."""
    stalls: Mapping[int, float] = field(default_factory=dict)
    """Number of a request, from 0 on → seconds of silence before its answer."""
    resets: Mapping[int, int] = field(default_factory=dict)
    """Number of a request → number of the chunk at which its connection is reset."""


class FaultProxy:
    """Listens on a free port and passes HTTP on to another one, with faults; use it in a `with` block.

    Args:
        port: of the server, on this machine.
        faults: may be replaced while it runs.
        seed: of everything that is drawn.
    """

    def __init__(self, port: int, faults: Faults | None = None, seed: int = 0) -> None:
        self._server_port, self.faults, self._random = port, faults or Faults(), random.Random(seed)
        self.counts: Counter[str] = Counter()
        """What was done: `request`, `unavailable`, `reset`, `cut`, `stall`, and `bytes` of answers passed on."""
        self.requests: list[str] = []
        """First line of each request."""
        self.port = 0
        self._serving: set[asyncio.Task[None] | None] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _run(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopped.wait()
        server.close()

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._serving.add(task)  # asyncio keeps weak references only: a task that waits would be collected
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await client.readuntil(b"\r\n\r\n")
            number = self.counts["request"]
            self.counts["request"] += 1
            self.requests.append(head.partition(b"\r\n")[0].decode())
            if self._random.random() < self.faults.unavailable:
                self.counts["unavailable"] += 1
                body = b"" if head.startswith(b"HEAD") else _SLOW_DOWN
                size = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                answer.write(b"HTTP/1.1 503 Service Unavailable\r\n" + size + body)
                await answer.drain()
            else:
                await self._pass_on(number, _closing(head), client, answer)
        answer.close()
        self._serving.discard(task)

    async def _pass_on(
        self, number: int, head: bytes, client: asyncio.StreamReader, answer: asyncio.StreamWriter
    ) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        writer.write(head)
        rest = asyncio.create_task(_copy(client, writer))
        try:
            if number in self.faults.stalls:
                self.counts["stall"] += 1
                await asyncio.sleep(self.faults.stalls[number])
            await self._answer(number, reader, answer)
        finally:
            rest.cancel()
            writer.close()

    async def _answer(self, number: int, reader: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        sent = 0
        # What is there is passed on at once, so that "100 Continue" is not held back, but never beyond a chunk's end.
        while data := await reader.read(CHUNK - sent % CHUNK):
            faults = self.faults
            if sent % CHUNK == 0:
                await asyncio.sleep(faults.latency_s)
                if self._breaks(answer, faults.resets.get(number) == sent // CHUNK):
                    return
            if faults.bytes_per_s:
                await asyncio.sleep(len(data) / faults.bytes_per_s)
            sent += len(data)
            answer.write(data)
            self.counts["bytes"] += len(data)
            await answer.drain()

    def _breaks(self, answer: asyncio.StreamWriter, planned: bool) -> bool:
        """Draw whether the connection ends here, unless it is planned."""
        fault = self._random.random()
        if planned or fault < self.faults.reset:
            self.counts["reset"] += 1
            # What was sent before is not waited for, and the other side gets a reset instead of an end.
            linger = struct.pack("ii", 1, 0)
            answer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            answer.transport.abort()
            return True
        if fault < self.faults.reset + self.faults.cut:
            self.counts["cut"] += 1
            return True
        return False


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()


def _closing(head: bytes) -> bytes:
    """The head of a request, so changed that its connection is closed after the answer."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([first, *kept, b"Connection: close", b"", b""])
