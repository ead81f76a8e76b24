"""Identity and lineage of every artefact on disk.

A stage's output is a directory: shard files and `manifest.json`, which names every shard with its
size and SHA-256, the stage's settings, the manifest hash of each parent, and measured facts.
stage.py writes it; a directory with a manifest is complete.
No file contains a time, a host name or an absolute path.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.artefacts.checks import check_shard, check_types
from retro_jax.errors import UserError
from retro_jax.storage import files

FORMAT_VERSION = 1

MANIFEST_FILE = "manifest.json"
SETTINGS_FILE = "prepare.gin"  # of a whole workdir
STAGE_FILE = "stage.json"
STAGED_FILE = (
    "staged.json"  # of a copy: where it is from, and which shards it leaves out (staging.py)
)
PURGED_FILE = "purged.json"  # of an artefact whose shards were deleted: the manifest stays
RECORDS_FOLDER = ".shards"

Path = str | os.PathLike[str]
Parents = Mapping[str, tuple["Manifest", Path]]


def shard_name(prefix: str, index: int, suffix: str = ".npy") -> str:
    """The name of shard `index`: chunks-00007.npy."""
    return f"{prefix}-{index:05d}{suffix}"


def is_purged(directory: Path) -> bool:
    """Whether the shards of a finished directory were deleted, or are just being deleted."""
    return (pathlib.Path(directory) / PURGED_FILE).is_file()


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of an artefact: its name within the directory, bytes, and SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished directory is.

    Attributes:
      format_version: FORMAT_VERSION of the code that wrote it.
      kind: its content: "documents", "tokenizer", "chunks", "keys", "index", "neighbours".
      settings: everything the bytes depend on, as plain JSON.
      shards: every file, in the order in which they are read.
      parents: role (mostly the parent's kind) -> the hash of that parent's manifest.
      facts: what was measured while it was made, as plain JSON.
      revision: 0 when first made; one more whenever documents are appended or removed.
    """

    format_version: int
    kind: str
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    parents: dict[str, str]
    facts: dict[str, Any]
    revision: int = 0

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON: equal for equal artefacts on any machine."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def fact(self, name: str) -> Any:
        """One measured fact; a UserError if this artefact does not state it."""
        if name not in self.facts:
            choices = ", ".join(sorted(self.facts)) or "none"
            raise UserError(
                f"the {self.kind} manifest states no {name!r}: expected one of {choices}"
            )
        return self.facts[name]

    def shard_names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Names of the shards that begin and end so, in order."""
        names = (shard.name for shard in self.shards)
        return [name for name in names if name.startswith(prefix) and name.endswith(suffix)]

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        return files.to_json(dataclasses.asdict(self))

    @classmethod
    def open(
        cls, directory: Path, kind: str, parents: Parents | None = None, verify: bool = False
    ) -> "Manifest":
        """Reads and checks a finished directory.

        Args:
          directory: the stage's output.
          kind: the kind that it must have.
          parents: role -> (manifest, directory) of artefacts that it must have been made from.
          verify: also hash every shard again.

        Raises:
          UserError: no or bad manifest, another version or kind, a shard that is missing, truncated
            or changed, or a parent that does not belong to it; it names the file or directories.
        """
        folder = pathlib.Path(directory)
        manifest = cls.read(directory)
        if is_purged(folder):
            raise UserError(
                f"{folder} was purged, only its manifest is left: expected a newer revision of the"
                " database"
            )
        if manifest.kind != kind:
            raise UserError(f"{folder} holds {manifest.kind!r}: expected {kind!r}")
        for role, (parent, origin) in (parents or {}).items():
            recorded = manifest.parents.get(role)
            if recorded is None:
                raise UserError(
                    f"{folder} was not made from any {role!r}: expected that of {origin}"
                )
            if recorded != parent.hash:
                raise UserError(
                    f"{folder} and {origin} do not belong together: expected {role} {recorded[:12]},"
                    f" found {parent.hash[:12]}"
                )
        staged = folder / STAGED_FILE
        left_out = files.read_json(staged)["left_out"] if staged.is_file() else ()
        for shard in manifest.shards:
            if shard.name not in left_out or (folder / shard.name).is_file():
                check_shard(folder / shard.name, shard.size, shard.sha256, verify)
        return manifest

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads manifest.json alone: the shards and parents are not looked at."""
        folder = pathlib.Path(directory)
        path = folder / MANIFEST_FILE
        if not path.is_file():
            if (folder / STAGE_FILE).is_file():
                raise UserError(
                    f"{folder} is unfinished: expected {MANIFEST_FILE}; run its stage again"
                )
            raise UserError(
                f"{folder} has no {MANIFEST_FILE}: expected the directory of a finished stage"
            )
        return _parsed(str(path), stamp_of(path))

    @classmethod
    def parse(cls, data: bytes, path: Path) -> "Manifest":
        """The manifest in some bytes; `path` is where they are from, for messages."""
        fields = files.parse_json(data, path)
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version!r}: expected {FORMAT_VERSION}")
        try:
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            manifest = cls(shards=shards, **fields)
            check_types(manifest, kind=str, settings=dict, parents=dict, facts=dict, revision=int)
            for shard in shards:
                check_types(shard, name=str, size=int, sha256=str)
            if not all(isinstance(digest, str) for digest in manifest.parents.values()):
                raise TypeError(f"parents are {manifest.parents!a}")
            return manifest
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is no manifest of format {FORMAT_VERSION}: {error}") from error


def stamp_of(path: pathlib.Path) -> tuple[int, int, int]:
    """Another value whenever a file was replaced: its number, its time in nanoseconds and its size."""
    about = path.stat()
    return about.st_ino, about.st_mtime_ns, about.st_size


@functools.lru_cache(maxsize=64)
def _parsed(path: str, stamp: tuple[int, int, int]) -> Manifest:
    """A manifest, parsed once by a process as long as its file stays the same."""
    return Manifest.parse(pathlib.Path(path).read_bytes(), path)
