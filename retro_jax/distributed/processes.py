"""The processes of one run: which of them this is, and errors and answers that all of them share.

A process that fails alone leaves the others waiting in their next collective. Whatever can fail in
one process only (a disk, a file, a setting of one host) is therefore done under `together`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retro_jax.errors import LostPeerError, SharedError, UserError, describe

_BYTES = 1024  # of a message that is shared
# Words in the runtime's errors when a process is lost: of CPU, GPU and the coordination service.
_SIGNS_OF_LOSS = (
    *("gloo", "nccl", "connection", "heartbeat", "barrier"),
    *("unavailable", "aborted", "cancelled", "deadline"),
)
_DAY = 24 * 3600  # seconds
_meetings: dict[str, int] = {}  # how often this process met the others, by occasion

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
      Its result in this process.

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
    meet("together")  # a collective would give the slowest of them half a minute only
    messages = _exchange("" if failure is None else describe(failure) or repr(failure))
    if failure is not None:
        raise SharedError(describe(failure)) from failure
    for process, message in enumerate(messages):
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


def first_answer(action: Callable[[], str]) -> str:
    """Runs an action in every process; the first text that is not empty is known to all.

    Raises:
      SharedError: as `together`.
    """
    if jax.process_count() == 1:
        return action()
    return next(filter(None, _exchange(together(action))), "")


def as_first(answers: Sequence[bool]) -> list[bool]:
    """The first process's answers, where all of them asked (which files are there)."""
    if jax.process_count() == 1 or not answers:
        return list(answers)
    shared = multihost_utils.broadcast_one_to_all(np.array(answers, np.int32))
    return [bool(answer) for answer in np.asarray(shared)]


def client() -> Any:
    """The coordination service's client, which has no public name in JAX."""
    from jax._src import distributed

    return distributed.global_state.client


def meet(occasion: str) -> None:
    """Waits until all processes are here, for up to a day, without the devices.

    Raises:
      LostPeerError: one of them was lost meanwhile.
    """
    if jax.process_count() == 1:
        return
    number = _meetings[occasion] = _meetings.get(occasion, 0) + 1
    with noticing_loss():
        client().wait_at_barrier(f"retro/{occasion}/{number}", _DAY * 1000)


def after_all(occasion: str, action: Callable[[], None]) -> None:
    """Waits until all processes are here, then runs an action in the first; without the devices.

    Threads may call it beside the training: every process the same number of times.

    Raises:
      SharedError: the action raised a UserError or an OSError; all processes have its message.
      LostPeerError: another process was lost meanwhile.
    """
    if jax.process_count() == 1:
        action()
        return
    meet(occasion)
    place = f"retro/{occasion}/{_meetings[occasion]}/outcome"
    if is_first():
        message = ""
        try:
            action()
        except (UserError, OSError) as error:
            message = describe(error) or repr(error)
        client().key_value_set(place, f"-{message}"[:_BYTES])
    with noticing_loss():
        message = client().blocking_key_value_get(place, _DAY * 1000)[1:]
    if message:
        raise SharedError(message)


def everyone(value: int) -> list[int]:
    """The numbers of all processes, by process."""
    if jax.process_count() == 1:
        return [value]
    gathered = multihost_utils.process_allgather(np.array([value], np.int32))
    return [int(number) for number in np.asarray(gathered).reshape(-1)]


def connect(mesh: Mesh) -> None:
    """Lets the devices of all processes find each other, along every set of mesh axes.

    Processes take different times to compile. A first connection at the start of a step gives the
    slowest no more than half a minute (Gloo); here they come at about the same time.
    """
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    if jax.process_count() == 1 or not axes:
        return
    meet("connect")
    shape = tuple(mesh.shape[axis] for axis in axes)
    together = NamedSharding(mesh, PartitionSpec(*axes))
    ones = jax.make_array_from_callback(shape, together, lambda i: np.ones(shape, np.float32)[i])
    numbers = range(len(axes))
    sets = [s for n in numbers for s in itertools.combinations(numbers, n + 1)]
    with jax.set_mesh(mesh):
        jax.block_until_ready(jax.jit(lambda x: [jnp.sum(x, axis=s) for s in sets])(ones))


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns the runtime's error when another process goes into a line.

    Raises:
      LostPeerError: a collective inside failed for want of another process.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error)
        if jax.process_count() == 1 or not any(sign in reason.lower() for sign in _SIGNS_OF_LOSS):
            raise
        raise LostPeerError(
            f"a collective failed ({reason.splitlines()[0]}): another process was lost, see what it said "
            "last; start all of them again, and the run goes on from its last checkpoint"
        ) from error


def _exchange(text: str) -> list[str]:
    """The message of each process, by its number."""
    encoded = text.encode()[:_BYTES].ljust(_BYTES, b"\0")
    with noticing_loss():
        gathered = multihost_utils.process_allgather(np.frombuffer(encoded, np.uint8))
    rows = np.asarray(gathered).reshape(-1, _BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
