"""Ports for processes that find each other."""

import os
import random
import socket

# Below what the kernel hands out to connections: nobody else takes such a port between the moment
# that it is found free here and the seconds later at which a coordinator listens on it.
_FIRST, _EACH, _WORKERS = 12_000, 500, 32


def free_port() -> int:
    """A port that nothing listens on; test workers draw theirs from parts that do not meet."""
    name = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    first = _FIRST + int(name.removeprefix("gw")) % _WORKERS * _EACH
    for port in random.sample(range(first, first + _EACH), _EACH):
        with socket.socket() as found:
            try:
                found.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port of {first} to {first + _EACH - 1} is free")
