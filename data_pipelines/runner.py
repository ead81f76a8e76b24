"""Runs a stage's shards: here, one after the other, or over local processes. Same bytes either way.

A shard's work is a picklable callable from the shard's name to whatever the stage wants back; it writes
its own files. Nothing is shared between shards, so where they run cannot matter.
"""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from retro_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_shards(
    work: Callable[[Item], Result], shards: Sequence[Item], *, processes: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Runs `work` on every shard and yields each with its result as it finishes.

    Args:
      work: called with one shard. With several processes it must be picklable: a function of a
        module or a frozen dataclass with __call__.
      shards: what is still missing.
      processes: 1 runs in this process, in the order given; more start fresh interpreters (spawn),
        never more of them than shards, and finish in any order.

    Raises:
      UserError: a worker process was killed; what other shards wrote stays.
      Exception: whatever `work` raised first; shards not begun by then are not run.
    """
    if processes < 1:
        raise UserError(f"processes is {processes}: expected a positive number")
    processes = min(processes, len(shards))
    if processes <= 1:
        for shard in shards:
            yield shard, work(shard)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_die_with_parent
    )
    try:
        pending = {pool.submit(work, shard): shard for shard in shards}
        for future in concurrent.futures.as_completed(pending):
            yield pending[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory?): run again to make the missing shards"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    """Ends this worker when the process that started it is gone, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
