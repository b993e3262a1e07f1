"""Plain HTTP, which says little of what went wrong; and that nothing that is said gives a secret away."""

from __future__ import annotations

import logging
import ssl
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.fault_proxy import FaultProxy, Faults
from vqscale import storage
from vqscale.errors import UserError
from vqscale.storage import remote
from vqscale.storage.access import Access, retried
from vqscale.storage.faults import kind, refuse_password, shown
from vqscale.storage.store import Store

DATA = bytes(range(256)) * 1200  # 300 KiB
QUICK = Access(block=100_000, backoff_s=0.005, longest_backoff_s=0.02)
SECRET = "K7MDENGbPxRfiCY"


@dataclass
class Site:
    """A small HTTP server with one file."""

    content: bytes = DATA
    ranges: bool = True
    length: bool = True
    broken: int = 0
    """So many requests are answered 500."""
    status: int = 200
    after: Callable[[], None] = lambda: None
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/shard.tar"


def handler_of(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)
            site.after()

        def answer(self, body: bool) -> None:
            asked = self.headers.get("Range", "").removeprefix("bytes=")
            site.asked.append(f"{self.command} {asked}".strip())
            if not self.path.startswith("/shard.tar"):
                self.send_error(404)
            elif site.broken or site.status != 200:
                site.broken = max(0, site.broken - 1)
                self.send_error(500 if site.status == 200 else site.status)
            else:
                self.send(asked if site.ranges else "", body)

        def send(self, asked: str, body: bool) -> None:
            content = site.content
            if asked:
                first, last = asked.split("-")
                content = content[int(first) : int(last) + 1]
            self.send_response(206 if asked else 200)
            if site.length:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None: ...

    return Handler


@contextmanager
def served(site: Site) -> Iterator[Site]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(site)) as server:
        site.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[test]'")
    with served(Site()) as made:
        yield made


def test_ranges_over_http(site: Site) -> None:
    assert remote.read_remote(site.url, QUICK)[:] == DATA
    ranges = {line for line in site.asked if line.startswith("GET")}
    assert ranges == {"GET 0-65535", "GET 65536-99999", "GET 100000-199999", "GET 200000-299999", "GET 300000-307199"}


def test_a_server_without_ranges_sends_it_once(site: Site) -> None:
    site.ranges = False
    assert remote.read_remote(site.url, QUICK)[:] == DATA
    assert [line for line in site.asked if line.startswith("GET")] == ["GET 0-65535"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_of_a_file(ranges: bool, site: Site, tmp_path: Path) -> None:
    """By URL, whether the server knows ranges or not, and on a disk."""
    site.ranges = ranges
    (tmp_path / "file").write_bytes(DATA)
    for start, stop in ((0, 8), (5, 5), (1, 100), (70_000, 270_001), (len(DATA) - 1, len(DATA)), (0, len(DATA))):
        for url in (site.url, tmp_path / "file"):
            assert storage.read_range(url, start, stop)[:] == DATA[start:stop]
    for url in (site.url, tmp_path / "file"):
        with pytest.raises(UserError, match="were expected"):
            storage.read_range(url, 7, len(DATA) + 1)
    assert remote.read_range(site.url, 50_000, 290_000, QUICK)[:] == DATA[50_000:290_000]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("ranges", "resets"),
    [(True, {1: 1, 2: 1, 4: 0}), (False, {1: 3, 2: 4, 3: 0})],
)
def test_resets_over_http(site: Site, ranges: bool, resets: dict[int, int]) -> None:
    """The first request asks for the size; without ranges, the others ask for all of it."""
    site.ranges = ranges
    retries: Counter[str] = Counter()
    access = Access(block=100_000, connections=1, backoff_s=0.005)
    with FaultProxy(site.port, Faults(resets=resets)) as proxy:
        content = remote.read_remote(f"{proxy.url}/shard.tar", access, on_retry=lambda kind: retries.update([kind]))
    assert content[:] == DATA
    assert proxy.counts["reset"] == 3
    assert retries == {"reset": 2}  # where no byte of an answer comes, aiohttp asks once again by itself


