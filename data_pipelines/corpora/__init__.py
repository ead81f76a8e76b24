"""Readers of corpora: a document is (id, text, corpus). Every reader streams.

for document in read_corpus(CorpusConfig("code", "stdlib"), Reading()):
    ...
"""

import itertools
import logging
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterator

from data_pipelines.corpora.config import CODE_KINDS, KINDS, SPLITS, CorpusConfig
from data_pipelines.corpora.datasets_folder import check_folder, read_arrow
from data_pipelines.corpora.document import (
    Document,
    Reading,
    Record,
    check_unicode,
    content_id,
    short_label,
)
from data_pipelines.corpora.in_memory import TextCorpus
from data_pipelines.corpora.json_lines import parts_of_lines, read_json_lines, read_text
from data_pipelines.corpora.parquet import parts_of_rows, read_parquet
from data_pipelines.corpora.sources import SourceFile, find_files
from data_pipelines.corpora.wikipedia import FILE, installed_file, read_wikipedia
from data_pipelines.corpora.wikitext import ROWS_LOOKED_AT, are_lines, read_articles
from data_pipelines.corpora.zstandard_frames import parts_of_frames
from retro_jax.errors import UserError
from retro_jax.storage.urls import is_url

__all__ = [
    "CODE_KINDS",
    "KINDS",
    "SPLITS",
    "CorpusConfig",
    "Document",
    "Reading",
    "SourceFile",
    "TextCorpus",
    "check_reading",
    "files_of",
    "parts_of",
    "places_of",
    "read_corpus",
    "read_file",
]

_logger = logging.getLogger(__name__)

_READERS: dict[str, Callable[[CorpusConfig, SourceFile, Reading], Iterator[Record]]] = {
    "wikipedia": read_wikipedia,
    "stdlib": read_text,
    "packages": read_text,
    "text": read_text,
    "jsonl": read_json_lines,
    "pile": read_json_lines,
    "parquet": read_parquet,
    "datasets": read_arrow,
    "wikitext": read_articles,
    "wikitext_raw": read_articles,
}
_Cut = Callable[[SourceFile, int], Iterator[SourceFile]]
_CUTS: dict[str, _Cut] = {  # JSON lines, by the end of a file's name
    ".jsonl": parts_of_lines,
    ".ndjson": parts_of_lines,
    ".json": parts_of_lines,
    ".zst": parts_of_frames,
}


