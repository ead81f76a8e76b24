"""WikiText: articles put together from their headings, in any form in which it is published.

wiki.*.tokens and wiki.*.raw have a line of text in each line, Hugging Face's copy has one in each row
of Parquet. An article begins at a line " = Title = " with an empty line on either side.
" = = Section = = " is a heading of a lower level, and a line of text may have equality signs of its
own, so all of it counts. White space around a line, and its kind of line end, do not.
"""

import collections
import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence

from data_pipelines.corpora.compression import read_lines
from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record
from data_pipelines.corpora.json_lines import read_json_lines
from data_pipelines.corpora.parquet import read_parquet
from data_pipelines.corpora.sources import SourceFile, is_there

ROWS_LOOKED_AT = 64
_NUMBERED = re.compile(r"(?P<before>.*-)(?P<number>\d+)(?P<after>-of-\d+\.[^/]*)")
_logger = logging.getLogger(__name__)


def read_articles(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The articles of one file.

    The documents of a file of lines, one after the other, are the file, byte for byte. The id is the
    file's name and the title (with a number from the second article of that title on). In a file
    of rows that is one of several, the rows before the first heading belong to the previous file.
    """
    titles: collections.Counter[str] = collections.Counter()
    for offset, data in _articles(_lines(config, file, reading)):
        text = reading.decode(data.removeprefix(b"\xef\xbb\xbf"), file.path, offset)
        if text is not None:
            title = _title(text)
            if title is None:
                _logger.warning(
                    "%s: no article begins before offset %d: expected a line ' = Title = '"
                    " between empty lines",
                    file.path,
                    offset + len(data),
                )
            name = title or str(offset)
            titles[name] += 1
            number = f" [{titles[name]}]" if titles[name] > 1 else ""
            yield Record(f"{file.name}/{name}{number}", text)


def are_lines(texts: Sequence[str]) -> bool:
    """Whether the first rows of a file are lines of WikiText: each padded by spaces, some headings."""
    lines = [text for text in texts if text.strip()]
    padded = all(text.startswith(" ") and text.endswith(" \n") for text in lines)
    return padded and any(text.startswith(" = ") and text.endswith(" = \n") for text in lines)


def _lines(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[bytes]:
    """The lines of a file with their ends; its rows as lines, with those that follow in the next."""
    if not _has_rows(file):
        yield from read_lines(file, ends=True)
        return
    rows = _row_lines(config, file, reading)
    if _neighbour(file, -1) is not None:
        rows = _from_title(rows)
    yield from rows
    following = _neighbour(file, 1)
    while following is not None:
        for line, begins in _titled(_row_lines(config, following, reading)):
            if begins:
                return
            yield line
        following = _neighbour(following, 1)


def _has_rows(file: SourceFile) -> bool:
    """Whether a file has rows, of Parquet or JSON, instead of lines."""
    return file.suffix == ".parquet" or ".jsonl" in file.name or ".json." in file.name


def _row_lines(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[bytes]:
    """The rows of a file as the lines that they were; an empty row was a line of one space."""
    read = read_parquet if file.suffix == ".parquet" else read_json_lines
    for record in read(config, file, reading):
        text = record.text if record.text.strip() else " \n"
        yield (text if text.endswith("\n") else f"{text}\n").encode(errors="surrogatepass")


def _neighbour(file: SourceFile, step: int) -> SourceFile | None:
    """The file before or after one called NAME-00001-of-00003.parquet; None where there is none."""
    name, path = _NUMBERED.fullmatch(file.name), _NUMBERED.fullmatch(file.path)
    if name is None or path is None:
        return None
    number = int(name["number"]) + step
    if number < 0:
        return None
    width = len(name["number"])
    names = [f"{match['before']}{number:0{width}d}{match['after']}" for match in (name, path)]
    other = dataclasses.replace(file, name=names[0], path=names[1])
    return other if is_there(other) else None


def _from_title(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines from the first heading of an article on."""
    inside = False
    for line, begins in _titled(lines):
        inside = inside or begins
        if inside:
            yield line


def _articles(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """The start of each article, and its bytes; lines before the first heading belong to the first."""
    start, titled, pieces = 0, False, list[bytes]()
    for line, begins in _titled(lines):
        if begins:
            if titled:
                yield start, b"".join(pieces)
                start, pieces = start + sum(map(len, pieces)), []
            titled = True
        pieces.append(line)
    if pieces:
        yield start, b"".join(pieces)


def _titled(lines: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each line, and whether an article begins with it."""
    before, line = b"", next(lines, None)
    while line is not None:
        after = next(lines, None)
        alone = not before.strip() and not (after or b"").strip()
        yield line, alone and _is_title(line)
        before, line = line, after


def _is_title(line: bytes) -> bool:
    """Whether a line looks like a heading of the first level."""
    inner = line.removeprefix(b"\xef\xbb\xbf").strip()
    ends = inner.startswith(b"= ") and inner.endswith(b" =") and len(inner) > 4
    return ends and not inner.startswith(b"= = ") and not inner.endswith(b" = =")


def _title(text: str) -> str | None:
    """The title of an article; None where a file begins without one."""
    first = text.lstrip().split("\n", 1)[0].strip()
    heading = first.startswith("= ") and first.endswith(" =") and len(first) > 4
    return first.strip("= ") if heading else None
