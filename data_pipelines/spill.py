"""Records sorted on disk, by a hash, in memory that does not grow with their number.

add(order, content, payload) ->  bucket-007   "order payload" by the first bits of `order`
                                 content-042  (content, order) by the first bits of `content`
close()  content-* sorted by (content, order): all but the first of equal content -> dropped-*
records()  each bucket sorted, in turn: as buckets are ranges of `order`, that is all in order
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from data_pipelines import files

HASH_BYTES = 16
_PAIR = np.dtype([("c0", ">u8"), ("c1", ">u8"), ("o0", ">u8"), ("o1", ">u8")])
_BUCKET, _ORDER, _CONTENT, _DROPPED = "bucket", "order", "content", "dropped"


class Spill:
    """A folder of buckets: filled once with `add`, closed, then read with `records`."""

    def __init__(self, folder: pathlib.Path, buckets: int):
        """Reads what an earlier process closed there, or, after `start`, takes records.

        Args:
          folder: belongs to the spill alone.
          buckets: files of each kind; memory is the bytes of all records over this.
        """
        self._folder, self._buckets = folder, buckets
        self._open: dict[tuple[str, int], BinaryIO] = {}

    def start(self) -> None:
        """Empties the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with files.writing(self._folder):
            self._folder.mkdir(parents=True)

    def add(self, order: bytes, content: bytes | None, payload: bytes) -> None:
        """Takes one record.

        Args:
          order: 16 bytes to sort by.
          content: 16 bytes that are equal for duplicates; None for a record that has none.
          payload: bytes without a line end.
        """
        with files.writing(self._folder):
            self._file(_BUCKET, order).write(b"%s %s\n" % (order.hex().encode(), payload))
            self._file(_ORDER, order).write(order)
            if content is not None:
                self._file(_CONTENT, content).write(content + order)

    def close(self) -> None:
        """Ends the adding, and finds the duplicates."""
        with files.writing(self._folder):
            self._close_files()
            for bucket in range(self._buckets):
                for order in _duplicates(self._path(_CONTENT, bucket)):
                    self._file(_DROPPED, order).write(order)
            self._close_files()

    def discard(self) -> None:
        """Removes everything, after an error; it may be that the disk is full."""
        for file in self._open.values():
            with contextlib.suppress(OSError):
                file.close()
        self._open = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def repeated(self) -> bytes | None:
        """The payload of a record whose order another one has too; None if there is none."""
        for bucket in range(self._buckets):
            orders = _fixed(self._path(_ORDER, bucket))
            if len(set(orders)) < len(orders):
                before = b""
                for order, payload, _ in self._sorted_bucket(bucket):
                    if order == before:
                        return payload
                    before = order
        return None

    def duplicates(self) -> int:
        """How many records are duplicates of another."""
        sizes = (p.stat().st_size for p in self._folder.glob(f"{_DROPPED}-*"))
        return sum(sizes) // HASH_BYTES

    def records(self) -> Iterator[tuple[bytes, bytes, bool]]:
        """Yields (order, payload, whether it is a duplicate) by increasing order."""
        for bucket in range(self._buckets):
            yield from self._sorted_bucket(bucket)

    def _sorted_bucket(self, bucket: int) -> Iterator[tuple[bytes, bytes, bool]]:
        """The records of one bucket."""
        path = self._path(_BUCKET, bucket)
        drops = set(_fixed(self._path(_DROPPED, bucket)))
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        lines.sort()
        for line in lines:
            order = bytes.fromhex(line[: 2 * HASH_BYTES].decode())
            yield order, line[2 * HASH_BYTES + 1 :], order in drops

    def _path(self, kind: str, bucket: int) -> pathlib.Path:
        """The file of a bucket."""
        return self._folder / f"{kind}-{bucket:04d}"

    def _file(self, kind: str, key: bytes) -> BinaryIO:
        """The open file that a key belongs to."""
        bucket = int.from_bytes(key[:4], "big") * self._buckets >> 32
        if (kind, bucket) not in self._open:
            self._open[kind, bucket] = open(self._path(kind, bucket), "wb")  # noqa: SIM115
        return self._open[kind, bucket]

    def _close_files(self) -> None:
        """Closes every file; what was written is on the disk, or an OSError says it is not."""
        for file in self._open.values():
            file.close()
        self._open = {}


def _fixed(path: pathlib.Path) -> list[bytes]:
    """The hashes in a file of nothing else."""
    data = path.read_bytes() if path.is_file() else b""
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


def _duplicates(path: pathlib.Path) -> Iterator[bytes]:
    """The orders of all records but the first of each content."""
    if not path.is_file():
        return
    pairs = np.fromfile(path, _PAIR)
    pairs = pairs[np.lexsort((pairs["o1"], pairs["o0"], pairs["c1"], pairs["c0"]))]
    again = np.zeros(len(pairs), bool)
    again[1:] = (pairs["c0"][1:] == pairs["c0"][:-1]) & (pairs["c1"][1:] == pairs["c1"][:-1])
    orders = pairs[again][["o0", "o1"]]
    for o0, o1 in orders.tolist():
        yield int(o0).to_bytes(8, "big") + int(o1).to_bytes(8, "big")
