"""A real S3 server on this machine: moto. Name it in a test module: `pytest_plugins = ("tests.object_store",)`."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

_BUCKET = "bucket"
_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
_START_S = 60.0


@dataclass(frozen=True)
class ObjectStore:
    """A bucket, empty at the beginning of each test."""

    port: int
    monkeypatch: pytest.MonkeyPatch

    def use(self, port: int | None = None) -> None:
        """Let `s3://` mean the server, or what listens on another port before it; in children too."""
        import fsspec

        endpoint = f"http://127.0.0.1:{port or self.port}"
        self.monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", endpoint)
        # fsspec reads its variables once, when it is imported.
        self.monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # ports may come again

    def put(self, name: str, data: bytes) -> str:
        """Write an object past all faults; returns its URL."""
        _send(self.port, f"{_BUCKET}/{name}", "PUT", data)
        return self.url(name)

    def url(self, name: str) -> str:
        """The URL of an object, or of a folder."""
        return f"s3://{_BUCKET}/{name}"


@pytest.fixture(scope="session")
def moto_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a moto server for all tests."""
    for package in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[test]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | _ENVIRONMENT)
    try:
        _await_answer(server, port, log)
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def object_store(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty bucket, which `s3://` URLs lead to."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "FSSPEC_")):
            monkeypatch.delenv(name)
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    _send(moto_port, "moto-api/reset", "POST")
    _send(moto_port, _BUCKET, "PUT")
    store = ObjectStore(moto_port, monkeypatch)
    store.use()
    return store


def _send(port: int, path: str, method: str, data: bytes = b"") -> None:
    heads = {
        "Content-Type": "application/octet-stream",  # what is a form for urllib would be parsed as one
        # moto believes any signature; without one, nothing may be overwritten.
        "Authorization": "AWS4-HMAC-SHA256 Credential=test/1/us-east-1/s3/aws4_request, SignedHeaders=, Signature=",
    }
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, heads, method=method)
    urllib.request.urlopen(request, timeout=30).close()


def _await_answer(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_S
    while server.poll() is None and time.monotonic() < end:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"moto_server did not start: {log.read_text()}")
