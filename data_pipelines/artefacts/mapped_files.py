"""Files mapped into one range of addresses, each when it is first read; no file stays open.

    reserved   |file 0      |file 1   |file 2 ...     |     each from a page of its own
    mapped     |bytes.......|         |bytes.......   |     what was read so far

Python's own maps keep a file open each, and a split of thousands of shards reaches the limit. Bytes at
any places of any files are one NumPy array here, so reading rows takes no loop over the files.

The system limits how many maps a process has (vm.max_map_count). Beyond three quarters of it the files
that were mapped first are unmapped again.
"""

import collections
import ctypes
import functools
import logging
import mmap
import os
import pathlib
import threading
import weakref
from collections.abc import Sequence

import numpy as np

from retro_jax.errors import UserError

_FIXED = 0x10  # MAP_FIXED of Linux and of macOS, which the module mmap does not name
_NO_ACCESS = 0  # PROT_NONE
_FAILED = ctypes.c_void_p(-1).value
_MOST_FILE = pathlib.Path("/proc/sys/vm/max_map_count")
_USUAL_MOST = 65_530
_log = logging.getLogger(__name__)

# Held while maps are made, unmade or read: nobody reads what is being unmapped.
LOCK = threading.RLock()
_mapped: "collections.OrderedDict[tuple[int, int], weakref.ref[MappedFiles]]" = (
    collections.OrderedDict()
)


class _System:
    """The two calls of the system's library."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._mmap, self._munmap = library.mmap, library.munmap
        self._mmap.restype = ctypes.c_void_p
        integers = [ctypes.c_int] * 3
        self._mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *integers, ctypes.c_longlong]
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def map(self, address: int, size: int, access: int, flags: int, file: int) -> int:
        """Maps bytes at an address, or anywhere for 0; an OSError where the system refuses."""
        place = self._mmap(address or None, size, access, flags, file, 0)
        if place == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return place

    def unmap(self, address: int, size: int) -> None:
        """Gives a range back."""
        self._munmap(address, size)


_system = _System()


@functools.cache
def most_maps() -> int:
    """How many files are mapped at most, of all `MappedFiles` of this process."""
    most = int(_MOST_FILE.read_text()) if _MOST_FILE.is_file() else _USUAL_MOST
    return max(1, most * 3 // 4)


def mapped() -> list[tuple[int, int]]:
    """The files that are mapped now, the first first: of which object, and their numbers in it."""
    return list(_mapped)


class MappedFiles:
    """Some files as one array of bytes.

    Attributes:
      starts: [files] int64, where each begins in `data`.
      data: [bytes] uint8; only what `load` was called for may be read, under LOCK.
    """

    def __init__(self, paths: Sequence[str], sizes: Sequence[int]) -> None:
        """Reserves addresses; opens nothing.

        Args:
          paths: of the files. sizes: their bytes, each more than 0.

        Raises:
          UserError: more than this process may address (ulimit -v).
        """
        self._paths, self._sizes = list(paths), list(sizes)
        page = mmap.ALLOCATIONGRANULARITY
        room = [-(-size // page) * page for size in self._sizes]
        ends = np.cumsum([0, *room], dtype=np.int64)
        self.starts, size = ends[:-1], max(page, int(ends[-1]))
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._address = _system.map(0, size, _NO_ACCESS, flags, -1)
        except OSError as error:
            raise UserError(
                f"{len(self._paths)} files of {size:,} bytes cannot be mapped ({error.strerror}):"
                " expected a higher limit of addresses (ulimit -v)"
            ) from error
        end = weakref.finalize(self, _forget, id(self), self._address, size)
        end.atexit = False  # a thread may still read when the process ends, which unmaps all
        buffer = (ctypes.c_char * size).from_address(self._address)
        self.data = np.frombuffer(memoryview(buffer), np.uint8)
        self._there = np.zeros(len(self._paths), bool)
        self._missing = len(self._paths)

    @property
    def complete(self) -> bool:
        """Whether all of them are mapped."""
        return not self._missing

    def load(self, numbers: np.ndarray) -> None:
        """Maps those of some files that are not; call it under LOCK.

        Raises:
          UserError: a file is gone or has another size, or the system refuses more maps.
        """
        if self._there[numbers].all():
            return
        for number in np.unique(numbers[~self._there[numbers]]).tolist():
            self._make_room(keep=numbers)
            self._map(number)

    def _map(self, number: int) -> None:
        """Maps one file at its place."""
        path, size = self._paths[number], self._sizes[number]
        place = self._address + int(self.starts[number])
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                length = os.fstat(file).st_size
                if length != size:
                    raise UserError(f"{path} has {length} bytes: expected {size}")
                _system.map(place, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, file)
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(
                f"{path} cannot be mapped ({error.strerror}): expected a readable file and more than"
                f" {len(_mapped):,} maps (sysctl vm.max_map_count)"
            ) from error
        self._there[number] = True
        self._missing -= 1
        _mapped[id(self), number] = weakref.ref(self)

    def _make_room(self, keep: np.ndarray) -> None:
        """Unmaps what was mapped first, where the next file would be one too many."""
        most = most_maps()
        if len(_mapped) < most:
            return
        _warn_once(most)
        own = set(keep.tolist())
        for _ in range(len(_mapped)):
            if len(_mapped) < most:
                return
            key = next(iter(_mapped))
            owner, number = _mapped[key](), key[1]
            if owner is self and number in own:  # it is about to be read
                _mapped.move_to_end(key)
                continue
            if owner is not None:
                owner._unmap(number)
            _mapped.pop(key, None)

    def _unmap(self, number: int) -> None:
        """Puts nothing in the place of a file."""
        place, size = self._address + int(self.starts[number]), self._sizes[number]
        _system.map(place, size, _NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED, -1)
        self._there[number] = False
        self._missing += 1


def _forget(owner: int, address: int, size: int) -> None:
    """Gives the range of an object back that nobody has any more."""
    with LOCK:
        for key in [key for key in _mapped if key[0] == owner]:
            del _mapped[key]
        _system.unmap(address, size)


_warned: list[int] = []


def _warn_once(most: int) -> None:
    """Says that shards are mapped again and again from now on."""
    if not _warned:
        _warned.append(most)
        message = (
            f"more than {most:,} shards are read, three quarters of vm.max_map_count: they are mapped"
            " again and again; raise it (sysctl vm.max_map_count), or make fewer and larger shards"
            " (DocumentsConfig.shard_bytes)"
        )
        _log.warning("%s", message)
