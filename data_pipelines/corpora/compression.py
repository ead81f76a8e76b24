"""The bytes of a file, decompressed where its name ends in .gz or .zst."""

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

import zstandard

from data_pipelines.corpora.sources import SourceFile, open_file
from retro_jax.errors import UserError

_BLOCK = 1 << 20
_LONGEST_WINDOW = 1 << 31  # bytes; what `zstd --ultra --long=31` writes at most
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_whole(file: SourceFile) -> bytes:
    """A file's bytes, without a byte order mark at their start.

    Raises:
      UserError: a compressed file that is truncated or damaged.
    """
    with open_file(file) as opened:
        return b"".join(_blocks(file, opened)).removeprefix(BYTE_ORDER_MARK)


def read_lines(file: SourceFile, *, ends: bool = False) -> Iterator[bytes]:
    """Lines of a file, as `read_whole`.

    Args:
      file: the file.
      ends: whether lines keep the newline that ends them.
    """
    end = b"\n" if ends else b""
    pieces: list[bytes] = []
    with open_file(file) as opened:
        for block in _blocks(file, opened):
            first, *rest = block.split(b"\n")
            pieces.append(first)
            for piece in rest:
                yield b"".join(pieces) + end
                pieces = [piece]
    if any(pieces):
        yield b"".join(pieces)


def _blocks(file: SourceFile, opened: BinaryIO) -> Iterator[bytes]:
    """The decompressed bytes; a UserError for a truncated or damaged file."""
    try:
        if file.suffix == ".zst":
            yield from _zstandard_blocks(opened)
        elif file.suffix == ".gz":
            with gzip.open(opened) as plain:
                yield from _read_blocks(cast(BinaryIO, plain))
        else:
            yield from _read_blocks(opened)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(
            f"{file.path} is damaged ({error}): expected a whole {file.suffix} file"
        ) from error


def _read_blocks(file: BinaryIO) -> Iterator[bytes]:
    """A file's bytes."""
    while block := file.read(_BLOCK):
        yield block


def _zstandard_blocks(file: BinaryIO) -> Iterator[bytes]:
    """All frames of a Zstandard file; EOFError where the last one is cut off."""
    frame = None
    for data in _read_blocks(file):
        while data:
            frame = frame or _decompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame ends too early")


def _decompressor() -> zstandard.ZstdDecompressor:
    """One that takes frames of any window; the library's own limit is 128 MiB."""
    return zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
