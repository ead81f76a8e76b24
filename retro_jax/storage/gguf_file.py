"""GGUF files: metadata, and tensors as maps of the file; the package gguf dequantises them.

"GGUF", version 2 or 3, numbers of tensors and of settings     little-endian throughout
settings    name, type, value; a string is its length and its bytes, an array its type and length
tensors     name, dimensions (the last of NumPy's shape first), type, offset of its data
data        aligned to general.alignment bytes
"""

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np

from retro_jax.errors import UserError

INSTALL = "expected `pip install retro-jax[fit]`"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_ALIGNMENT = 32
_DEEPEST = 16  # arrays within arrays: no file has two, and deep ones would end the recursion
# By the type's number: struct's letter, for types of a fixed size.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape in NumPy's order, its type, and its bytes or numbers as a map.

    Quantised data are uint8 [rows, bytes in a row]; others have the shape and dtype of the tensor.
    """

    shape: tuple[int, ...]
    type: Any
    mapped: np.ndarray

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last) along axis 0, dequantised to float32 where they are quantised.

        Raises:
          UserError: a type that the package gguf does not dequantise.
        """
        import gguf

        block = self.mapped[first:last]
        if block.dtype != np.uint8:
            return block
        try:
            return gguf.dequantize(block, self.type)
        except NotImplementedError as error:
            types = "one of those that the package gguf dequantises"
            raise UserError(f"GGUF tensor type {self.type.name}: expected {types}") from error

    def data(self) -> np.ndarray:
        """Its bytes as they are in the file."""
        return self.mapped.reshape(-1).view(np.uint8)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An open file: its metadata with plain values, and its tensors by name."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Opens a GGUF file; nothing but its metadata is read.

    Raises:
      UserError: no such file, the package gguf is not installed, or the file is no GGUF or truncated.
    """
    location = pathlib.Path(path)
    if not location.is_file():
        raise UserError(f"{location} is missing: expected a GGUF file")
    try:
        import gguf  # noqa: F401  # asked for here, before anything is read
    except ImportError as error:
        raise UserError(f"{location}: the package gguf is not installed: {INSTALL}") from error
    with open(location, "rb") as file:
        if file.read(4) != _MAGIC:
            raise UserError(
                f"{location} does not begin with {_MAGIC.decode()}: expected a GGUF file"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Reader(location, data))


class _Reader:
    """Reads values one after the other."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, len(_MAGIC)

    def number(self, letter: str) -> Any:
        """One number of struct's type."""
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        """A string."""
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of a type's number, within so many arrays."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.damaged(f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if depth == _DEEPEST:
            raise self.damaged(f"more than {_DEEPEST} arrays within each other")
        if inner not in _NUMBERS:
            return [self.value(inner, depth + 1) for _ in range(count)]
        dtype = np.dtype(_NUMBERS[inner]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def take(self, count: int) -> bytes:
        """Some bytes."""
        end = self.position + count
        if end > len(self.data):
            raise self.damaged(f"{len(self.data)} bytes, and needs {end} or more")
        content = self.data[self.position : end]
        self.position = end
        return content

    def damaged(self, defect: str) -> UserError:
        """The error of a file that contradicts its header."""
        return UserError(f"{self.path} has {defect}: expected a whole GGUF file, not truncated")


def _parse(reader: _Reader) -> GgufFile:
    """Metadata and tensors."""
    version = reader.number("I")
    if version not in _VERSIONS:
        raise UserError(f"{reader.path} has GGUF version {version}: expected one of {_VERSIONS}")
    tensors, settings = reader.number("Q"), reader.number("Q")
    metadata = {}
    for _ in range(settings):
        name, kind = reader.text(), reader.number("I")
        if name in metadata:
            raise reader.damaged(f"the key {name} twice")
        metadata[name] = reader.value(kind)
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name, axes = reader.text(), reader.number("I")
        shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
        if name in entries:
            raise reader.damaged(f"the tensor {name} twice")
        entries[name] = (shape, reader.number("I"), reader.number("Q"))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(
            f"{reader.path}: general.alignment is {alignment!r}: expected a positive integer"
        )
    start = -(-reader.position // alignment) * alignment
    mapped = np.memmap(reader.path, np.uint8, "r")
    tensors_by_name = {
        name: _tensor(reader, mapped[start + offset :], name, shape, kind)
        for name, (shape, kind, offset) in entries.items()
    }
    return GgufFile(reader.path, metadata, tensors_by_name)


def _tensor(
    reader: _Reader, data: np.ndarray, name: str, shape: tuple[int, ...], kind: int
) -> GgufTensor:
    """The tensor at the beginning of some bytes."""
    import gguf

    try:
        tensor_type = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise reader.damaged(f"tensor {name} of type {kind}") from error
    block, size = gguf.GGML_QUANT_SIZES[tensor_type]
    count = math.prod(shape)
    if not shape or count == 0 or shape[-1] % block:
        raise reader.damaged(f"tensor {name} of shape {shape} in blocks of {block}")
    if len(data) < count // block * size:
        raise reader.damaged(f"{len(reader.data)} bytes, too few for tensor {name}")
    content = data[: count // block * size]
    plain = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    if tensor_type.name in plain:
        return GgufTensor(shape, tensor_type, content.view(plain[tensor_type.name]).reshape(shape))
    rows = (*shape[:-1], shape[-1] // block * size)
    return GgufTensor(shape, tensor_type, content.reshape(rows))
