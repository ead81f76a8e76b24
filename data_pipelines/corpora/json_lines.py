"""JSON lines, plain or compressed: one object a line, its text in one field."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from data_pipelines.corpora.compression import (
    BYTE_ORDER_MARK,
    read_lines,
    read_lines_of_frames,
    read_whole,
)
from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record, record_of
from data_pipelines.corpora.sources import SourceFile, open_file


def read_json_lines(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The documents of one file; the file and line are ids without an id_field."""
    for record, _ in read_json_objects(config, file, reading):
        yield record


def read_json_objects(
    config: CorpusConfig, file: SourceFile, reading: Reading
) -> Iterator[tuple[Record, dict[str, Any]]]:
    """The documents of one file with the objects that they are from."""
    place = file.path
    lines: Iterable[tuple[int, tuple[int, bytes]]]
    if not file.stop:
        lines = enumerate(_with_offsets(read_lines(file)), 1)
    else:  # nobody has counted the lines before the part: they have number 0
        is_packed = file.suffix == ".zst"
        part = read_lines_of_frames(file) if is_packed else _lines_within(file)
        lines = zip(itertools.repeat(0), part)
        place += f" (the text from byte {file.start:,} on)" if is_packed else ""
    for number, (offset, line) in lines:
        text = reading.decode(line.removeprefix(BYTE_ORDER_MARK), place, offset)
        if text is not None and text.strip():
            location = f"{file.path}:{number}" if number else f"{place} at byte {offset:,}"
            fields = _parse(text, location, reading)
            if fields is not None:
                record = record_of(fields, f"{file.name}:{number}", location, config, reading)
                if record is not None:
                    yield record, fields


def _with_offsets(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with the bytes before each."""
    offset = 0
    for line in lines:
        yield offset, line
        offset += len(line) + 1


def _lines_within(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a part of a plain file, each with the bytes before it."""
    with open_file(file) as opened:
        offset = file.start
        if offset:  # a line that began before belongs to the part before, whole
            opened.seek(offset - 1)
            offset += len(opened.readline()) - 1
        while offset < file.stop and (line := opened.readline()):
            yield offset, line.removesuffix(b"\n")
            offset += len(line)


def parts_of_lines(file: SourceFile, most: int) -> Iterator[SourceFile]:
    """A plain file in parts of about so many bytes."""
    count = -(-file.size // most)
    cuts = [file.size * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(cuts):
        yield dataclasses.replace(file, size=stop - start, start=start, stop=stop)


def _parse(line: str, location: str, reading: Reading) -> dict[str, Any] | None:
    """The object of a line; None for a bad document."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        reading.bad(f"{location} is not valid JSON ({error}): expected one object a line")
        return None
    if not isinstance(fields, dict):
        reading.bad(f"{location} holds a {type(fields).__name__}: expected a JSON object")
        return None
    return fields


def read_text(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """One file, plain or compressed, as one document; the id is its relative path."""
    text = reading.decode(read_whole(file), file.path)
    if text is not None:
        yield Record(file.name, text)
