"""Readers of corpora: a document is (id, text, corpus). Every reader streams.

for document in read_corpus(CorpusConfig("code", "stdlib"), Reading()):
    ...
"""

from collections.abc import Callable, Iterator

from data_pipelines.corpora.config import CODE_KINDS, KINDS, SPLITS, CorpusConfig
from data_pipelines.corpora.document import Document, Reading
from data_pipelines.corpora.folders import read_packages, read_stdlib, read_text
from data_pipelines.corpora.json_lines import read_json_lines
from data_pipelines.corpora.wikipedia import read_wikipedia
from data_pipelines.corpora.wikitext import read_wikitext
from retro_jax.errors import UserError

__all__ = ["CODE_KINDS", "KINDS", "SPLITS", "CorpusConfig", "Document", "Reading", "read_corpus"]

_READERS: dict[str, Callable[[CorpusConfig, Reading], Iterator[tuple[str, str]]]] = {
    "wikipedia": read_wikipedia,
    "stdlib": read_stdlib,
    "packages": read_packages,
    "text": read_text,
    "jsonl": read_json_lines,
    "wikitext": read_wikitext,
}


def read_corpus(config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    """Reads all documents of a corpus, one after the other.

    Documents of nothing but whitespace are left out and counted. `max_documents`, `max_bytes` and
    `drop_duplicates` need all documents, and are for the documents stage to heed.

    Args:
      config: the corpus.
      reading: whether to go on after a bad document; its counts grow while this runs.

    Raises:
      UserError: a missing or empty corpus, a damaged file, or a bad document: it names the file, and
        the byte offset where that is what is wrong.
    """
    for name, text in _READERS[config.kind](config, reading):
        if not text.strip():
            reading.counts["empty"] += 1
        elif _is_unicode(name, text, config, reading):
            reading.counts["documents"] += 1
            yield Document(name, text, config.name)
    if not reading.counts["documents"]:
        place = config.path or f"the {config.kind} corpus"
        raise UserError(
            f"corpus {config.name!r}: {place} holds no documents: expected at least one"
        )


def _is_unicode(name: str, text: str, config: CorpusConfig, reading: Reading) -> bool:
    """Whether id and text can be written as UTF-8: JSON can spell a half of a surrogate pair."""
    for what, value in (("id", name), ("text", text)):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            reading.bad(
                f"corpus {config.name!r}: the {what} of document {name!a} has a lone surrogate"
                f" at character {error.start}: expected valid Unicode"
            )
            return False
    return True
