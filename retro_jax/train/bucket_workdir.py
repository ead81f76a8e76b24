"""A workdir whose place is a bucket: --workdir=gs://B/W is all that a user has to remember.

    W/retro/config.gin ...      brought to a folder of this host when a command starts, and copied back
                                when they change; before each checkpoint's seal, and at the end
    W/retro/checkpoints/...     seals are brought; arrays are read and written by bucket_checkpoints
    W/evaluation  W/samples     brought, and copied back at the end
    W/chunks  W/index ...       prepared data is staged by data_pipelines, as for --data; what a command
                                adds to it (evaluation texts) is copied back at the end

The folder is below ~/.cache/retro_jax/workdirs and may be removed at any time, unless a message says
that a state is kept there. Commands that train have another than those that read, so that both may run.
"""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import jax

from retro_jax.distributed import processes
from retro_jax.errors import UserError
from retro_jax.storage import files, urls
from retro_jax.storage.buckets import Bucket
from retro_jax.train.bucket_checkpoints import UNPUBLISHED, BucketCheckpoints, fetch_seals
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step
from retro_jax.train.following import following as files_following

CACHE = pathlib.Path("~/.cache/retro_jax/workdirs")
RUNS = ("retro", "baseline")
_RESULTS = ("evaluation", "samples")
_STATES = "states"  # are computed again
_OF_COPIES = ("staged.json",)
_SECONDS = 10.0  # between looks for new files
_VERSIONS = ".versions.json"


class BucketWorkdir:
    """A workdir in a bucket and its folder on this host.

    Attributes:
      url: of it. folder: of this process, with what was brought.
      data: a folder of this host for copies of its prepared data.
    """

    def __init__(self, url: str, purpose: str = "read"):
        """Opens it; connects to nothing yet. After the processes of a run have found each other.

        Args:
          url: as in gs://B/W. purpose: "train", or "read" for commands that only add results.

        Raises:
          UserError: nobody knows the protocol, or its package is not installed.
        """
        self.bucket = Bucket(url)
        self.url = self.bucket.url
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", self.url)
        mine = f"{purpose}-{jax.process_index()}"
        self.folder = CACHE.expanduser().absolute() / name / mine
        self.data = self.folder.parent / "data"
        self._returns_data = purpose == "read"
        self._copied: dict[str, tuple[int, int]] = {}
        self._updating = threading.Lock()

    def bring(self, *, must_exist: bool = False) -> pathlib.Path:
        """Brings records, curves, results and seals; removes from the folder what the bucket lost.

        Args:
          must_exist: whether an empty place is an error.

        Returns:
          The folder.

        Raises:
          UserError: the bucket cannot be read.
        """
        there = self.bucket.details("")
        if must_exist and not there:
            raise UserError(f"{self.url} is empty or not there: expected a workdir")
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _VERSIONS
        versions = files.read_json(path) if path.is_file() else {}
        for run in RUNS:
            inside = f"{run}/{CHECKPOINTS}/"
            names = [n.removeprefix(inside) for n in there if n.startswith(inside)]
            fetch_seals(self.bucket, inside.rstrip("/"), self.folder / inside, names)
        ahead = {run for run in RUNS if self._is_ahead(run)}
        for name, (size, version) in there.items():
            if not _is_brought(name) or name.split("/")[0] in ahead:
                continue
            here = self.folder / name
            same = version and versions.get(name) == version and here.is_file()
            if not (same and here.stat().st_size == size):
                self.bucket.get(name, here)
                versions[name] = version
        files.write_atomically(path, files.to_json(versions))
        for run in RUNS:
            if run not in ahead and not any(name.startswith(f"{run}/") for name in there):
                shutil.rmtree(self.folder / run, ignore_errors=True)
        self.note()
        return self.folder

    def note(self) -> None:
        """Takes all that is here for what the bucket has: after something was copied from it."""
        self._copied = {name: _state(here) for name, here in self._files()}

    def checkpoints(self, run: str) -> Any:
        """What opens the checkpoints of a run: called with the arguments of train.checkpoint.Checkpoints."""
        return functools.partial(
            BucketCheckpoints,
            bucket=self.bucket,
            place=f"{run}/{CHECKPOINTS}",
            before_seal=self.update,
        )

    def update(self) -> None:
        """Copies files that are new or have changed; a manifest after the files that it names.

        Raises:
          UserError: the bucket cannot be written.
        """
        if not processes.is_first():
            return
        with self._updating:
            changed = [(n, p) for n, p in self._files() if self._copied.get(n) != _state(p)]
            for name, path in sorted(changed, key=lambda pair: pair[1].name == "manifest.json"):
                with contextlib.suppress(FileNotFoundError):
                    state = _state(path)
                    self.bucket.put(path, name)
                    self._copied[name] = state

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Copies changed files while inside, and all of them at the end.

        Raises:
          UserError: they cannot be written, at the start or at the end.
        """
        self.update()
        kept = f"; it is kept in {self.folder}: the same command copies it"
        with files_following(self.update, _SECONDS, name="bucket", kept=kept):
            yield

    def _is_ahead(self, run: str) -> bool:
        """Whether this folder has a later state of a run than the bucket, and so its later curves."""
        here = self.folder / run / CHECKPOINTS
        found = [p.name.removesuffix(UNPUBLISHED) for p in here.glob(f"*{UNPUBLISHED}")]
        reached = latest_step(here)
        newest = max(map(int, found), default=-1)
        return newest > (-1 if reached is None else reached)

    def _files(self) -> list[tuple[str, pathlib.Path]]:
        """The files that belong into the bucket, by name."""
        found = []
        for folder in (self.folder, *([self.data] if self._returns_data else [])):
            for place, folders, names in os.walk(folder):  # silent of what goes away meanwhile
                here = pathlib.Path(place)
                folders[:] = sorted(set(folders) - {CHECKPOINTS})
                paths = [here / name for name in sorted(names)]
                found += [(path.relative_to(folder).as_posix(), path) for path in paths]
        return [(name, path) for name, path in found if _is_copied(name)]


def brought(place: str) -> pathlib.Path:
    """A workdir to read: the directory itself, or what was brought here of one in a bucket.

    Raises:
      UserError: the bucket cannot be read, or has nothing there.
    """
    return (
        BucketWorkdir(place).bring(must_exist=True) if urls.is_url(place) else pathlib.Path(place)
    )


def _is_brought(name: str) -> bool:
    """Whether a file is brought when a command starts."""
    first, _, rest = name.partition("/")
    if not rest:
        return first.endswith((".gin", ".json", ".html")) and not first.startswith(".")
    if first in RUNS:
        return not rest.startswith((f"{CHECKPOINTS}/", "profile/", "events."))
    return first in _RESULTS


def _is_copied(name: str) -> bool:
    """Whether a file of this host, of no checkpoint, belongs into the bucket."""
    parts = name.split("/")
    if (
        any(part.startswith(".") for part in parts)
        or parts[-1] in _OF_COPIES
        or parts[0] == _STATES
    ):
        return False
    return not (parts[0] in RUNS and parts[1] == CHECKPOINTS)


def _state(path: pathlib.Path) -> tuple[int, int]:
    """What changes when a file does; nothing of one that went away."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
