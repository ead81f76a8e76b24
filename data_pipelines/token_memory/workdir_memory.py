"""The token memory of a workdir: beside each revision's chunks, built where it is missing.

A revision of a database that has one gets its own before it is published, so that whoever mixes a
model with it, a server say, can go on.
"""

import pathlib

from data_pipelines.artefacts.manifest import MANIFEST_FILE
from data_pipelines.artefacts.runner import InProcess, Runner
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.token_memory.build import TokenMemoryConfig, prepare_token_memory
from data_pipelines.token_memory.memory import TokenMemory

FOLDER = "token_memory"


def prepare_and_open(
    database: ChunkDatabase,
    config: TokenMemoryConfig = TokenMemoryConfig(),
    *,
    runner: Runner = InProcess(),
) -> TokenMemory:
    """Opens the token memory of a retrieval database, after building what is missing of it.

    Args:
      database: as revisions.open_database opens it: W/chunks/train and what revisions added.
      config: of parts that are built now.
      runner: where they are built.

    Raises:
      UserError: a memory that is damaged or of another database.
    """
    places = _places(database)
    for directory, part in places:
        prepare_token_memory(directory, part, config, runner=runner)
    return TokenMemory.open([directory for directory, _ in places], database)


def open_existing(database: ChunkDatabase) -> TokenMemory | None:
    """The token memory of a retrieval database; None where a part of it has not been built."""
    if not is_built(database):
        return None
    return TokenMemory.open([directory for directory, _ in _places(database)], database)


def is_built(database: ChunkDatabase) -> bool:
    """Whether every part of a retrieval database has its token memory."""
    return all((directory / MANIFEST_FILE).is_file() for directory, _ in _places(database))


def _places(database: ChunkDatabase) -> list[tuple[pathlib.Path, ChunkDatabase]]:
    """The folder of each part's memory, and the part."""
    parts = getattr(database, "parts", (database,))
    return [(part.directory.parent.parent / FOLDER, part) for part in parts]
