"""Runs a stage's shards: here, over local processes, or on a Ray cluster. Same bytes whichever it is.

A shard's work is a picklable callable from the shard to whatever the stage wants back; it writes its
own files into directories that every worker sees. Nothing is shared between shards, and a file that is
there is whole, so a worker may be killed at any moment: what it had not finished is done again.
"""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from retro_jax.config import require
from retro_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Work that runs faster on an accelerator has this attribute, set to True; Ray asks for one then.
WANTS_ACCELERATOR = "wants_accelerator"
_AHEAD = (
    8  # tasks in flight for each process: few, as all of them are looked at whenever one is done
)


class Runner(Protocol):
    """Where shards are made.

    Attributes:
      threads: how many threads the work of one shard may use.
      in_process: whether work runs in the process that asks for it, one shard after the other.
    """

    @property
    def threads(self) -> int: ...

    @property
    def in_process(self) -> bool: ...

    def run(
        self, work: Callable[[Item], Result], shards: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Runs `work` on every shard and yields each with its result as it finishes.

        Args:
          work: called with one shard. It must be picklable, unless it runs in this process: a function
            of a module, or an instance of a module's class. A worker unpickles it once, so what it
            opens is open for the next shard too.
          shards: what is still missing.

        Raises:
          UserError: workers were killed again and again; what other shards wrote stays.
          Exception: whatever `work` raised first; shards not begun by then are not run.
        """
        ...


@dataclasses.dataclass(frozen=True)
class InProcess:
    """In this process, in the order given."""

    @property
    def threads(self) -> int:
        """All cores."""
        return os.cpu_count() or 1

    @property
    def in_process(self) -> bool:
        """Yes."""
        return True

    def run(
        self, work: Callable[[Item], Result], shards: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """As `Runner.run`."""
        for shard in shards:
            yield shard, work(shard)


@dataclasses.dataclass(frozen=True)
class LocalProcesses:
    """Over fresh interpreters on this machine (spawn), which finish in any order.

    Attributes:
      processes: how many at once; never more than there are shards.
      retries: how often in a row a new set of workers takes over after one was killed, while no shard
        gets done.
    """

    processes: int
    retries: int = 3

    def __post_init__(self) -> None:
        require(self.processes > 0, self, "processes", "a positive number")
        require(self.retries >= 0, self, "retries", "a number")

    @property
    def threads(self) -> int:
        """This worker's share of the cores."""
        return max(1, (os.cpu_count() or 1) // self.processes)

    @property
    def in_process(self) -> bool:
        """No."""
        return False

    def run(
        self, work: Callable[[Item], Result], shards: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """As `Runner.run`."""
        queue, killed = dict.fromkeys(range(len(shards))), 0
        while queue:
            try:
                for i, result in self._run_once(work, shards, list(queue)):
                    del queue[i]
                    killed = 0
                    yield shards[i], result
            except BrokenProcessPool as error:
                killed += 1
                if killed > self.retries:
                    raise UserError(
                        f"worker processes were killed {killed} times in a row (out of memory?): run"
                        " again to make the missing shards"
                    ) from error

    def _run_once(
        self, work: Callable[[Item], Result], shards: Sequence[Item], queue: Sequence[int]
    ) -> Iterator[tuple[int, Result]]:
        """Runs the shards that are left, until they are done or a worker dies."""
        pool = concurrent.futures.ProcessPoolExecutor(
            min(self.processes, len(queue)),
            multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(pickle.dumps(work),),
        )
        rest = iter(queue)
        most = _AHEAD * self.processes
        try:
            pending = {pool.submit(_call, shards[i]): i for i in itertools.islice(rest, most)}
            while pending:
                done, _ = concurrent.futures.wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
                for i in itertools.islice(rest, most - len(pending)):
                    pending[pool.submit(_call, shards[i])] = i
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_counted(
    runner: Runner,
    work: Any,
    missing: Sequence[int],
    sizes: Sequence[int],
    *,
    what: str,
    unit: str,
    logged: bool = True,
) -> None:
    """Runs a stage's missing shards under a progress bar.

    Args:
      runner: where.
      work: called with a shard's number, and in this process with `report=` too: a function that it
        calls with how much more is done.
      missing: numbers of the shards that are not there.
      sizes: how much each shard of the stage is, done or not.
      what, unit: labels of the bar.
      logged: show it also where the output is no terminal.
    """
    done = sum(sizes) - sum(sizes[i] for i in missing)
    hidden = True if not missing else False if logged else None  # None: by the output
    with tqdm(total=sum(sizes), initial=done, desc=what, unit=unit, disable=hidden) as bar:
        if runner.in_process:
            for i in missing:
                work(i, report=bar.update)
        else:
            for i, _ in runner.run(work, missing):
                bar.update(sizes[i])


def silent(count: int) -> None:
    """The `report` of work whose progress nobody follows."""


_work: list[Callable[[Any], Any]] = []  # of this worker


def _begin_worker(work: bytes) -> None:
    """Unpickles the work of a worker once: what it opens and loads stays for its next shards."""
    _die_with_parent()
    try:
        _work[:] = [pickle.loads(work)]
    except Exception as error:  # a file that is gone: said by the first shard, as its own error
        _work[:] = [_Refusal(error)]


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """In place of work that could not be unpickled."""

    error: Exception

    def __call__(self, shard: Any) -> Any:
        """Raises the error."""
        raise self.error


def _call(shard: Any) -> Any:
    """The body of every task."""
    return _work[0](shard)


def _die_with_parent() -> None:
    """Ends this worker when the process that started it is gone, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
