"""Rows of an array stored in the .npy files of several shards.

ids --searchsorted--> shard and row --one sum--> where its bytes are --one take--> rows
"""

import functools
import io
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_pipelines.artefacts.mapped_files import LOCK, MappedFiles
from retro_jax.errors import UserError

_BUCKETS = 16  # of ids for each shard, in a table of the shards that they begin in


class Header(NamedTuple):
    """What the header of a .npy file says: bytes before the array, its shape and its type."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def header_of(path: pathlib.Path) -> Header:
    """The header of a .npy file of format 1.0 and C order.

    Raises:
      ValueError: it is none.
    """
    with open(path, "rb", buffering=0) as file:
        start = file.read(10)
        length = int.from_bytes(start[8:10], "little")
        return _parsed(start + file.read(length))


@functools.lru_cache(maxsize=1 << 14)
def _parsed(data: bytes) -> Header:
    """A header in its bytes: shards of one size have the same."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject:
        raise ValueError(f"expected a C-ordered array, found {dtype} of shape {shape}")
    return Header(file.tell(), shape, dtype)


def write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Begins a .npy file of format 1.0, in C order, whose rows follow."""
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


class ShardedRows:
    """The rows of several shards as one array, mapped when they are first read.

    Attributes:
      bounds: [shards + 1] int64, where each shard begins in the whole, and where the last one ends.
      shapes: of each shard's array.
      dtype: of the first shard; of shards of several revisions some may be narrower integers.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Reads the headers of some .npy files.

        Raises:
          UserError: one is no such file.
        """
        self._paths = [os.fspath(path) for path in paths]
        headers = []
        for path in self._paths:
            try:
                headers.append(header_of(pathlib.Path(path)))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error}): expected a shard") from error
        self._set(headers)

    def _set(self, headers: Sequence[Header]) -> None:
        """Lays the shards out, those of each type by themselves."""
        self._headers = list(headers)
        self.shapes = [header.shape for header in headers]
        self.bounds = np.cumsum([0, *(shape[0] for shape in self.shapes)], dtype=np.int64)
        self.dtype = headers[0].dtype if headers else np.dtype(np.int64)
        self._shift = max(0, (len(self) // (_BUCKETS * (len(headers) + 1))).bit_length() - 1)
        buckets = np.arange((len(self) >> self._shift) + 2, dtype=np.int64) << self._shift
        self._low = self._search(np.minimum(buckets, max(0, len(self) - 1)))
        kinds = {(header.dtype, header.shape[1:]): None for header in headers if header.shape[0]}
        self._groups = [_Group(self._paths, headers, *kind) for kind in kinds]

    @classmethod
    def joined(cls, parts: "Sequence[ShardedRows]") -> "ShardedRows":
        """The shards of several, one after the other."""
        whole = cls.__new__(cls)
        whole._paths = [path for part in parts for path in part._paths]
        whole._set([header for part in parts for header in part._headers])
        return whole

    def __len__(self) -> int:
        """Rows of all shards."""
        return int(self.bounds[-1])

    def gather(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Fills rows[i] with row ids[i] of the whole, where ids[i] is not negative.

        Args:
          ids: [n] int64, less than the last bound.
          rows: [n, ...] to be filled; the columns that it has are taken.
        """
        there = np.flatnonzero(ids >= 0)
        if not len(there):
            return
        ids = ids if len(there) == len(ids) else ids[there]
        shards = self._shards_of(ids)
        if len(self._groups) == 1:
            found = self._groups[0].take(shards, ids, rows.shape[1:])
            if len(there) == len(rows):
                rows[...] = found
            else:
                rows[there] = found
            return
        for group in self._groups:
            part = np.flatnonzero(group.numbers[shards] >= 0)
            if len(part):
                rows[there[part]] = group.take(shards[part], ids[part], rows.shape[1:])

    def _shards_of(self, ids: np.ndarray) -> np.ndarray:
        """[n] int64: the shards of rows [n]; of most the table says it, of others a search."""
        buckets = ids >> self._shift
        shards = self._low[buckets]
        unsure = np.flatnonzero(shards != self._low[buckets + 1])
        if len(unsure):
            shards[unsure] = self._search(ids[unsure])
        return shards

    def _search(self, ids: np.ndarray) -> np.ndarray:
        """[n] int64: the shards of rows [n]."""
        return np.searchsorted(self.bounds, ids, side="right") - 1


class _Group:
    """The shards of one type and one shape of rows.

    Attributes:
      numbers: [shards] int64, the number of each of all shards in this group; -1 if it is in another.
    """

    def __init__(
        self,
        paths: Sequence[str],
        headers: Sequence[Header],
        dtype: np.dtype[Any],
        inner: tuple[int, ...],
    ) -> None:
        self._dtype, self._width = dtype, math.prod(inner) * dtype.itemsize
        members = [
            i
            for i, h in enumerate(headers)
            if h.shape[0] and (h.dtype, h.shape[1:]) == (dtype, inner)
        ]
        self.numbers = np.full(len(paths), -1, np.int64)
        self.numbers[members] = np.arange(len(members))
        offsets = np.array([headers[i].offset for i in members], np.int64)
        sizes = [headers[i].offset + headers[i].shape[0] * self._width for i in members]
        self._files = MappedFiles([paths[i] for i in members], sizes)
        lengths = np.array([h.shape[0] for h in headers], np.int64)
        before = (np.cumsum(lengths) - lengths)[members]  # rows of the whole before each shard
        self._origins = np.zeros(len(paths), np.int64)  # of each shard, where row 0 would be
        self._origins[members] = self._files.starts + offsets - before * self._width

    def take(self, shards: np.ndarray, ids: np.ndarray, inner: tuple[int, ...]) -> np.ndarray:
        """[n, *inner] rows `ids` [n] of the whole, which are in shards [n]; the first columns of them."""
        step, width = self._dtype.itemsize, math.prod(inner) * self._dtype.itemsize
        data = self._files.data
        # Every item of the files as the beginning of a row: overlapping, and read at some places only.
        rows = np.ndarray(
            ((len(data) - width) // step + 1,), np.dtype((np.void, width)), data, 0, (step,)
        )
        places = self._origins[shards] + ids * self._width
        if step > 1:
            places //= step
        with LOCK:
            if not self._files.complete:
                self._files.load(self.numbers[shards])
            found = rows[places]
        return found.view(self._dtype).reshape(len(found), *inner)
