"""The files of a corpus: on this machine, or at URLs that fsspec reads (gs://, s3://, hf://, memory://).

Files are found one after the other, in memory that does not grow with their number: a folder of this
machine is read 65,536 entries at a time, a remote one folder by folder.
"""

import base64
import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from data_pipelines.corpora.config import FORMS, CorpusConfig
from retro_jax.errors import UserError
from retro_jax.storage.urls import file_system, is_url

_ENTRIES = 1 << 16  # of a folder that are sorted at once
_file_system = functools.partial(file_system, use_listings_cache=False)  # files come and go
_logger = logging.getLogger(__name__)
WORKDIR_MARK = ".prepare.lock"  # every workdir has this file
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_RUN_MARKS = {"config.gin", "checkpoints"}  # and every run both of these
_MD5, _GIT = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{40}")
_STAMPS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "updated", "created")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    Attributes:
      name: its path within the corpus, with slashes.
      path: where it is: a path of this machine or a URL.
      size: its bytes.
      stamp: something that is another when the file has changed.
      start, stop: of a part of a file, the bytes in which its lines begin, or its row groups; 0 and 0
        for all of it. The size is then about that of the part.
      content: of a remote file, a hash of its bytes that its store states, as KIND:HEX; empty where it
        states none.
    """

    name: str
    path: str
    size: int
    stamp: str
    start: int = 0
    stop: int = 0
    content: str = ""

    @property
    def suffix(self) -> str:
        """The last part of its name, from the point on."""
        return pathlib.PurePosixPath(self.name).suffix


def find_files(root: str, config: CorpusConfig) -> Iterator[SourceFile]:
    """Every file that the corpus takes; those of one folder in the order of their names.

    A path that is a file is taken whatever it is called.

    Raises:
      UserError: there is no such folder, no file in it that the patterns take, or no package that
        reads such URLs.
    """
    has_files, left = False, list[str]()
    for file in _find(root, config, left):
        has_files = True
        yield file
    if left and has_files and config.include is None:
        _logger.warning(
            "corpus %r: %d compressed files, such as %s, are left out: CorpusConfig.include can take"
            " them",
            *(config.name, len(left), left[0]),
        )
    if not has_files and config.include is None and config.kind in FORMS:
        for file in _find(root, dataclasses.replace(config, include=FORMS[config.kind])):
            has_files = True
            yield file
    if not has_files:
        patterns = ", ".join(config.included)
        other = next(_find(root, dataclasses.replace(config, include=("*",))), None)
        more = (
            "" if other is None else f"; it has {other.name}, which CorpusConfig.include can take"
        )
        raise UserError(
            f"corpus {config.name!r}: {root} holds no file: expected some of {patterns}{more}"
        )


def is_there(file: SourceFile) -> bool:
    """Whether a file exists."""
    if not is_url(file.path):
        return os.path.isfile(file.path)
    with _one_line(file.path):
        return bool(_file_system(file.path)[0].exists(file.path))


@contextlib.contextmanager
def open_file(file: SourceFile) -> Iterator[BinaryIO]:
    """A file's bytes; whatever a remote one fails with while it is read is a UserError."""
    if not is_url(file.path):
        with open(file.path, "rb") as local:
            yield local
        return
    with _one_line(file.path), _file_system(file.path)[0].open(file.path, "rb") as remote:
        yield cast(BinaryIO, remote)


def _find(root: str, config: CorpusConfig, left: list[str] | None = None) -> Iterator[SourceFile]:
    """The files that the corpus takes, wherever they are; `left` gets compressed ones that it does not."""
    yield from _find_remote(root, config) if is_url(root) else _find_local(root, config, left)


def _find_local(root: str, config: CorpusConfig, left: list[str] | None) -> Iterator[SourceFile]:
    """The files of a folder of this machine."""
    path = pathlib.Path(root)
    if path.is_file():
        yield _local_file(path.name, str(path), path.stat())
    elif path.is_dir():
        if _is_artefact(set(os.listdir(path))):
            raise UserError(
                f"corpus {config.name!r}: {root} is a workdir: expected a folder of documents, not of"
                " what was made of them"
            )
        yield from _walk(str(path), "", config, {os.path.realpath(path)}, left)
    else:
        raise UserError(f"corpus {config.name!r}: {root} is missing: expected a file or folder")


