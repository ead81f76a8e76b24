"""Files that are either whole or not there, and errors of writing them in one line."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, cast

import numpy as np

from retro_jax.distributed import processes
from retro_jax.errors import UserError, reason_of

TEMPORARY = ".tmp-"
_BLOCK = 1 << 20


def plain(value: Any) -> Any:
    """The value as it comes back from JSON: dataclasses are mappings, tuples lists, NumPy numbers plain."""
    return json.loads(json.dumps(value, default=_plain, allow_nan=False))


def _plain(value: Any) -> Any:
    """Dataclasses and NumPy's scalars for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot stand in a manifest")


def absolute(path: str | os.PathLike[str]) -> str:
    """The path as worker processes, which run in other directories, find it."""
    return str(pathlib.Path(path).absolute())


def to_json(value: Any) -> bytes:
    """Canonical JSON: one byte string for one value."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    return (text + "\n").encode()


def read_json(path: pathlib.Path, *needed: str) -> dict[str, Any]:
    """A JSON object that has the fields `needed`, or a UserError."""
    fields = parse_json(path.read_bytes(), path)
    missing = [name for name in needed if name not in fields]
    if missing:
        raise UserError(
            f"{path} has no field {missing[0]!r}: expected a file as it was written; move it away and"
            " run its command again"
        )
    return fields


def read_text_lines(path: pathlib.Path, expected: str) -> list[str]:
    """The lines of a file of UTF-8 text, without their ends (\n or \r\n) or a byte order mark.

    Args:
      path: of the file. expected: what it should be, for messages.

    Raises:
      UserError: it cannot be read, or is no UTF-8 text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected {expected}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        place = f"byte 0x{byte:02x} at offset {error.start}"
        raise UserError(f"{path} has {place}: expected {expected}, in UTF-8") from error
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(data: bytes, path: str | os.PathLike[str], kind: type = dict) -> Any:
    """A JSON object, or list, in some bytes, or a UserError that names where they are from."""
    try:
        fields = json.loads(data)
        if b"\\u" in data:  # JSON can spell half a surrogate pair, which is no text
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, kind):
        expected = "JSON object" if kind is dict else kind.__name__
        raise UserError(f"{path} holds a {type(fields).__name__}: expected a {expected}")
    return fields


def measure(path: pathlib.Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


class _Hashing:
    """A file open for writing that hashes the bytes written."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        """Writes and hashes."""
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self._file.write(data)

    def writelines(self, lines: Iterable[bytes]) -> None:
        """Writes them one by one."""
        for line in lines:
            self.write(line)


def write_hashed(path: pathlib.Path, writer: Callable[[BinaryIO], None]) -> tuple[int, str]:
    """Runs the writer on a new file; the bytes are on the disk when it returns."""
    with open(path, "wb", buffering=_BLOCK) as file:
        hashing = _Hashing(file)
        writer(cast(BinaryIO, hashing))
        file.flush()
        os.fsync(file.fileno())
    return hashing.size, hashing.digest.hexdigest()


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """A small file under a temporary name, then renamed."""
    write_whole(path, lambda file: cast(None, file.write(data)))


def write_whole(path: pathlib.Path, writer: Callable[[BinaryIO], None]) -> tuple[int, str]:
    """Runs the writer on a temporary file, then renames it: its size and SHA-256."""
    with temporary_name(path) as temporary:
        size, digest = write_hashed(temporary, writer)
        replace(temporary, path)
    return size, digest


def replace(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a file that is whole to its place, safe from a power cut."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_arrays(path: pathlib.Path, arrays: Iterable[np.ndarray]) -> None:
    """Several arrays, one after the other, in a file that is whole or not there."""

    def write(file: BinaryIO) -> None:
        for array in arrays:
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)

    write_whole(path, write)


def read_arrays(path: pathlib.Path, count: int) -> list[np.ndarray]:
    """The first `count` arrays that `write_arrays` wrote."""
    with open(path, "rb") as file:
        return [np.load(file) for _ in range(count)]


def matching(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """Files of a folder by name, ascending, without those that a killed process had not finished."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(TEMPORARY))


@contextlib.contextmanager
def temporary_name(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name in the directory of `path`; no such file is left behind."""
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}-{path.name}"
    try:
        with writing(path, temporary):
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: pathlib.Path, temporary: pathlib.Path | None = None) -> Iterator[None]:
    """Turns an OSError of writing (a full disk, no permission) into one UserError naming the file."""
    try:
        yield
    except OSError as error:
        # An error of reading something else inside a writer carries that file's own name.
        prefixes = (str(path), str(temporary))
        if error.filename is not None and not str(error.filename).startswith(prefixes):
            raise
        raise UserError(f"{path} cannot be written: {reason_of(error)}") from error


def sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_array(path: pathlib.Path) -> np.ndarray:
    """A .npy file of launch.evaluate's."""
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: move it away and run launch.evaluate again") from error


def write_array(path: pathlib.Path, values: np.ndarray) -> None:
    """A .npy file, whole or not at all; its folder is created. Of several processes the first writes."""
    if not processes.is_first():
        return
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: np.save(file, values))
