"""Checkpoints whose place is a bucket: written in parts, and sealed there once all parts have come.

    1. each process copies its shards from the devices; training goes on
    2. each writes its part to its own folder (STEP.unpublished), hashes it, and copies it to the bucket
    3. when all have, the first process checks that nothing is missing and writes sealed.json: the commit
    4. the first process removes what need not be kept, seals before parts; each its part here

A checkpoint without a seal is none, so a run killed at any moment leaves whole ones only. Where the
bucket cannot be written, training goes on, and the last state stays in the process's folder: the next
start on the same hosts copies it first.
"""

import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from retro_jax.distributed import processes
from retro_jax.errors import LostPeerError, UserError
from retro_jax.storage import files
from retro_jax.storage.buckets import Bucket
from retro_jax.train import parts, sealed_parts
from retro_jax.train.checkpoint import (
    describe_arrays,
    find_damage,
    latest_step,
    restore_state,
    saved_arrays,
    warn_damaged,
)
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.parts import PARTS
from retro_jax.train.sealed_parts import REMOTE, SEAL
from retro_jax.train.step import TrainState

UNPUBLISHED = ".unpublished"
_ARRAYS_FILE = "arrays.json"

_logger = logging.getLogger(__name__)


class BucketCheckpoints:
    """The checkpoints of one training run in a bucket; train.checkpoint.Checkpoints has the same methods.

    Attributes:
      directory: of this process, with the seals of the bucket's checkpoints and the lists of their parts.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        bucket: Bucket,
        place: str,
        before_seal: Callable[[], Any] = lambda: None,
        keep: int = 3,
        keep_every: int = 0,
        left_out: Callable[[str], bool] | None = None,
    ):
        """Opens the directory; copies what an earlier start could not.

        Args:
          directory: as `fetch_seals` filled it; every process has its own.
          bucket, place: where the checkpoints are, as in gs://B/W and "retro/checkpoints".
          before_seal: copies the run's other files to the bucket, so that none is older than a checkpoint.
          keep, keep_every, left_out: as Checkpoints has them.

        Raises:
          UserError: the bucket cannot be written.
        """
        self.directory = pathlib.Path(directory).absolute()
        self._bucket, self._place, self._before_seal = bucket, place, before_seal
        self._keep, self._keep_every = keep, keep_every
        self._left_out = left_out or (lambda name: False)
        self._attempt = processes.from_first(lambda: os.urandom(4).hex())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._unpublished: int | None = None
        with files.writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._publish_left()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sealed_steps(self._bucket.list(self._place))

    def save(self, state: TrainState) -> None:
        """Starts writing the state under its step, once the write before it has ended.

        Raises:
          UserError: this host's disk cannot be written. LostPeerError: another process is lost.
        """
        self._join()
        if self._error is not None and self._kept is None:
            self._raise()
        leaves = {n: leaf for n, leaf in named_leaves(state).items() if not self._left_out(n)}
        arrays, shards, step = describe_arrays(leaves), parts.snapshot(leaves), int(state.step)
        self._unpublished, self._error = step, None

        def write() -> None:
            try:
                self._publish(step, self._write(step, arrays, shards))
            except BaseException as error:  # raised, or reported, by the thread that waits
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether the last save is not in the bucket yet."""
        return self._thread is not None and self._thread.is_alive()

    def must_stop(self, step: int, signalled: bool) -> bool:
        """As Checkpoints.must_stop."""
        if jax.process_count() == 1:
            return signalled
        return multihost_utils.reached_preemption_sync_point(step)

    def wait(self) -> None:
        """Waits until the last save is in the bucket.

        Raises:
          UserError: it could not be written; says where the state is kept.
        """
        self._join()
        if self._error is not None:
            self._raise()

    def close(self) -> None:
        """Waits for the last write; `wait` has reported what went wrong, or another error is on its way."""
        self._join()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """As Checkpoints.restore; each process reads what its devices need."""
        while True:
            step = processes.from_first(lambda: str(latest_step(self.directory) or ""))
            if not step:
                return None
            path = self.directory / step
            problem = processes.from_first(lambda: find_damage(path) or "")  # noqa: B023
            if not problem:
                there = saved_arrays(self.directory, int(step))
                known = {n for n in named_leaves(abstract) if self._left_out(n) and n not in there}
                try:
                    return restore_state(path, abstract, known)
                except UserError as error:
                    problem = parts.damage_in(error)
                    if not problem:
                        raise
            self._set_aside(int(step), problem)

    def _write(self, step: int, arrays: dict[str, Any], shards: list) -> UserError | None:
        """Writes this process's part to its own disk; returns what went wrong, as the others wait."""
        folder = self.directory / f"{step}{UNPUBLISHED}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            parts.write(folder, f"{self._attempt}-{jax.process_index():05d}", shards)
            about = {
                "arrays": arrays,
                "processes": jax.process_count(),
                "attempt": self._attempt,
            }
            files.write_atomically(folder / _ARRAYS_FILE, files.to_json(about))  # last: it is whole
        except UserError as error:
            return error
        for older in self.directory.glob(f"*{UNPUBLISHED}"):
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)
        return None

    def _publish(self, step: int, failure: UserError | None = None) -> None:
        """Copies this process's part, and seals all of them; raises a failure once all have met."""
        folder, place = self.directory / f"{step}{UNPUBLISHED}", f"{self._place}/{step}"

        def seal() -> None:
            if failure is not None:
                raise failure
            self._seal(folder, place)

        if failure is None:
            try:
                for path in sorted((folder / PARTS).iterdir()):  # .bin before .json
                    self._bucket.put(path, f"{place}/{PARTS}/{path.name}")
            except UserError as error:
                failure = error
        try:
            processes.after_all("seal", seal)
        except UserError as error:
            raise failure or error from error
        if processes.is_first():
            try:
                _bring_step(self._bucket, place, self.directory / str(step))
                self._remove_old(step)
            except UserError as error:  # the checkpoint is whole; the next one removes more
                _logger.warning("%s", error)
        shutil.rmtree(folder, ignore_errors=True)
        self._unpublished = None

    def _seal(self, folder: pathlib.Path, place: str) -> None:
        """Adds the seal, if every process's part is there."""
        about = files.read_json(folder / _ARRAYS_FILE)
        found, indexes = self._bucket.details(f"{place}/{PARTS}"), {}
        for process in range(about["processes"]):
            name = f"{PARTS}/{about['attempt']}-{process:05d}.json"
            data = self._bucket.read(f"{place}/{name}")
            if data is None:
                raise UserError(f"{self._bucket.url}/{place} lacks the part of process {process}")
            indexes[name] = data
        sizes = {f"{PARTS}/{name}": size for name, (size, _) in found.items()}
        seal = sealed_parts.make_seal(about["arrays"], indexes, sizes)
        self._before_seal()
        self._bucket.write(f"{place}/{SEAL}", seal)

    def _remove_old(self, newest: int) -> None:
        """Removes what is not kept: the seal first, so that half a checkpoint is none."""
        names = self._bucket.list(self._place)
        sealed = sealed_steps(names)
        kept = set(sealed[-self._keep :])
        kept |= {s for s in sealed if self._keep_every and s % self._keep_every == 0}
        there = {int(name.split("/")[0]) for name in names if name.split("/")[0].isdecimal()}
        for step in sorted(s for s in there - kept if s < newest):
            if step in sealed:
                self._bucket.remove(f"{self._place}/{step}/{SEAL}")
            self._bucket.remove(f"{self._place}/{step}")
            shutil.rmtree(self.directory / str(step), ignore_errors=True)

    def _publish_left(self) -> None:
        """Copies what an earlier start wrote here and could not copy, if it is newer than all there."""
        left = list(self.directory.glob(f"*{UNPUBLISHED}/{_ARRAYS_FILE}"))
        newest = max((int(p.parent.name.removesuffix(UNPUBLISHED)) for p in left), default=-1)
        steps = processes.everyone(newest)
        reached = latest_step(self.directory)
        if min(steps) == max(steps) > (-1 if reached is None else reached):
            self._unpublished = newest
            try:
                self._publish(newest)
            except UserError as error:
                self._error = error
                self._raise()
            _logger.warning("%s: step %d, kept here, is in the bucket now", self.directory, newest)
        for path in left:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _set_aside(self, step: int, problem: str) -> None:
        """Takes the seal from a damaged checkpoint, with a warning; its step can be written again."""
        place = f"{self._place}/{step}"
        if processes.is_first():
            warn_damaged(self.directory / str(step), problem)
            seal = self._bucket.read(f"{place}/{SEAL}")
            self._bucket.write(f"{self._place}/{step}.damaged/{SEAL}", seal or b"")
            self._bucket.remove(f"{place}/{SEAL}")
        shutil.rmtree(self.directory / str(step), ignore_errors=True)

    def _join(self) -> None:
        """Waits for the thread that writes; a bucket that cannot be written is a warning as yet."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None and self._kept is not None:
            _logger.warning(
                "%s; the state is kept in %s, and training goes on", self._error, self._kept
            )

    @property
    def _kept(self) -> pathlib.Path | None:
        """Where this process keeps its part of the last state, if the bucket lacks that."""
        lost = not isinstance(self._error, UserError) or isinstance(self._error, LostPeerError)
        folder = self.directory / f"{self._unpublished}{UNPUBLISHED}"
        return None if lost or not (folder / _ARRAYS_FILE).is_file() else folder

    def _raise(self) -> None:
        """Raises the error of the last write, with the place of its state."""
        error, kept = self._error, self._kept
        assert error is not None
        if kept is None:
            raise error
        raise UserError(
            f"{error}; step {self._unpublished} is kept in {kept}: the same command on the same"
            " hosts goes on from it"
        ) from error


def fetch_seals(bucket: Bucket, place: str, directory: pathlib.Path, names: list[str]) -> None:
    """Makes a directory of checkpoints say what a bucket has, without the arrays.

    Checkpoints of a run that was copied to the bucket, or mirrored, are brought whole.

    Args:
      bucket, place: where the checkpoints are. directory: of this process; steps that are not there
        any more are removed from it. names: of all objects below the place.
    """
    steps = sealed_steps(names)
    for path in directory.glob("*"):
        if path.name.isdecimal() and int(path.name) not in steps:
            shutil.rmtree(path, ignore_errors=True)
    for step in steps:
        path = directory / str(step)
        if _bring_step(bucket, f"{place}/{step}", path):
            continue
        for name in names:
            if name.startswith(f"{step}/") and not (directory / name).is_file():
                bucket.get(f"{place}/{name}", directory / name)


def sealed_steps(names: list[str]) -> list[int]:
    """The steps whose checkpoints are whole, of names below a run's checkpoints, oldest first."""
    found = [name.split("/") for name in names]
    return sorted(int(p[0]) for p in found if len(p) == 2 and p[1] == SEAL and p[0].isdecimal())


def _bring_step(bucket: Bucket, place: str, path: pathlib.Path) -> bool:
    """Brings the seal of a checkpoint; whether its parts may follow when they are read."""
    seal = bucket.read(f"{place}/{SEAL}")
    here = path / SEAL
    if seal is None or (here.is_file() and here.read_bytes() != seal):
        shutil.rmtree(path, ignore_errors=True)
    if seal is None:
        return True
    with files.writing(path):
        path.mkdir(parents=True, exist_ok=True)
    in_parts = sealed_parts.is_in_parts(seal)
    if in_parts:
        files.write_atomically(path / REMOTE, sealed_parts.describe_remote(bucket, place))
    files.write_atomically(here, seal)
    return in_parts
