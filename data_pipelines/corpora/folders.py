"""Corpora in which every file is a document: folders of text, Python's library, installed packages."""

from collections.abc import Iterator

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record
from data_pipelines.corpora.sources import SourceFile, open_file


def read_text(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """One file as one document; the id is its relative path."""
    with open_file(file) as opened:
        data = opened.read()
    text = reading.decode(data, file.path)
    if text is not None:
        yield Record(file.name, text)
