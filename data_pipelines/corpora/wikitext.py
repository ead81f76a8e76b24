"""WikiText's wiki.*.tokens and wiki.*.raw files: articles rebuilt from their headings.

An article begins at a line " = Title = " with an empty line on either side. " = = Section = = " is a
heading of a lower level, and a line of text may have equality signs of its own, so all of it counts.
"""

import collections
from collections.abc import Iterator

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record
from data_pipelines.corpora.sources import SourceFile, find_files, open_file


def read_wikitext(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, str]]:
    """Ids and texts of the articles of one file, or of all of a folder."""
    for file in find_files(str(config.path), config):
        for record in read_articles(config, file, reading):
            yield record.id, record.text


def read_articles(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The articles of one file.

    Concatenated, a file's documents are the file, byte for byte. The id is the file's name and the
    title (with a number from the second article of that title on).
    """
    titles: collections.Counter[str] = collections.Counter()
    for offset, data in _articles(file):
        text = reading.decode(data, file.path, offset)
        if text is not None:
            title = _title(text, offset)
            titles[title] += 1
            number = f" [{titles[title]}]" if titles[title] > 1 else ""
            yield Record(f"{file.name}/{title}{number}", text)


def _articles(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """Where each article begins, and its bytes; what stands before the first heading is of the first."""
    start, titled, pieces = 0, False, list[bytes]()
    before = b""
    with open_file(file) as opened:
        line = opened.readline()
        while line:
            after = opened.readline()
            if _is_title(line) and not before.strip() and not after.strip():
                if titled:
                    yield start, b"".join(pieces)
                    start, pieces = start + sum(map(len, pieces)), []
                titled = True
            pieces.append(line)
            before, line = line, after
    if pieces:
        yield start, b"".join(pieces)


def _is_title(line: bytes) -> bool:
    """Whether a line looks like a heading of the first level."""
    inner = line.rstrip(b"\n")
    ends = inner.startswith(b" = ") and inner.endswith(b" = ") and len(inner) > 6
    return ends and not inner.startswith(b" = = ") and not inner.endswith(b" = = ")


def _title(text: str, offset: int) -> str:
    """The title of an article, or where it begins in a file that starts without one."""
    first = text.lstrip("\n ").split("\n", 1)[0]
    heading = first.startswith("= ") and first.endswith(" = ")
    return first.strip("= ") if heading else str(offset)
