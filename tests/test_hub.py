"""Models on the Hugging Face Hub: `hf://owner/name`, by the hub's own client against a small server of this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from tests.trained import trained_run
from vqscale import load_prior, load_tokenizer
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.exporting import export_run

MODEL, COMMIT = "owner/clocks", "0123456789abcdef0123456789abcdef01234567"


def hub_of(folder: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    """As far as the client asks: the model, its files' facts, and the files themselves, in ranges."""

    def facts(name: str) -> dict[str, Any]:
        data = (folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            self.answer(b"")

        def do_POST(self) -> None:
            self.answer(self.rfile.read(int(self.headers["Content-Length"])))

        def answer(self, body: bytes) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            if path.startswith(f"/api/models/{MODEL}/tree/"):
                self.say([facts(file.name) for file in sorted(folder.iterdir())])
            elif path.startswith(f"/api/models/{MODEL}/paths-info/"):
                wanted = json.loads(body)["paths"]
                self.say([facts(name) for name in wanted if (folder / name).is_file()])
            elif path in (f"/api/models/{MODEL}", f"/api/models/{MODEL}/revision/main"):
                self.say({"id": MODEL, "sha": COMMIT, "siblings": []})
            elif path.startswith(f"/{MODEL}/resolve/") and (folder / Path(path).name).is_file():
                self.send_file(Path(path).name)
            else:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

        def send_file(self, name: str) -> None:
            data, etag = (folder / name).read_bytes(), {"ETag": f'"{facts(name)["oid"]}"', "X-Repo-Commit": COMMIT}
            asked_range = self.headers.get("Range", "").removeprefix("bytes=")
            if not asked_range:
                self.send(200, data, etag)
                return
            first, _, last = asked_range.partition("-")
            part = data[int(first) : int(last or len(data)) + 1]
            self.send(206, part, {**etag, "Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"})

        def say(self, value: Any) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *words: Any) -> None:
            pass

    return Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with one model; what it was asked for. The model lies in `tmp_path / "model"`, its run beside it."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    from huggingface_hub import HfFileSystem

    asked: list[str] = []
    export_run(RunLayout(trained_run(tmp_path / "run")), tmp_path / "model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_of(tmp_path / "model", asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # What the client makes of HF_ENDPOINT when it is imported.
    address, template = f"http://127.0.0.1:{server.server_port}", constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, address))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    HfFileSystem.clear_instance_cache()
    yield asked
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_a_model_on_the_hub_is_the_one_that_was_exported(hub: list[str], tmp_path: Path) -> None:
    ours, theirs = load_tokenizer(tmp_path / "run"), load_tokenizer(f"hf://{MODEL}")
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    codes = ours.encode(images)
    assert all(np.array_equal(grid, theirs.encode(images)[name]) for name, grid in codes.items())
    assert theirs.fingerprint == ours.fingerprint
    assert load_prior(f"hf://{MODEL}").classes == 12
    assert any("/resolve/" in path and path.endswith("tokenizer.safetensors") for path in hub)
    with pytest.raises(UserError, match="hf://owner/absent: holds neither a run nor an exported model"):
        load_tokenizer("hf://owner/absent")
