"""A hub of our own on 127.0.0.1: one repository's files, as the hub's library asks for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

REPOSITORY = "org/tiny"
COMMIT = "5" * 40


@dataclass
class Hub:
    """What the hub serves, and how it misbehaves.

    Attributes:
        folder: Its files.
        gated: Whether it refuses for want of an accepted licence.
        damaged: A file that is served with a wrong byte in it.
        cut: A file of which only half is sent before the line breaks.
        served: Paths that were asked for, with how many bytes were sent.
    """

    folder: Path
    gated: bool = False
    damaged: str = ""
    cut: str = ""
    served: list[tuple[str, int]] = field(default_factory=list)


def digest(path: Path) -> str:
    """As the hub names files: large ones by their SHA-256, others as git does."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Serve a folder as `REPOSITORY` at `COMMIT`, to a hub library whose cache is empty."""
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            if hub.gated:
                self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
            elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
                names = sorted(p.name for p in hub.folder.iterdir())
                about = {
                    "id": REPOSITORY,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": name} for name in names],
                }
                self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
            elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                entries = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": digest(p)}
                    for p in sorted(hub.folder.iterdir())
                ]
                self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
            elif path.startswith(f"/{REPOSITORY}/resolve/"):
                self._file(hub.folder / path.rpartition("/")[2], body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def _file(self, path: Path, body: bool) -> None:
            data = path.read_bytes()
            headers = {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if path.name == hub.damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
            start = 0
            if self.headers.get("Range"):
                start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if body and path.name == hub.cut:
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start : len(data) // 2])
                self.close_connection = True
                return
            self._send(206 if start else 200, data[start:], headers, body)

        def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)
                hub.served.append((self.path, len(data)))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