@pytest.mark.fault
def test_silence_over_http(site: Site) -> None:
    retries: Counter[str] = Counter()
    access = Access(block=100_000, timeout_s=0.5, backoff_s=0.005)
    with FaultProxy(site.port, Faults(stalls={2: 8.0})) as proxy:
        content = remote.read_remote(f"{proxy.url}/shard.tar", access, on_retry=lambda kind: retries.update([kind]))
    assert content[:] == DATA
    assert proxy.counts["stall"] == 1
    assert retries["timeout"] >= 1


@pytest.mark.fault
def test_a_slow_server_without_ranges_gets_the_time_for_all_of_it(site: Site) -> None:
    site.ranges = False
    retries: Counter[str] = Counter()
    access = Access(block=100_000, timeout_s=0.3, backoff_s=0.005)
    with FaultProxy(site.port, Faults(bytes_per_s=500_000)) as proxy:
        content = remote.read_remote(f"{proxy.url}/shard.tar", access, on_retry=lambda kind: retries.update([kind]))
    assert content[:] == DATA
    assert retries["timeout"] >= 1


def test_a_server_that_is_in_trouble_is_not_taken_for_a_missing_file(site: Site) -> None:
    """A FileNotFoundError is what fsspec makes of whatever keeps it from asking for the size."""
    site.broken = 4  # HEAD and GET, twice
    assert storage.size(site.url) == len(DATA)
    assert site.broken == 0


@pytest.mark.parametrize(
    ("status", "said"),
    [(404, "no such file"), (403, "permission denied"), (410, "no such file"), (418, "cannot be reached")],
)
def test_what_does_not_heal_is_asked_once(site: Site, status: int, said: str) -> None:
    site.status = status
    with pytest.raises(UserError, match=said):
        remote.read_remote(site.url, QUICK)
    assert site.asked == ["HEAD", "GET"]  # fsspec asks for the size in two ways


def test_without_a_length_nobody_knows_whether_it_is_whole(site: Site) -> None:
    site.length = False
    with pytest.raises(UserError, match="does not say how long it is; serve it with Content-Length"):
        remote.read_remote(site.url, QUICK)
    assert remote.read_remote(site.url, QUICK, size=len(DATA))[:] == DATA


@pytest.mark.fault
def test_a_body_that_ends_early_goes_on_where_it_ended(site: Site) -> None:
    """Without a length in the answer, an end that comes too early looks like the end."""
    site.length, site.content = False, DATA * 4
    retries: Counter[str] = Counter()
    with FaultProxy(site.port, Faults(cut=0.3), seed=2) as proxy:
        url, size = f"{proxy.url}/shard.tar", len(site.content)
        access = Access(block=300_000, connections=1, backoff_s=0.005)
        found = remote.read_remote(url, access, size=size, on_retry=lambda kind: retries.update([kind]))
    assert found[:] == site.content
    assert retries["length"] > 0


def test_answers_of_another_length_are_not_believed(site: Site) -> None:
    site.content = DATA[: 1 << 17]

    def grow() -> None:
        site.ranges, site.content = False, DATA

    site.after = grow
    with pytest.raises(UserError, match="was changed while it was read"):
        remote.read_remote(site.url, QUICK)


