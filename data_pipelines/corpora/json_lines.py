"""JSON lines, plain or compressed: one object a line, its text in one field."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import zstandard

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record, record_of
from data_pipelines.corpora.sources import SourceFile, find_files, open_file
from retro_jax.errors import UserError

_BLOCK = 1 << 20


def read_json_lines(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The documents of one file; without an id_field the file and line are the id."""
    for record, _ in _read(config, file, reading):
        yield record


def read_objects(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and whole objects, each with a text, of one file or of all files of a folder."""
    for file in find_files(str(config.path), config):
        for record, fields in _read(config, file, reading):
            yield record.id, fields


def _read(
    config: CorpusConfig, file: SourceFile, reading: Reading
) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Documents with the objects that they are from."""
    offset = 0
    for number, line in enumerate(_lines(file), 1):
        text = reading.decode(line, file.path, offset)
        offset += len(line) + 1
        if text is not None and text.strip():
            place = f"{file.path}:{number}"
            fields = _parse(text, place, reading)
            if fields is not None:
                record = record_of(fields, f"{file.name}:{number}", place, config, reading)
                if record is not None:
                    yield record, fields


def _parse(line: str, place: str, reading: Reading) -> dict[str, Any] | None:
    """The object of a line; None for a bad document."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        reading.bad(f"{place} is not valid JSON ({error}): expected one object a line")
        return None
    if not isinstance(fields, dict):
        reading.bad(f"{place} holds a {type(fields).__name__}: expected a JSON object")
        return None
    return fields


def _lines(file: SourceFile) -> Iterator[bytes]:
    """Lines of the decompressed file, without their ends."""
    pieces: list[bytes] = []
    with open_file(file) as opened:
        for block in _blocks(file, opened):
            first, *rest = block.split(b"\n")
            pieces.append(first)
            for piece in rest:
                yield b"".join(pieces)
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
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame ends too early")


def read_text(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """One file as one document; the id is its relative path."""
    with open_file(file) as opened:
        data = opened.read()
    text = reading.decode(data, file.path)
    if text is not None:
        yield Record(file.name, text)
