"""Where the frames of a Zstandard file begin: each can be decompressed by itself.

    frame = header, block, block, ..., checksum       RFC 8878; a block's own header has its size
    skippable frame = magic, size, bytes              no text in it: `pzstd` and seek tables write them

A file by Zstandard's seekable format ends with a table of its frames, which is read instead of walking
from block to block.
"""

import dataclasses
import itertools
import struct
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from data_pipelines.corpora.sources import SourceFile, open_file

_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_TABLE, _TABLE_END = 0x184D2A5E, 0x8F92EAB1
_LONGEST_HEADER = 18  # bytes of a frame
_RLE, _RESERVED = 1, 3  # kinds of blocks: one byte many times, and none


def parts_of_frames(file: SourceFile, most: int) -> Iterator[SourceFile]:
    """A file in parts of whole frames, each of about so many bytes or one frame.

    A file that cannot be followed to its end is one part: whoever reads it reports that.
    """
    with open_file(file) as opened:
        cuts = _cuts(_by_table(opened, file.size), most)
        if len(cuts) == 1 or not _begin_frames(opened, cuts):
            cuts = _cuts(_by_headers(opened, file.size), most)
    if len(cuts) == 1:
        yield file
        return
    for start, stop in itertools.pairwise([*cuts, file.size]):
        yield dataclasses.replace(file, size=stop - start, start=start, stop=stop)


def _cuts(starts: list[int], most: int) -> list[int]:
    """0, and those of the frames' first bytes where a further part begins."""
    cuts = [0]
    for start in starts[1:]:
        if start - cuts[-1] >= most:
            cuts.append(start)
    return cuts


def _by_headers(file: BinaryIO, size: int) -> list[int]:
    """The first byte of each frame, from block to block; none where they do not fill the file."""
    starts, offset = list[int](), 0
    try:
        while offset < size:
            starts.append(offset)
            offset = _end_of_frame(file, offset)
    except (struct.error, zstandard.ZstdError):
        return []
    return starts if offset == size else []


def _end_of_frame(file: BinaryIO, offset: int) -> int:
    """The byte after a frame; struct.error or ZstdError where there is none."""
    header = _read(file, offset, _LONGEST_HEADER)
    (magic,) = struct.unpack_from("<I", header)
    if magic in _SKIPPABLE:
        (length,) = struct.unpack_from("<I", header, 4)
        return offset + 8 + int(length)
    has_checksum = zstandard.get_frame_parameters(header).has_checksum
    offset += zstandard.frame_header_size(header)
    is_last = False
    while not is_last:
        low, high = struct.unpack("<HB", _read(file, offset, 3))
        field = low + (high << 16)
        is_last, kind, length = bool(field & 1), field >> 1 & 3, field >> 3
        if kind == _RESERVED:
            raise zstandard.ZstdError("a block of no kind")
        offset += 3 + (1 if kind == _RLE else length)
    return offset + 4 * has_checksum


def _by_table(file: BinaryIO, size: int) -> list[int]:
    """The first byte of each frame by the seek table; none where no table fills the file."""
    try:
        count, descriptor, end = struct.unpack("<IBI", _read(file, size - 9, 9))
        width = 12 if descriptor & 0x80 else 8  # with checksums, or without
        length = count * width + 9
        first = size - length - 8
        if end != _TABLE_END or first < 0:
            return []
        table = _read(file, first, length + 8)
        if struct.unpack_from("<II", table) != (_TABLE, length):
            return []
        sizes = [struct.unpack_from("<I", table, 8 + i * width)[0] for i in range(count)]
    except (struct.error, OSError, ValueError):
        return []
    starts = list(itertools.accumulate(sizes, initial=0))
    return starts if starts[-1] == first else []


def _begin_frames(file: BinaryIO, starts: list[int]) -> bool:
    """Whether a frame begins at each of the bytes."""
    heads = (_read(file, start, 4) for start in starts)
    return all(head == zstandard.FRAME_HEADER or _is_skippable(head) for head in heads)


def _is_skippable(head: bytes) -> bool:
    """Whether a skippable frame begins so."""
    return len(head) == 4 and struct.unpack("<I", head)[0] in _SKIPPABLE


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    """Some bytes, or those up to the end."""
    file.seek(offset)
    return file.read(count)
