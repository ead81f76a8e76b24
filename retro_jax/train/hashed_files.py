"""Sizes and hashes of a checkpoint's files: each process hashes what it has written, all at the same time.

    1000.orbax-checkpoint-tmp/default/ocdbt.process_3/...    what process 3 wrote
    1000.orbax-checkpoint-tmp/hashed-3.json                  its sizes and hashes, until the seal has them

The first process collects these lists, and hashes only what no list has: Orbax's merged index, a few
kilobytes. When a run starts again, each process checks its share of the files.
"""

import concurrent.futures
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from retro_jax.storage import files

_ITEM = "default"
_OF_PROCESS = "ocdbt.process_{}"  # Orbax's name
_COMMITTED = "commit_success.txt"  # Orbax writes it after the seal
_THREADS = 8

Entries = dict[str, list[Any]]  # {file: [size, sha256]}


def write_list(path: pathlib.Path, process: int) -> None:
    """Hashes what a process wrote, and writes the list.

    Args:
      path: of the checkpoint that is being written. process: its number.

    Raises:
      OSError: a file cannot be read. UserError: the list cannot be written.
    """
    entries = hash_files(path, _files(path / _ITEM / _OF_PROCESS.format(process)))
    files.write_atomically(path / f"hashed-{process}.json", files.to_json(entries))


def collect(path: pathlib.Path) -> Entries:
    """All files of a checkpoint: from the processes' lists, which go away, and by hashing the rest."""
    lists = sorted(path.glob("hashed-*.json"))
    entries: Entries = {}
    for place in lists:
        entries |= files.read_json(place)
    there = {str(file.relative_to(path)): file for file in _files(path / _ITEM)}
    known = {
        name: entry
        for name, entry in entries.items()
        if name in there and there[name].stat().st_size == entry[0]
    }
    rest = [file for name, file in there.items() if name not in known]
    every = known | hash_files(path, rest)
    for place in lists:
        place.unlink()
    return dict(sorted(every.items()))


def find_damage(
    path: pathlib.Path, sealed: Mapping[str, list[Any]], share: tuple[int, int]
) -> str | None:
    """The damage to a checkpoint's files, or None.

    Args:
      path: of the checkpoint. sealed: its files. share: (i, n) checks the content of every n-th file.
    """
    for name, (size, _) in sealed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
    number, count = share
    by_size = sorted(sealed, key=lambda name: (-sealed[name][0], name))  # equal shares of bytes
    for name, entry in hash_files(path, [path / name for name in by_size[number::count]]).items():
        if entry != sealed[name]:
            return f"{name} has other content than was written"
    return None


def hash_files(path: pathlib.Path, paths: list[pathlib.Path]) -> Entries:
    """{file below a path: [size, sha256]}."""

    def entry(file: pathlib.Path) -> list[Any]:
        with open(file, "rb") as stream:
            return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the lock
        entries = pool.map(entry, paths)
        return {str(f.relative_to(path)): e for f, e in zip(paths, entries, strict=True)}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder but Orbax's marks."""
    return [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != _COMMITTED]
