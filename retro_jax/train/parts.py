"""The arrays of a state in parts: each process writes what its devices hold, and reads what they need.

    parts/ATTEMPT-00003.bin    the shards of process 3, one after the other, as the devices have them
    parts/ATTEMPT-00003.json   where each shard is: array, start, shape, offset, bytes, sha256

No process needs another's files to write, and any number of processes may read: the ranges of bytes
that its devices need, from a folder or from a bucket. Each shard's hash is checked when it is read.
"""

import concurrent.futures
import dataclasses
import hashlib
import math
import pathlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.errors import UserError
from retro_jax.storage import files

PARTS = "parts"
_THREADS = 8  # that hash, or wait for a bucket
_ARRAYS = 4  # that are put together at a time
_KEPT = 1 << 30  # bytes of shards that are kept while an array is put together

_CHANGED = "has other content than was written"

Read = Callable[[str, int, int], bytes]  # (name, offset, length) -> bytes


class DamagedError(UserError):
    """A checkpoint's files are not those that were written."""


def damage_in(error: UserError) -> str:
    """The damage that an error of any process is about; empty for another error."""
    return str(error) if isinstance(error, DamagedError) or _CHANGED in str(error) else ""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A shard of an array.

    Attributes:
      array: its name. start, shape: which part of the array it is.
      offset, size: bytes in the part's file. sha256: of them. file: the part's file.
    """

    array: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    size: int
    sha256: str
    file: str = ""

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def snapshot(leaves: Mapping[str, jax.Array]) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    """Copies of the shards that this process has to write: (array, start, values).

    Of equal copies on several devices one is written, by the process that has the first of them.
    """
    mine = [
        (name, shard)
        for name, leaf in leaves.items()
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]
    for _, shard in mine:
        shard.data.copy_to_host_async()
    return [
        (name, tuple(place.start or 0 for place in shard.index), np.array(shard.data))
        for name, shard in mine
    ]


def write(
    folder: pathlib.Path, name: str, shards: Sequence[tuple[str, tuple[int, ...], np.ndarray]]
) -> None:
    """Writes a part and, once it is whole, its list of shards.

    Args:
      folder: of the checkpoint. name: of the part, as in "1f2e-00003". shards: as `snapshot` gives them.

    Raises:
      UserError: the disk is full, or refuses.
    """
    place, offset, rows = folder / PARTS, 0, []
    with files.writing(place):
        place.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the lock
        digests = list(pool.map(lambda shard: hashlib.sha256(_bytes(shard[2])).hexdigest(), shards))
    for (array, start, values), digest in zip(shards, digests, strict=True):
        rows.append([array, list(start), list(values.shape), offset, values.nbytes, digest])
        offset += values.nbytes
    path = place / f"{name}.bin"
    with files.writing(path), open(path, "wb") as file:
        for _, _, values in shards:
            file.write(_bytes(values))
    files.write_atomically(place / f"{name}.json", files.to_json({"bytes": offset, "chunks": rows}))


def read_index(data: bytes, name: str) -> tuple[int, list[Chunk]]:
    """The bytes of a part's file, and its shards.

    Args:
      data: of the part's .json. name: of that file, as in "parts/1f2e-00003.json".

    Raises:
      UserError: it is no such list.
    """
    fields = files.parse_json(data, name)
    file = f"{name.removesuffix('.json')}.bin"
    rows = [
        Chunk(array, tuple(start), tuple(shape), offset, size, digest, file)
        for array, start, shape, offset, size, digest in fields["chunks"]
    ]
    return fields["bytes"], rows


def check_whole(arrays: Mapping[str, Sequence[Any]], chunks: Sequence[Chunk]) -> None:
    """Refuses shards that are not all of the arrays.

    Args:
      arrays: {name: [shape, dtype]}. chunks: of all parts.

    Raises:
      UserError: names an array of which something is missing.
    """
    found = dict.fromkeys(arrays, 0)
    for chunk in chunks:
        found[chunk.array] += chunk.elements
    for name, (shape, _) in arrays.items():
        if found[name] != math.prod(shape):
            raise UserError(f"{name} has {found[name]} of {math.prod(shape)} numbers in all parts")


def load(
    wanted: Mapping[str, Any],
    arrays: Mapping[str, Sequence[Any]],
    chunks: Sequence[Chunk],
    read: Read,
) -> dict[str, jax.Array]:
    """The arrays as the devices of this process need them; no other process takes part.

    Args:
      wanted: {name: jax.ShapeDtypeStruct with a sharding}. arrays: {name: [shape, dtype]} as written.
      chunks: of all parts. read: reads bytes of a part's file; threads call it.

    Raises:
      DamagedError: a shard is not what was written.
    """
    by_array: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_array.setdefault(chunk.array, []).append(chunk)
    with (
        concurrent.futures.ThreadPoolExecutor(_ARRAYS) as outer,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as inner,
    ):

        def load_one(name: str) -> jax.Array:
            dtype = jnp.dtype(arrays[name][1])
            return _load_array(wanted[name], dtype, by_array.get(name, []), read, inner)

        return dict(zip(wanted, outer.map(load_one, wanted), strict=True))


def _load_array(
    leaf: Any,
    dtype: np.dtype,
    chunks: Sequence[Chunk],
    read: Read,
    pool: concurrent.futures.Executor,
) -> jax.Array:
    """One array, put together from the shards that overlap with what each device holds."""
    kept: OrderedDict[Chunk, np.ndarray] = OrderedDict()
    shape = tuple(leaf.shape)

    def values(needed: list[Chunk]) -> list[np.ndarray]:
        missing = [chunk for chunk in needed if chunk not in kept]
        read_now = pool.map(lambda chunk: _read_chunk(chunk, dtype, read), missing)
        kept.update(zip(missing, read_now, strict=True))
        return [kept[chunk] for chunk in needed]

    def part(index: Any) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        needed = [chunk for chunk in chunks if _overlap(chunk, bounds) is not None]
        result = np.empty([end - start for start, end in bounds], dtype)
        for chunk, there in zip(needed, values(needed), strict=True):
            common = _overlap(chunk, bounds)
            assert common is not None
            to = tuple(slice(a - b[0], e - b[0]) for (a, e), b in zip(common, bounds, strict=True))
            of = tuple(slice(a - s, e - s) for (a, e), s in zip(common, chunk.start, strict=True))
            result[to] = there[of]
        while len(kept) > 1 and sum(v.nbytes for v in kept.values()) > _KEPT:
            kept.popitem(last=False)
        return result

    return jax.make_array_from_callback(shape, leaf.sharding, part)


def _overlap(chunk: Chunk, bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """What a shard and a region have in common, by dimension; None for nothing."""
    common = [
        (max(start, low), min(start + length, high))
        for start, length, (low, high) in zip(chunk.start, chunk.shape, bounds, strict=True)
    ]
    return common if all(low < high for low, high in common) else None


def _read_chunk(chunk: Chunk, dtype: np.dtype, read: Read) -> np.ndarray:
    """A shard's values, checked."""
    data = read(chunk.file, chunk.offset, chunk.size)
    if hashlib.sha256(data).hexdigest() != chunk.sha256:
        raise DamagedError(f"{chunk.file}: {chunk.array} {_CHANGED}")
    return np.frombuffer(data, dtype).reshape(chunk.shape)


def _bytes(values: np.ndarray) -> memoryview:
    """The bytes of an array, as they lie in memory."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
