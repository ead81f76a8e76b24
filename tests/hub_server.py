"""A Hugging Face hub on this machine for tests: one data set, by the part of the file API that reading needs.

with hub_server.hub({"data/a.jsonl": b"..."}) as hub:        # hf://datasets/someone/corpus/data
    hub.files["data/b.jsonl"] = b"..."

GET   /api/datasets/REPO[/revision/REV]         the repository is there
POST  /api/datasets/REPO/paths-info/REV         sizes of some paths
GET   /api/datasets/REPO/tree/REV/FOLDER        a folder's entries, or all below it
GET   /datasets/REPO/resolve/REV/PATH           bytes of a file, or a range of them
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

REPOSITORY, REVISION = "someone/corpus", "main"
URL = f"hf://datasets/{REPOSITORY}"
_SHA = "5" * 40


@dataclasses.dataclass
class Hub:
    """The server's state.

    Attributes:
      files: of the data set, by path.
      requests: methods and paths so far.
      refused: so many requests for files are answered with status 503 before one is served.
      token: that requests must carry; None for a public data set.
    """

    files: dict[str, bytes]
    requests: list[str] = dataclasses.field(default_factory=list)
    refused: int = 0
    token: str | None = None

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The files and folders in a folder, as the tree has them."""
        inside, found = f"{folder}/" if folder else "", dict[str, dict[str, Any]]()
        for path, data in self.files.items():
            if not path.startswith(inside):
                continue
            parts = path[len(inside) :].split("/")
            for end in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                name = inside + "/".join(parts[:end])
                found[name] = {"type": "directory", "oid": _oid(name.encode()), "path": name}
            if recursive or len(parts) == 1:
                found[path] = _file(path, data)
        return [found[path] for path in sorted(found, reverse=True)]  # the order is anybody's


def _oid(data: bytes) -> str:
    """A number like that of git."""
    return hashlib.sha1(data).hexdigest()


def _file(path: str, data: bytes) -> dict[str, Any]:
    """A file's entry."""
    return {"type": "file", "oid": _oid(data), "size": len(data), "path": path}


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests of huggingface_hub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self._answer()

    def do_GET(self) -> None:
        """A repository, a folder or a file."""
        self._answer()

    def do_POST(self) -> None:
        """Sizes of paths."""
        self._answer()

    def _answer(self) -> None:
        """Finds what the path is about."""
        url = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.hub.requests.append(f"{self.command} {url.path}")
        path = urllib.parse.unquote(url.path)
        wanted = self.hub.token and f"Bearer {self.hub.token}"
        if wanted and self.headers.get("Authorization") != wanted:
            return self._fail(401, "RepoNotFound", "Invalid username or password.")
        api, files = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{REVISION}/"
        if not path.startswith((api, files)):
            return self._fail(404, "RepoNotFound", "Repository not found")
        if path in (api, f"{api}/revision/{REVISION}"):
            return self._json({"id": REPOSITORY, "sha": _SHA, "private": False, "tags": []})
        if path.startswith(f"{api}/revision/"):
            return self._fail(404, "RevisionNotFound", "Invalid rev id")
        if path == f"{api}/paths-info/{REVISION}":
            return self._paths(body)
        folder = re.fullmatch(rf"{api}/tree/{REVISION}/?(.*)", path)
        if folder:
            recursive = urllib.parse.parse_qs(url.query).get("recursive", ["False"])[0]
            entries = self.hub.entries(folder[1].strip("/"), recursive.lower() in ("true", "1"))
            if entries:
                return self._json(entries)
        if path.removeprefix(files) in self.hub.files:
            return self._bytes(self.hub.files[path.removeprefix(files)])
        return self._fail(404, "EntryNotFound", "Entry not found")

    def _paths(self, body: str) -> None:
        """The entries of some paths; paths that are not there have none."""
        given = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(body)["paths"] if given else urllib.parse.parse_qs(body)["paths"]
        every = {entry["path"]: entry for entry in self.hub.entries("", recursive=True)}
        self._json([every[path] for path in paths if path in every])

    def _bytes(self, data: bytes) -> None:
        """A file, or a range of its bytes."""
        if self.hub.refused:
            self.hub.refused -= 1
            return self._fail(503, "", "Service Unavailable")
        status, headers = 200, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": _SHA}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        self._send(status, data, headers)

    def _json(self, value: Any) -> None:
        """An answer of the API."""
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str) -> None:
        """An error as the hub names it."""
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        """An answer."""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub that huggingface_hub of this process, and of processes that it starts, asks."""
    from huggingface_hub import HfFileSystem, constants

    state = Hub(files)
    handler = type("Handler", (_Handler,), {"hub": state})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_ENDPOINT", endpoint)
            patch.delenv("HF_TOKEN", raising=False)
            patch.setitem(os.environ, "HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
            for name in ("HUGGINGFACE_CO_URL_TEMPLATE", "ENDPOINT"):  # read at import
                value = getattr(constants, name)
                new = value.replace(constants.ENDPOINT, endpoint)
                patch.setattr(constants, name, new)
            yield state
    finally:
        HfFileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()