# --- secrets


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/x.tar",
        f"s3://AKIAEXAMPLE:ab/{SECRET}@bucket/x.tar",
        f"https://user:{SECRET}@host:8080/x.tar",
        f"simplecache::https://user:{SECRET}@host/x.tar",
    ],
)
def test_a_password_in_a_url_is_refused(url: str) -> None:
    for call in (storage.size, storage.list_names, storage.read_bytes, storage.remove, Store().open):
        with pytest.raises(UserError, match="holds a password; leave it out and give credentials by the env") as caught:
            call(url)  # type: ignore[operator]
        assert SECRET not in whole_story(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c/x.tar",
        "https://host:8080/a@b/x.tar",
        "http://[::1]:8080/a@b",
        "abfs://container@account.dfs.core.windows.net/x.tar",
        "hf://datasets/owner/name@main/x.tar",
        "github://owner:repository@main/x.tar",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/point/a@b",
    ],
)
def test_other_signs_are_no_password(url: str) -> None:
    refuse_password(url)
    assert shown(url) == url


def test_signatures_are_masked() -> None:
    url = f"https://host/x.tar?X-Amz-Signature={SECRET}&X-Amz-Date=1&X-Amz-Security-Token={SECRET}&sig={SECRET}&part=2"
    masked = "https://host/x.tar?X-Amz-Signature=***&X-Amz-Date=1&X-Amz-Security-Token=***&sig=***&part=2"
    assert shown(url) == masked
    assert shown(f"cannot get '{url}', sorry") == f"cannot get '{masked}', sorry"


@pytest.mark.parametrize("status", [200, 403, 404, 410])
def test_secrets_reach_neither_errors_nor_the_log(site: Site, status: int, caplog: pytest.LogCaptureFixture) -> None:
    site.status = status
    url = f"{site.url}?X-Amz-Credential=me&X-Amz-Signature={SECRET}"
    if status == 200:
        site.after = lambda: setattr(site, "content", DATA[:7])  # it changes while it is read
    with caplog.at_level(logging.INFO), pytest.raises(UserError) as caught:
        remote.read_remote(url, QUICK)
    assert "X-Amz-Signature=***" in str(caught.value)
    assert SECRET not in whole_story(caught.value) + caplog.text


def test_secrets_are_masked_when_tries_run_out(site: Site) -> None:
    site.status = 503
    with pytest.raises(UserError, match="tries in a row failed") as caught:
        remote.read_remote(f"{site.url}?token={SECRET}", Access(retries=1, backoff_s=0.005))
    assert SECRET not in whole_story(caught.value)


def whole_story(error: BaseException) -> str:
    """All that could ever be printed of an error and of those it came from."""
    told = "".join(traceback.format_exception(error))
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and link not in seen:
            seen.append(link)
            waiting += [link.__cause__, link.__context__]
    return told + "".join(repr(link) + str(link) + repr(vars(link)) for link in seen)


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int) -> None:
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class HTTPClientError(Exception):
    """As botocore's."""

    __module__ = "botocore.exceptions"


class ClientResponseError(Exception):
    """As aiohttp's."""

    def __init__(self, status: int) -> None:
        self.status = status


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), "reset"),
        (HTTPClientError(), "reset"),
        (EOFError(), "reset"),
        (TimeoutError(), "timeout"),
        (raised_from(TimeoutError(), ClientError(400)), "timeout"),  # S3's RequestTimeout
        (raised_from(OSError(), ClientError(503)), "status"),
        (ClientResponseError(429), "status"),
        (raised_from(FileNotFoundError(), ClientResponseError(500)), "status"),
        (raised_from(FileNotFoundError(), ConnectionRefusedError()), "reset"),
        (raised_from(OSError(), ClientError(301)), None),  # a bucket of another region
        (raised_from(OSError(), ClientError(416)), None),
        (raised_from(PermissionError(), ClientError(403)), None),
        (raised_from(FileNotFoundError(), KeyError()), None),
        (ssl.SSLCertVerificationError(), None),
        (NotImplementedError(), None),
        (TypeError(), None),
        (RuntimeError(), None),
    ],
    ids=repr,
)
def test_what_may_heal_is_told_from_what_does_not(error: Exception, expected: str | None) -> None:
    assert kind(error) == expected


def test_faults_of_the_program_stay_what_they_are() -> None:
    def call() -> None:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        retried(call, "s3://x/y")
