"""The one way to write an artefact, so that a killed run loses nothing. The order of writing:

    stage.json            settings and parents, before anything else
    .shards/NAME.json     one shard's size, hash and facts, after its bytes are safe in a temporary file
    NAME                  the shard, renamed into place
    manifest.json         last; then stage.json and .shards are removed

so a shard under its own name is whole, and a directory with a manifest is complete.
Nothing is deleted on a mismatch.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.artefacts.checks import differences, shortened
from data_pipelines.artefacts.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    RECORDS_FOLDER,
    STAGE_FILE,
    Manifest,
    Parents,
    Path,
    Shard,
)
from retro_jax.errors import UserError
from retro_jax.storage import files


class Stage:
    """The one way to write an artefact: resumable, shard by shard, the manifest last.

        stage = Stage(directory, "keys", settings, {"chunks": (chunks, chunks_directory)})
        if not stage.done:
            for name in stage.missing(names):
                stage.write_array(name, make(name))
            stage.finish({"keys": total}, names)

    Shards may be written by several processes: each needs `Stage.attach(directory)` only.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        settings: Any = None,
        parents: Parents | None = None,
        *,
        claim: bool = True,
    ):
        """Claims the directory, or takes up what an equal stage left there.

        Args:
          directory: made if it is not there.
          kind: the kind of its content.
          settings: a mapping or a dataclass of everything the bytes depend on.
          parents: role -> (manifest, directory) of what it is made from.
          claim: False leaves the directory as it is until `claim` is called, for a stage that
            checks its input before anything is written.

        Raises:
          UserError: the directory has another kind, other settings or other parents (the message says
            which, old -> new), or contains files of no stage.
        """
        self.directory = pathlib.Path(directory)
        self.kind = kind
        self.settings: dict[str, Any] = files.plain(settings or {})
        self.parents = {role: parent.hash for role, (parent, _) in (parents or {}).items()}
        if self.done:
            self._refuse_other(dataclasses.asdict(Manifest.read(self.directory)))
            self._clean()
        elif (self.directory / STAGE_FILE).is_file():
            self._refuse_other(files.read_json(self.directory / STAGE_FILE))
        if claim:
            self.claim()

    def claim(self) -> None:
        """Makes the directory this stage's own, by stage.json; nothing if it is already."""
        if self.done:
            return
        with files.writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        names = {p.name for p in self.directory.iterdir() if not p.name.startswith(files.TEMPORARY)}
        if STAGE_FILE in names:
            self._refuse_other(files.read_json(self.directory / STAGE_FILE))
            return
        if names:
            raise UserError(
                f"{self.directory} holds {min(names)!r} but no {STAGE_FILE}: expected an empty"
                f" directory for the {self.kind} stage"
            )
        fields = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "settings": self.settings,
            "parents": self.parents,
        }
        files.write_atomically(self.directory / STAGE_FILE, files.to_json(fields))

    @classmethod
    def attach(cls, directory: Path) -> "Stage":
        """The unfinished stage of a directory, for a process that writes some of its shards."""
        path = pathlib.Path(directory) / STAGE_FILE
        if not path.is_file():
            raise UserError(f"{path} is missing: expected the directory of an unfinished stage")
        fields = files.read_json(path)
        stage = cls.__new__(cls)
        stage.directory = path.parent
        stage.kind, stage.settings, stage.parents = (
            fields[name] for name in ("kind", "settings", "parents")
        )
        return stage

    @property
    def done(self) -> bool:
        """Whether the manifest is there; then there is nothing to do."""
        return (self.directory / MANIFEST_FILE).is_file()

    @property
    def begun(self) -> bool:
        """Whether the directory is this stage's, finished or not."""
        return self.done or (self.directory / STAGE_FILE).is_file()

    def manifest(self) -> Manifest:
        """The checked manifest of a finished stage."""
        return Manifest.open(self.directory, self.kind)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the shards that are not there yet, in the given order."""
        return [name for name in names if self._record(name) is None]

    def shard_facts(self, name: str) -> Any:
        """The facts that were written with a shard of this unfinished stage."""
        record = self._record(name)
        if record is None:
            raise UserError(f"{self.directory / name} is missing: expected a shard of this stage")
        return record["facts"]

    def write_array(self, name: str, array: np.ndarray, facts: Any = None) -> Shard:
        """Writes one array as a .npy shard; `facts` (plain JSON) wait in `shard_facts` for finish."""
        if not name.endswith(".npy"):
            raise ValueError(f"{name!r}: an array's shard is called *.npy")
        contiguous = np.ascontiguousarray(array)

        def write(file: BinaryIO) -> None:
            np.lib.format.write_array(file, contiguous, version=(1, 0), allow_pickle=False)

        return self.write_file(name, write, facts)

    def write_file(self, name: str, writer: Callable[[BinaryIO], None], facts: Any = None) -> Shard:
        """Writes one shard of any format by `writer(file)`; the rest as `write_array`."""
        self._check_open(name)
        path = self.directory / name
        with files.temporary_name(path) as temporary:
            size, digest = files.write_hashed(temporary, writer)
            return self._publish(temporary, Shard(name, size, digest), facts)

    def write_files(self, writer: Callable[[pathlib.Path], None]) -> list[Shard]:
        """Adopts all files that `writer(folder)` leaves in an empty temporary folder, as shards."""
        with files.writing(self.directory):
            folder = pathlib.Path(tempfile.mkdtemp(prefix=files.TEMPORARY, dir=self.directory))
        try:
            with files.writing(self.directory, folder):
                writer(folder)
                shards = []
                for path in sorted(folder.iterdir()):
                    self._check_open(path.name)
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                    shards.append(self._publish(path, Shard(path.name, *files.measure(path)), None))
                return shards
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(
        self,
        facts: Mapping[str, Any] | None = None,
        names: Sequence[str] | None = None,
        revision: int = 0,
    ) -> Manifest:
        """Writes the manifest over the shards `names` (all that were written, sorted, by default)."""
        if names is None:
            records = files.matching(self.directory / RECORDS_FOLDER, "*.json")
            names = sorted(path.name.removesuffix(".json") for path in records)
        shards = []
        for name in names:
            record = self._record(name)
            if record is None:
                raise ValueError(
                    f"{self.directory / name} was never written: the stage is not finished"
                )
            shards.append(Shard(name, record["size"], record["sha256"]))
        manifest = self._manifest(shards, facts, revision)
        files.write_atomically(self.directory / MANIFEST_FILE, manifest.to_json())
        self._clean()
        return manifest

    def publish(
        self, writer: Callable[[pathlib.Path], Sequence[str]], facts: Mapping[str, Any]
    ) -> Manifest:
        """Writes the whole artefact beside its place and renames it there, manifest and all.

        For files that are only right together, and differ whenever they are made: of several builders
        the first one counts, and the others discard theirs.

        Args:
          writer: leaves all files in an empty folder; returns the names of those that come first in the
            manifest, before the others by name.
          facts: of the manifest.

        Returns:
          The manifest that counts.
        """
        if self.done:
            return self.manifest()
        self._begin_anew()
        target = self.directory
        folder = (
            target.parent / f"{files.TEMPORARY}{target.name}-{os.getpid()}-{os.urandom(4).hex()}"
        )
        try:
            with files.writing(target, folder):
                folder.mkdir()
                self._write_whole(folder, writer, facts)
                (target / STAGE_FILE).unlink(missing_ok=True)
                os.rename(folder, target)  # nothing is lost: it fails unless the directory is empty
                files.sync_folder(target.parent)
        except Exception:
            if not self.done:  # by another builder, who may have cleared this one's files away too
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for path in target.parent.glob(f"{files.TEMPORARY}{target.name}-*"):  # of killed builders
            shutil.rmtree(path, ignore_errors=True)
        return self.manifest()

    def _write_whole(
        self,
        folder: pathlib.Path,
        writer: Callable[[pathlib.Path], Sequence[str]],
        facts: Mapping[str, Any],
    ) -> None:
        """All files of the artefact and its manifest, safe on the disk."""
        first = list(writer(folder))
        names = first + sorted({path.name for path in folder.iterdir()} - set(first))
        shards = []
        for name in names:
            self._check_open(name)
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            shards.append(Shard(name, *files.measure(folder / name)))
        manifest = self._manifest(shards, facts)
        files.write_atomically(folder / MANIFEST_FILE, manifest.to_json())

    def _begin_anew(self) -> None:
        """Leaves stage.json alone in the directory: what else is there are parts of a killed builder's."""
        self.claim()
        if {path.name for path in self.directory.iterdir()} <= {STAGE_FILE}:
            return
        aside = self.directory.with_name(
            f"{files.TEMPORARY}{self.directory.name}-{os.urandom(4).hex()}"
        )
        os.rename(self.directory, aside)
        if (aside / MANIFEST_FILE).is_file():  # it was finished just now
            os.rename(aside, self.directory)
            return
        shutil.rmtree(aside, ignore_errors=True)
        self.claim()

    def _manifest(
        self, shards: Sequence[Shard], facts: Mapping[str, Any] | None, revision: int = 0
    ) -> Manifest:
        """The manifest over some shards."""
        return Manifest(
            FORMAT_VERSION,
            self.kind,
            self.settings,
            tuple(shards),
            self.parents,
            files.plain(facts or {}),
            revision,
        )

    def _refuse_other(self, stage_record: Mapping[str, Any]) -> None:
        """Raises unless the directory was begun with this stage's kind, settings and parents."""
        mine = {"format_version": FORMAT_VERSION, "kind": self.kind}
        changes = differences({name: stage_record.get(name) for name in mine}, mine)
        changes += differences(stage_record.get("settings", {}), self.settings)
        old, new = stage_record.get("parents", {}), self.parents
        changes += differences(shortened(old), shortened(new), "parent ")
        if changes:
            raise UserError(
                f"{self.directory} was made with other settings: {'; '.join(changes)};"
                f" expected the same, or another directory"
            )

    def _record(self, name: str) -> dict[str, Any] | None:
        """Size, hash and facts of a shard that is in place; None otherwise."""
        path = self.directory / RECORDS_FOLDER / f"{name}.json"
        if not (path.is_file() and (self.directory / name).is_file()):
            return None
        return files.read_json(path)

    def _publish(self, temporary: pathlib.Path, shard: Shard, facts: Any) -> Shard:
        """Writes the record, then renames: a shard in its place always has its record."""
        path = self.directory / shard.name
        record = self.directory / RECORDS_FOLDER / f"{shard.name}.json"
        with files.writing(path):
            record.parent.mkdir(exist_ok=True)
            fields = {"size": shard.size, "sha256": shard.sha256, "facts": files.plain(facts)}
            files.write_atomically(record, files.to_json(fields))
            files.replace(temporary, path)
        return shard

    def _check_open(self, name: str) -> None:
        """Finished artefacts are never written to; names stay inside the directory."""
        if self.done:
            raise ValueError(f"{self.directory} is finished: {name} cannot be written")
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
            raise ValueError(f"{name!r} is no name for a shard")

    def _clean(self) -> None:
        """Removes what only an unfinished stage needs, and what killed writers left."""
        shutil.rmtree(self.directory / RECORDS_FOLDER, ignore_errors=True)
        (self.directory / STAGE_FILE).unlink(missing_ok=True)
        for path in self.directory.glob(f"{files.TEMPORARY}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
