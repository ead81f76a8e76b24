"""The processes of one run: which of them this is, and errors and answers that all of them share.

A process that fails alone leaves the others waiting in their next collective. Whatever can fail in
one process only (a disk, a file, a setting of one host) is therefore done under `together`.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from retro_jax.errors import SharedError, UserError, describe

_BYTES = 1024  # of a message that is shared

T = TypeVar("T")


def name() -> str:
    """As in "process 1 of 4"; empty where there is only one."""
    count = jax.process_count()
    return f"process {jax.process_index()} of {count}" if count > 1 else ""


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def together(action: Callable[[], T]) -> T:
    """Runs an action in every process; where it fails in one, all of them raise.

    Args:
      action: without collectives of its own.

    Returns:
      What it returned in this process.

    Raises:
      SharedError: it raised a UserError or an OSError in some process; the message is this
        process's own, or names the first one that failed. With one process: that error itself.
    """
    if jax.process_count() == 1:
        return action()
    failure, result = None, None
    try:
        result = action()
    except (UserError, OSError) as error:
        failure = error
    told = _exchange("" if failure is None else describe(failure) or repr(failure))
    if failure is not None:
        raise SharedError(describe(failure)) from failure
    for process, message in enumerate(told):
        if message:
            raise SharedError(f"process {process} failed: {message}")
    return result  # type: ignore[return-value]


def from_first(action: Callable[[], str]) -> str:
    """Runs an action in the first process only; its result, up to a kilobyte, is known to all.

    Raises:
      SharedError: as `together`.
    """
    if jax.process_count() == 1:
        return action()
    answer = together(lambda: action() if is_first() else "")
    return _exchange(answer)[0]


def _exchange(text: str) -> list[str]:
    """What each process says, by its number."""
    encoded = text.encode()[:_BYTES].ljust(_BYTES, b"\0")
    gathered = multihost_utils.process_allgather(np.frombuffer(encoded, np.uint8))
    rows = np.asarray(gathered).reshape(-1, _BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
