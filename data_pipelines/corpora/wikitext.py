"""WikiText's wiki.*.tokens files: articles rebuilt from their headings.

An article begins at a line " = Title = " with an empty line on either side. " = = Section = = " is a
heading of a lower level, and a line of text may have equality signs of its own, so all of it counts.
"""

import collections
import pathlib
from collections.abc import Iterator

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading
from data_pipelines.corpora.folders import find_files


def read_wikitext(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, str]]:
    """The articles of one file, or of all of a folder.

    Concatenated, a file's documents are the file, byte for byte. The id is the file's name and the
    title (with a number from the second article of that title on).
    """
    for name, path in find_files(pathlib.Path(str(config.path)), config):
        titles: collections.Counter[str] = collections.Counter()
        for offset, data in _articles(path):
            text = reading.decode(data, str(path), offset)
            if text is not None:
                title = _title(text, offset)
                titles[title] += 1
                number = f" [{titles[title]}]" if titles[title] > 1 else ""
                yield f"{name}/{title}{number}", text


def _articles(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Where each article begins, and its bytes; what stands before the first heading is of the first."""
    start, titled, pieces = 0, False, list[bytes]()
    before = b""
    with open(path, "rb") as file:
        line = file.readline()
        while line:
            after = file.readline()
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
