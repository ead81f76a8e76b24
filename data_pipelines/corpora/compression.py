"""The bytes of a file, decompressed where its name ends in .gz, .zst, .bz2 or .xz."""

import bz2
import dataclasses
import functools
import gzip
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, cast

import zstandard

from data_pipelines.corpora.sources import SourceFile, open_file
from retro_jax.errors import UserError

_BLOCK = 1 << 20
_LONGEST_WINDOW = 1 << 31  # bytes; what `zstd --ultra --long=31` writes at most
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Of one stream each. bz2.open and lzma.open take a damaged later stream for the end of the file.
_STREAMS: dict[str, Callable[[], Any]] = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ),
}
# How compressed files begin.
_MAGIC = {
    b"\x1f\x8b\x08": ".gz",
    zstandard.FRAME_HEADER: ".zst",
    b"\xfd7zXZ\x00": ".xz",
    b"BZh91AY&SY": ".bz2",
}


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
    with open_file(file) as opened:
        yield from _lines(_blocks(file, opened), b"\n" if ends else b"")


def read_lines_of_frames(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """Lines of a part that is made of whole Zstandard frames, each with the bytes of text before it.

    A line belongs to the part that has the byte before it, so no part needs the text before its own:

        text of three parts   {"a":1}NL{"b"  |  :2}NL{"c":3}NL  |  {"d":4}NL
        their lines           a, b           |  c, d            |

    Raises:
      UserError: a frame that is truncated or damaged, or that does not end with the part.
    """
    count = 0  # bytes of text in the frames of the part

    def own() -> Iterator[bytes]:
        nonlocal count
        for block in _blocks(file, opened):
            count += len(block)
            yield block

    with open_file(file) as opened:
        after = _blocks(dataclasses.replace(file, start=file.stop, stop=0), opened)
        offset = 0
        for line in _lines(itertools.chain(own(), after)):
            if offset > count:
                return
            if offset or not file.start:
                yield offset, line
            offset += len(line) + 1


def _lines(blocks: Iterable[bytes], end: bytes = b"") -> Iterator[bytes]:
    """The lines of a text in blocks, each with `end` instead of its newline."""
    pieces: list[bytes] = []
    for block in blocks:
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
        if file.suffix in (".zst", ".gz", *_STREAMS):
            if not file.start and not opened.read(1):
                raise EOFError("it has no byte")
            opened.seek(file.start)
        if file.suffix == ".zst":
            length = file.stop - file.start if file.stop else -1
            yield from _zstandard_blocks(_read_blocks(opened, length))
        elif file.suffix == ".gz":
            with gzip.open(opened) as plain:
                yield from _read_blocks(cast(BinaryIO, plain))
        elif file.suffix in _STREAMS:
            padding = b"\0" if file.suffix == ".xz" else b""  # which may be between streams
            yield from _stream_blocks(_read_blocks(opened), _STREAMS[file.suffix], padding)
        else:
            yield from _plain_blocks(file, opened)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(
            f"{file.path} is damaged ({error}): expected a whole {file.suffix} file"
        ) from error
    except OSError as error:
        if file.suffix != ".bz2" or error.errno is not None:  # bz2 has no error of its own
            raise
        raise UserError(
            f"{file.path} is damaged ({error}): expected a whole {file.suffix} file"
        ) from error


def _plain_blocks(file: SourceFile, opened: BinaryIO) -> Iterator[bytes]:
    """A file's bytes as they are; a UserError for compressed ones under another name."""
    for number, block in enumerate(_read_blocks(opened)):
        for magic, suffix in _MAGIC.items():
            if not number and block.startswith(magic):
                raise UserError(f"{file.path} is compressed: expected a name that ends in {suffix}")
        yield block


def _read_blocks(file: BinaryIO, most: int = -1) -> Iterator[bytes]:
    """A file's bytes from where it is read; so many at most, unless that is negative."""
    while block := file.read(_BLOCK if most < 0 else min(_BLOCK, most)):
        most -= len(block) if most >= 0 else 0
        yield block


def _zstandard_blocks(compressed: Iterable[bytes]) -> Iterator[bytes]:
    """The text of Zstandard frames; EOFError where the last one is cut off."""
    frame = None
    for data in compressed:
        while data:
            frame = frame or _decompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame ends too early")


def _stream_blocks(
    compressed: Iterable[bytes], new: Callable[[], Any], padding: bytes
) -> Iterator[bytes]:
    """The text of streams, each by a decompressor of its own; EOFError where the last one is cut off."""
    stream = None
    for data in compressed:
        while data:
            if stream is None:
                data = data.lstrip(padding) if padding else data
                if not data:
                    break
                stream = new()
            yield stream.decompress(data, _BLOCK)
            while not stream.eof and not stream.needs_input:
                yield stream.decompress(b"", _BLOCK)
            data = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
    if stream is not None:
        raise EOFError("the last stream ends too early")


def _decompressor() -> zstandard.ZstdDecompressor:
    """One that takes frames of any window; the library's own limit is 128 MiB."""
    return zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
