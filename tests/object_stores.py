"""Object stores on this machine for tests: S3 (moto) and GCS (gcp-storage-emulator), and bad networks.

    with object_stores.s3() as url:                     # "s3://bucket"
    with object_stores.gcs(faults=Faults(0.2)) as url:  # "gs://bucket", a fifth of the requests go wrong

The servers run in threads; the environment says where they are, for subprocesses too.
"""

import contextlib
import dataclasses
import http.client
import http.server
import logging
import os
import random
import threading
import time
import urllib.request
from collections.abc import Iterator

import fsspec
import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
    "false"  # asks for Google's own servers; read at import
)
BUCKET = "bucket"
KINDS = ("refused", "slow", "request cut", "answer lost", "answer cut")
DENIED = "denied"  # whoever asks has no permission; passes with no time, and is no part of KINDS
_NO_PERMISSION = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclasses.dataclass
class Faults:
    """What goes wrong between a client and a store.

    Attributes:
      share: of the requests, from 0 to 1. kinds: which of KINDS, or DENIED. happened: how often.
    """

    share: float
    kinds: tuple[str, ...] = KINDS
    seed: int = 0

    def __post_init__(self) -> None:
        self.happened = dict.fromkeys(self.kinds, 0)
        self._random = random.Random(self.seed)

    def draw(self) -> str:
        """The next request's fault; empty for none."""
        if self._random.random() >= self.share:
            return ""
        kind = self._random.choice(self.kinds)
        self.happened[kind] += 1
        return kind


@contextlib.contextmanager
def s3(faults: Faults | None = None) -> Iterator[str]:
    """The url of a bucket in a new S3 server."""
    from moto.moto_api._internal import moto_api_backend
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    moto_api_backend.reset()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    urllib.request.urlopen(request).close()
    variables = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    variables |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}
    try:
        with _network(port, faults) as shown:
            variables["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{shown}"
            with _environment(variables):
                yield f"s3://{BUCKET}"
    finally:
        server.stop()


@contextlib.contextmanager
def gcs(faults: Faults | None = None) -> Iterator[str]:
    """The url of a bucket in a new GCS server."""
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    port = server._api._httpd.server_address[1]
    variables = {}
    try:
        with _network(port, faults) as shown:
            variables["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{shown}"
            with _environment(variables):
                yield f"gs://{BUCKET}"
    finally:
        server.stop()


STORES = {"s3": s3, "gcs": gcs}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables, and makes fsspec forget the stores of before."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for protocol in ("s3", "gs"):
            fsspec.get_filesystem_class(protocol).clear_instance_cache()
        yield


@contextlib.contextmanager
def _network(port: int, faults: Faults | None) -> Iterator[int]:
    """The port under which a server is seen: its own, or that of a bad network."""
    if faults is None:
        yield port
        return

    class Handler(_BadNetwork):
        """Of this server and these faults."""

        target, drawn = port, faults

    proxy = _Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy.server_address[1]
    finally:
        proxy.shutdown()
        proxy.server_close()


class _Quiet(http.server.ThreadingHTTPServer):
    """Says nothing of clients that have gone, as killed ones have."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Nothing."""


class _BadNetwork(http.server.BaseHTTPRequestHandler):
    """Hands requests on, or does not."""

    protocol_version = "HTTP/1.1"
    target: int
    drawn: Faults

    def _handle(self) -> None:
        """One request."""
        body, fault = self._body(), self.drawn.draw()
        if fault == "refused":
            self.send_response(503, "Slow Down")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == DENIED:
            self.send_response(403, "Forbidden")
            self.send_header("Content-Length", str(len(_NO_PERMISSION)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else _NO_PERMISSION)
            return
        if fault == "slow":
            time.sleep(0.2)
        if fault == "request cut":
            self.close_connection = True
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.target)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "answer lost":
            self.close_connection = True
            return
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if fault == "answer cut" and content:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _handle  # noqa: N815

    def _body(self) -> bytes:
        """What the client sent."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, *_: object) -> None:
        """Nothing."""
