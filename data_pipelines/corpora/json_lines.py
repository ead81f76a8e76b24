"""JSON lines, plain or compressed: one object a line, its text in one field."""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import zstandard

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading
from data_pipelines.corpora.folders import find_files
from retro_jax.errors import UserError

_BLOCK = 1 << 20


def read_json_lines(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, str]]:
    """The documents of one file, or of all files of a folder."""
    for name, document in read_objects(config, reading):
        yield name, document[config.text_field]


def read_objects(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same as ids and whole objects, each with a text."""
    for name, path in find_files(pathlib.Path(str(config.path)), config):
        offset = 0
        for number, line in enumerate(_lines(path), 1):
            text = reading.decode(line, str(path), offset)
            offset += len(line) + 1
            if text is not None and text.strip():
                document = _parse(text, f"{path}:{number}", config, reading)
                if document is not None:
                    id_field = config.id_field
                    yield str(document[id_field]) if id_field else f"{name}:{number}", document


def _parse(line: str, place: str, config: CorpusConfig, reading: Reading) -> dict[str, Any] | None:
    """The object of a line; None for a bad document."""
    try:
        document = json.loads(line)
    except ValueError as error:
        reading.bad(f"{place} is not valid JSON ({error}): expected one object a line")
        return None
    if not isinstance(document, dict):
        reading.bad(f"{place} holds a {type(document).__name__}: expected a JSON object")
        return None
    if not isinstance(document.get(config.text_field), str):
        reading.bad(f"{place} has no text in {config.text_field!r}: expected a string")
        return None
    if config.id_field and not isinstance(document.get(config.id_field), str | int):
        reading.bad(f"{place} has no id in {config.id_field!r}: expected a string or an integer")
        return None
    return document


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    """Lines of the decompressed file, without their ends."""
    pieces: list[bytes] = []
    with open(path, "rb") as file:
        for block in _blocks(path, file):
            first, *rest = block.split(b"\n")
            pieces.append(first)
            for piece in rest:
                yield b"".join(pieces)
                pieces = [piece]
    if any(pieces):
        yield b"".join(pieces)


def _blocks(path: pathlib.Path, file: BinaryIO) -> Iterator[bytes]:
    """The decompressed bytes; a UserError for a truncated or damaged file."""
    try:
        if path.suffix == ".zst":
            yield from _zstandard_blocks(file)
        elif path.suffix == ".gz":
            with gzip.open(file) as plain:
                yield from _read_blocks(cast(BinaryIO, plain))
        else:
            yield from _read_blocks(file)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(
            f"{path} is damaged ({error}): expected a whole {path.suffix} file"
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
