"""Corpora in which every file is a document: folders of text, Python's library, installed packages."""

import fnmatch
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading
from retro_jax.errors import UserError


def read_text(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, str]]:
    """Every file of a folder; the id is its relative path."""
    yield from _read_files(pathlib.Path(str(config.path)), config, reading)


def read_stdlib(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, str]]:
    """The source files of the running interpreter's standard library, or of a given copy."""
    if config.path is None:
        reading.source = f"{platform.python_implementation()} {platform.python_version()}"
    folder = config.path or sysconfig.get_path("stdlib")
    yield from _read_files(pathlib.Path(folder), config, reading)


def read_packages(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, str]]:
    """The source files of the packages installed beside the running interpreter, or in a folder."""
    folder = config.path or sysconfig.get_path("purelib")
    yield from _read_files(pathlib.Path(folder), config, reading)


def find_files(path: pathlib.Path, config: CorpusConfig) -> Iterator[tuple[str, pathlib.Path]]:
    """Relative name and path of every file that the corpus takes, in the order of their names.

    A path that is a file is taken whatever it is called.

    Raises:
      UserError: there is no such folder, or no file in it that the patterns take.
    """
    if path.is_file():
        yield path.name, path
        return
    if not path.is_dir():
        raise UserError(f"corpus {config.name!r}: {path} is missing: expected a file or folder")
    found = False
    for folder, folders, names in os.walk(path):
        inside = pathlib.Path(folder).relative_to(path)
        folders[:] = sorted(
            n for n in folders if not _matches(f"{_join(inside, n)}/", config.excluded)
        )
        for name in sorted(names):
            relative = _join(inside, name)
            if _matches(relative, config.included) and not _matches(relative, config.excluded):
                found = True
                yield relative, path / relative
    if not found:
        patterns = ", ".join(config.included)
        raise UserError(
            f"corpus {config.name!r}: {path} holds no file: expected some of {patterns}"
        )


def _read_files(
    path: pathlib.Path, config: CorpusConfig, reading: Reading
) -> Iterator[tuple[str, str]]:
    """Reads the files one by one."""
    for name, file in find_files(path, config):
        text = reading.decode(file.read_bytes(), str(file))
        if text is not None:
            yield name, text


def _join(folder: pathlib.Path, name: str) -> str:
    """A relative path with slashes."""
    return (folder / name).as_posix()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether any pattern takes the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