def read_corpus(config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    """Reads all documents of a corpus, one after the other.

    Documents of nothing but whitespace are left out and counted. `max_documents`, `max_bytes` and
    `drop_duplicates` need all documents, and are for the documents stage to heed.

    Args:
      config: the corpus.
      reading: whether to continue after a bad document; its counts grow while this runs.

    Raises:
      UserError: a missing or empty corpus, a damaged file, or a bad document: it names the file, and
        the byte offset where that is what is wrong.
    """
    for file in files_of(config):
        yield from read_file(config, file, reading)
    check_reading(config, reading)


def files_of(config: CorpusConfig) -> Iterator[SourceFile]:
    """The files that a corpus is made of; each can be read by itself."""
    root = config.path
    if root is None and config.kind == "wikipedia":
        root = installed_file()
    elif root is None:
        root = sysconfig.get_path("stdlib" if config.kind == "stdlib" else "purelib")
    elif config.kind == "wikipedia" and not (is_url(root) or pathlib.Path(root).is_file()):
        raise UserError(f"corpus {config.name!r}: {root} is missing: expected a {FILE}")
    if config.kind == "datasets" and not is_url(root):
        check_folder(config)
    yield from find_files(root, config)


def parts_of(config: CorpusConfig, file: SourceFile, most: int) -> Iterator[SourceFile]:
    """A file in parts that workers read by themselves: of about so many bytes.

    Parts of Parquet are row groups, those of JSON lines begin anywhere, or with a Zstandard frame.
    Otherwise compressed files and other kinds are one part, and so are rows that are lines of WikiText.
    """
    cut = _cut_of(config, file)
    if file.size <= most or cut is None or (_may_be_lines(config) and _has_lines(config, file)):
        yield file
    else:
        yield from cut(file, most)


def _cut_of(config: CorpusConfig, file: SourceFile) -> _Cut | None:
    """How a file is cut into parts; None for one that is read whole."""
    if config.kind == "parquet":
        return parts_of_rows
    return _CUTS.get(file.suffix) if config.kind in ("jsonl", "pile") else None


def read_file(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Document]:
    """The documents of one file of a corpus, and as `read_corpus`."""
    if config.kind == "stdlib" and config.path is None:
        reading.source = f"{platform.python_implementation()} {platform.python_version()}"
    for record in _records(config, file, reading):
        if not check_unicode(record, f"corpus {config.name!r}", reading):
            continue
        if record.label is not None:
            label = reading.label(record.label)
            if config.labels is not None and label not in config.labels:
                continue
        if not record.text.strip():
            reading.counts["empty"] += 1
        else:
            reading.counts["documents"] += 1
            yield Document(_id_of(record, config), record.text, _corpus_name(record, config))


def places_of(config: CorpusConfig, corpus: str, document_id: str) -> Iterator[str]:
    """Where the documents of an id are, as FILE:LINE or FILE: the corpus is read again.

    Args:
      config: the corpus.
      corpus: its name, or that of one label of it.
      document_id: the id.
    """
    for file in files_of(config):
        for record in _records(config, file, Reading(skip_bad=True)):
            if record.id == document_id and _corpus_name(record, config) == corpus:
                yield record.place or file.path


def _corpus_name(record: Record, config: CorpusConfig) -> str:
    """The name of a document's corpus."""
    return config.name if record.label is None else f"{config.name}-{short_label(record.label)}"


def _id_of(record: Record, config: CorpusConfig) -> str:
    """The id of a document: a hash of its text where the corpus has no field for it."""
    return content_id(record.text) if config.ids_from_content else record.id


def _records(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The records of a file; rows that are WikiText's lines are put together as articles."""
    records = _READERS[config.kind](config, file, reading)
    if file.stop or not _may_be_lines(config):
        yield from records
        return
    first = list(itertools.islice(records, ROWS_LOOKED_AT))
    if not are_lines([record.text for record in first]):
        yield from itertools.chain(first, records)
        return
    _logger.warning(
        "%s has a line of WikiText in each row: its articles are put together again", file.path
    )
    yield from read_articles(config, file, reading)


def _may_be_lines(config: CorpusConfig) -> bool:
    """Whether rows are looked at for lines of WikiText."""
    return config.kind in ("jsonl", "parquet", "datasets") and not (
        config.label_path or config.id_field
    )


def _has_lines(config: CorpusConfig, file: SourceFile) -> bool:
    """Whether the first rows of a file are lines of WikiText."""
    records = _READERS[config.kind](config, file, Reading(skip_bad=True))
    return are_lines([record.text for record in itertools.islice(records, ROWS_LOOKED_AT)])


def check_reading(config: CorpusConfig, reading: Reading) -> None:
    """Raises unless a corpus that was read to its end had the expected documents and labels."""
    source = config.path or f"the {config.kind} corpus"
    unknown = sorted(set(config.labels or ()) - set(reading.labels))
    if unknown:
        labels = ", ".join(sorted(reading.labels)) or "none"
        raise UserError(
            f"corpus {config.name!r}: {source} has no label {unknown[0]!r}: expected some of {labels}"
        )
    if not reading.counts["documents"]:
        first = (
            f"; {reading.counts['bad']} are bad: {reading.first_bad}" if reading.first_bad else ""
        )
        raise UserError(
            f"corpus {config.name!r}: {source} holds no documents: expected at least one{first}"
        )
