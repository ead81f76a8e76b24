"""A server in a thread of the test's own process, at a free port."""

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from retro_jax.serve.app import Server
from tests.ports import free_port


@contextlib.contextmanager
def listening(server: Server) -> Iterator[str]:
    """Runs a server's application; gives its address, and stops it in order."""
    port = free_port()
    config = uvicorn.Config(server.app, host="127.0.0.1", port=port, log_level="warning")
    listener = uvicorn.Server(config)
    thread = threading.Thread(target=listener.run, daemon=True)
    thread.start()
    while not listener.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        listener.should_exit = True
        thread.join()