def _walk(
    folder: str, inside: str, config: CorpusConfig, parents: set[str], left: list[str] | None
) -> Iterator[SourceFile]:
    """The files below a folder. A linked folder is read where it is no part of one that is read."""
    with os.scandir(folder) as entries:
        while bulk := sorted(itertools.islice(entries, _ENTRIES), key=lambda entry: entry.name):
            folders = []
            for entry in bulk:
                name = inside + entry.name
                if entry.is_dir():
                    if not _matches(f"{name}/", config.excluded):
                        folders.append(entry)
                elif _is_taken(name, config):
                    if not entry.is_file():
                        what = "leads to nothing" if entry.is_symlink() else "is no plain file"
                        raise UserError(
                            f"corpus {config.name!r}: {entry.path} {what}: expected a file, or"
                            " CorpusConfig.exclude to leave it out"
                        )
                    yield _local_file(name, entry.path, entry.stat())
                elif left is not None and _is_taken(name.rpartition(".")[0], config):
                    left += [name] if name.endswith(_COMPRESSED) else []
            for entry in folders:
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if any(_is_inside(target, other) for other in parents):
                        _logger.warning(
                            "corpus %r: the linked folder %s is left out, as %s is read already",
                            *(config.name, entry.path, target),
                        )
                        continue
                    parents.add(target)
                if _is_artefact(set(os.listdir(entry.path))):
                    _tell_of_workdir(config, entry.path)
                    continue
                yield from _walk(entry.path, f"{inside}{entry.name}/", config, parents, left)


def _is_artefact(names: set[str]) -> bool:
    """Whether a folder of these entries is a workdir or a run of this project."""
    return WORKDIR_MARK in names or names >= _RUN_MARKS


def _tell_of_workdir(config: CorpusConfig, path: str) -> None:
    """Warns of a workdir within a corpus."""
    _logger.warning("corpus %r: the workdir %s is left out", config.name, path)


def _is_inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or within it, or the folder within it: a part would be read twice."""
    return os.path.commonpath((path, folder)) in (path, folder)


def _local_file(name: str, path: str, status: os.stat_result) -> SourceFile:
    """A file of this machine."""
    return SourceFile(name, path, status.st_size, str(status.st_mtime_ns))


def _find_remote(root: str, config: CorpusConfig) -> Iterator[SourceFile]:
    """The files below a URL."""
    with _one_line(root):
        system, top = _file_system(root)
        system.invalidate_cache()  # of listings, which the hub's client keeps in any case
        try:
            info = system.info(top)
        except FileNotFoundError:
            private = ", and HF_TOKEN where it is private" if root.startswith("hf://") else ""
            raise UserError(
                f"corpus {config.name!r}: {root} is missing: expected a file or folder{private}"
            ) from None
        if info["type"] == "file":
            yield _remote_file(system, pathlib.PurePosixPath(top).name, info)
            return
        for folder, folders, names in system.walk(top, detail=True):
            inside = folder.strip("/")[len(top.strip("/")) :].lstrip("/")
            inside = f"{inside}/" if inside else ""
            if _is_artefact({*folders, *names}):
                _tell_of_workdir(config, folder)
                folders.clear()
                continue
            for name in list(folders):
                if _matches(f"{inside}{name}/", config.excluded):
                    del folders[name]
            for name in sorted(names):
                if name and _is_taken(inside + name, config):
                    yield _remote_file(system, inside + name, names[name])


def _remote_file(system: Any, name: str, info: dict[str, Any]) -> SourceFile:
    """A file that fsspec described."""
    stamp = next((str(info[field]) for field in _STAMPS if info.get(field)), "")
    path, size = system.unstrip_protocol(info["name"]), int(info["size"] or 0)
    return SourceFile(name, path, size, stamp, content=content_hash(info))


def content_hash(info: dict[str, Any]) -> str:
    """What a store states about the bytes of a file, as KIND:HEX; empty if it states no hash of them alone.

    Google and S3 (of an object sent in one part) state MD5, the hub git's hash.
    """
    if stated := info.get("md5Hash"):
        return f"md5:{base64.b64decode(stated).hex()}"
    if _GIT.fullmatch(blob := str(info.get("blob_id") or "")):
        return f"git:{blob}"
    tag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    return f"md5:{tag}" if _MD5.fullmatch(tag) else ""


@contextlib.contextmanager
def _one_line(url: str) -> Iterator[None]:
    """Turns the many kinds of errors of remote file systems into one."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{url} cannot be read: {reason}") from error


def _is_taken(name: str, config: CorpusConfig) -> bool:
    """Whether the corpus takes a file."""
    return _matches(name, config.included) and not _matches(name, config.excluded)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether any pattern takes the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
