"""The token memory of a workdir: beside each revision's chunks, built where it is missing."""

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
    databases = getattr(database, "parts", (database,))
    directories = [part.directory.parent.parent / FOLDER for part in databases]
    for directory, part in zip(directories, databases, strict=True):
        prepare_token_memory(directory, part, config, runner=runner)
    return TokenMemory.open(directories, database)
