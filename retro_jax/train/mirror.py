"""A run's directory kept in a bucket as well, for hosts whose disks go away with them.

    python -m launch.train ... --mirror=gs://B/runs/W

Checkpoints are written to W as usual. Once one is complete there, the first process copies it, its
seal last, with the run's other files. Files removed from W are removed from the bucket too. A run
that starts in an empty or older W first brings the newest complete checkpoint back. Only the end of
the run waits for the copies.
"""

import contextlib
import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Protocol

from retro_jax.distributed import processes
from retro_jax.storage import files
from retro_jax.train.checkpoint import CHECKPOINTS, SEAL, find_damage, latest_step, set_aside
from retro_jax.train.following import following as files_following

_SECONDS = 10.0  # between looks for new files
_FETCHED = "orbax-checkpoint-tmp-fetched"  # a name that Orbax removes when a copy was cut short

_logger = logging.getLogger(__name__)


class Bucket(Protocol):
    """A place in a bucket; its errors are UserErrors."""

    @property
    def url(self) -> str:
        """Of the place."""

    def list(self, place: str) -> list[str]:
        """Names of the files below a folder of the place."""

    def get(self, name: str, path: pathlib.Path) -> None:
        """Copies a file from it."""

    def put(self, path: pathlib.Path, name: str) -> None:
        """Copies a file to it."""

    def remove(self, name: str) -> None:
        """Removes a file or folder."""


def fetch(run: pathlib.Path, bucket: Bucket | None) -> str:
    """Brings the newest complete checkpoint of a run back, if none here is as new and undamaged.

    Args:
      run: the run's directory, whose name it has in the bucket too.
      bucket: the mirror; None for none.

    Returns:
      A line about it; empty where nothing was brought.

    Raises:
      UserError: the bucket cannot be read.
    """
    if bucket is None:
        return ""
    names = bucket.list(run.name)
    for step in sorted(_sealed(names), reverse=True):
        if _has_undamaged(run / CHECKPOINTS, step):
            break
        inside = f"{CHECKPOINTS}/{step}/"
        temporary = run / CHECKPOINTS / f"{step}.{_FETCHED}"
        for name in names:
            if name.startswith(inside):
                bucket.get(f"{run.name}/{name}", temporary / name.removeprefix(inside))
        problem = find_damage(temporary)
        if problem is not None:
            _logger.warning("%s/%s/%s is damaged (%s)", bucket.url, run.name, inside, problem)
            shutil.rmtree(temporary)
            continue
        for name in names:
            if "/" not in name:
                bucket.get(f"{run.name}/{name}", run / name)
        temporary.rename(run / CHECKPOINTS / str(step))
        return f"{run}: brought step {step} back from {bucket.url}"
    return ""


def _has_undamaged(checkpoints: pathlib.Path, step: int) -> bool:
    """Whether there is an undamaged checkpoint of a step or a later one; sets damaged ones aside."""
    while (here := latest_step(checkpoints)) is not None and here >= step:
        problem = find_damage(checkpoints / str(here))
        if problem is None:
            return True
        set_aside(checkpoints / str(here), problem)
    return False


@contextlib.contextmanager
def following(run: pathlib.Path, bucket: Bucket | None) -> Iterator[None]:
    """Copies the new files of a run's directory while inside, and all of them at the end.

    Args:
      run: the run's directory. bucket: the mirror; None for none.

    Raises:
      UserError: the last copies cannot be written.
    """
    if bucket is None or not processes.is_first():
        yield
        return
    with files_following(_Copies(run, bucket).update, _SECONDS, name="mirror"):
        yield


class _Copies:
    """The part of a run's directory that a bucket has."""

    def __init__(self, run: pathlib.Path, bucket: Bucket) -> None:
        self._run, self._bucket = run, bucket
        self._steps = _sealed(bucket.list(run.name))
        self._mine: set[int] = set()  # seen here: removed there once they are gone here
        self._files: dict[str, tuple[int, int]] = {}

    def update(self) -> None:
        """Copies new files that are whole."""
        folder = self._run / CHECKPOINTS
        steps = {int(p.parent.name) for p in folder.glob(f"*/{SEAL}") if p.parent.name.isdecimal()}
        for step in sorted(steps - self._steps):
            with contextlib.suppress(FileNotFoundError):  # the run may have removed it
                self._copy_step(folder / str(step))
                self._steps.add(step)
        for step in sorted(self._mine - steps):
            self._bucket.remove(f"{self._run.name}/{CHECKPOINTS}/{step}")
            self._steps.discard(step)
        self._mine = steps & self._steps
        for path in sorted(self._run.glob("*")):
            if path.is_file() and not path.name.startswith(files.TEMPORARY):
                self._copy_file(path)

    def _copy_step(self, path: pathlib.Path) -> None:
        """A checkpoint; its seal, without which it does not count, comes last."""
        paths = [file for file in sorted(path.rglob("*")) if file.is_file()]
        for file in sorted(paths, key=lambda file: file.name == SEAL):
            self._put(file)

    def _copy_file(self, path: pathlib.Path) -> None:
        """A file beside the checkpoints, where it has changed."""
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            state = (status.st_size, status.st_mtime_ns)
            if self._files.get(path.name) != state:
                self._put(path)
                self._files[path.name] = state

    def _put(self, path: pathlib.Path) -> None:
        """Copies one file to its place."""
        name = path.relative_to(self._run).as_posix()
        self._bucket.put(path, f"{self._run.name}/{name}")


def _sealed(names: list[str]) -> set[int]:
    """The steps whose checkpoints are whole, of names in a run's directory."""
    parts = [name.split("/") for name in names]
    return {
        int(p[1])
        for p in parts
        if len(p) == 3 and p[0] == CHECKPOINTS and p[2] == SEAL and p[1].isdecimal()
    }
