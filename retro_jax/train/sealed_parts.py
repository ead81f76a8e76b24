"""A sealed checkpoint of parts (parts.py), on this host's disk or in a bucket, as reading it needs it.

1000/sealed.json         format 2: the arrays, and bytes and SHA-256 of every part's list of shards
1000/parts/*.json        the lists: where each shard is, and its hash
1000/parts/*.bin         the shards; where they are in a bucket alone, remote.json says which
1000/remote.json         {"bucket": "gs://B/W", "place": "retro/checkpoints/1000"}
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from retro_jax.errors import UserError
from retro_jax.storage import files
from retro_jax.storage.buckets import Bucket
from retro_jax.train import parts
from retro_jax.train.parts import PARTS, Chunk, DamagedError

FORMAT_VERSION = 2
SEAL, REMOTE = "sealed.json", "remote.json"


def remote_of(path: pathlib.Path) -> tuple[Bucket, str] | None:
    """The bucket that has a checkpoint's shards, and its place there; None where they are here."""
    if not (path / REMOTE).is_file():
        return None
    fields = files.read_json(path / REMOTE)
    return Bucket(fields["bucket"]), fields["place"]


def describe_remote(bucket: Bucket, place: str) -> bytes:
    """What remote.json has."""
    return files.to_json({"bucket": bucket.url, "place": place})


def is_in_parts(seal: bytes) -> bool:
    """Whether a seal is of this format; one that cannot be read is, as find_damage says so."""
    try:
        return json.loads(seal).get("format_version") == FORMAT_VERSION
    except (ValueError, AttributeError):
        return True


def make_seal(
    arrays: Mapping[str, Any], indexes: Mapping[str, bytes], sizes: Mapping[str, int]
) -> bytes:
    """The seal of parts that are whole.

    Args:
      arrays: {name: [shape, dtype]}. indexes: {"parts/NAME.json": its bytes} of all processes.
      sizes: {"parts/NAME.bin": its bytes} as they were found where they were written.

    Raises:
      UserError: a part is missing or too short.
    """
    chunks: list[Chunk] = []
    sealed: dict[str, list[Any]] = {}
    for name, data in indexes.items():
        size, rows = parts.read_index(data, name)
        file = f"{name.removesuffix('.json')}.bin"
        if sizes.get(file) != size:
            raise UserError(f"{file} has {sizes.get(file)} bytes, expected {size}")
        sealed |= {name: [len(data), hashlib.sha256(data).hexdigest()], file: [size, ""]}
        chunks += rows
    parts.check_whole(arrays, chunks)
    return files.to_json(
        {"format_version": FORMAT_VERSION, "arrays": dict(arrays), "files": sealed}
    )


def find_damage(path: pathlib.Path, sealed: Mapping[str, Any]) -> str | None:
    """The damage to a checkpoint's files, or None.

    Shards in a bucket are counted only; `load` checks their content, as it reads it.

    Args:
      path: of the checkpoint. sealed: the seal's files.

    Raises:
      UserError: the bucket cannot be read.
    """
    try:
        lists = _lists(path, sealed)
    except DamagedError as error:
        return str(error)
    bins = {name: size for name, (size, digest) in sealed.items() if not digest}
    remote = remote_of(path)
    if remote is None:
        return _damaged_shard(path, bins, lists)
    bucket, place = remote
    found = bucket.details(f"{place}/{PARTS}")
    for name, size in bins.items():
        there = found.get(name.removeprefix(f"{PARTS}/"))
        if there is None or there[0] != size:
            what = "is missing" if there is None else f"has {there[0]} bytes, expected {size}"
            return f"{name} {what}"
    return None


def load(
    path: pathlib.Path, seal: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Arrays of a checkpoint as this process's devices need them.

    Args:
      path: of the checkpoint. seal: its seal. wanted: {name: jax.ShapeDtypeStruct with a sharding}.

    Raises:
      DamagedError: a part is not what was written. UserError: the bucket cannot be read.
    """
    remote = remote_of(path)

    def read(name: str, offset: int, length: int) -> bytes:
        if remote is not None:
            return remote[0].read_range(f"{remote[1]}/{name}", offset, length)
        with open(path / name, "rb") as file:
            file.seek(offset)
            return file.read(length)

    chunks = [c for rows in _lists(path, seal["files"]).values() for c in rows]
    return parts.load(wanted, seal["arrays"], chunks, read)


def _lists(path: pathlib.Path, sealed: Mapping[str, Any]) -> dict[str, list[Chunk]]:
    """The shards of every part by the part's file; lists that are not here come from the bucket."""
    remote, lists = remote_of(path), {}
    for name, (size, digest) in sealed.items():
        if not digest:
            continue
        data = (path / name).read_bytes() if (path / name).is_file() else None
        if remote is not None and (data is None or not _is_sealed(data, size, digest)):
            data = remote[0].read(f"{remote[1]}/{name}")
        if data is None:
            raise DamagedError(f"{name} is missing")
        if not _is_sealed(data, size, digest):
            raise DamagedError(f"{name} has other content than was written")
        if remote is not None and not (path / name).is_file():
            _keep(path / name, data)
        lists[f"{name.removesuffix('.json')}.bin"] = parts.read_index(data, name)[1]
    return lists


def _keep(path: pathlib.Path, data: bytes) -> None:
    """Keeps a list here for the next reading, where this host lets it."""
    with contextlib.suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, data)


def _is_sealed(data: bytes, size: int, digest: str) -> bool:
    """Whether some bytes are those that were sealed."""
    return len(data) == size and hashlib.sha256(data).hexdigest() == digest


def _damaged_shard(
    path: pathlib.Path, bins: Mapping[str, int], lists: Mapping[str, list[Chunk]]
) -> str | None:
    """The damage to shards on this host's disk."""
    for name, size in bins.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        with open(file, "rb") as stream:
            for chunk in lists[name]:
                stream.seek(chunk.offset)
                if hashlib.sha256(stream.read(chunk.size)).hexdigest() != chunk.sha256:
                    return f"{name} has other content than was written"
    return None
