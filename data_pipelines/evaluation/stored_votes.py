"""A token memory's votes on a split, kept as W/evaluation/SPLIT-votes-ID.npy and read again."""

import dataclasses
import hashlib
import pathlib

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.evaluation.splits import Split
from data_pipelines.token_memory.memory import LONGEST, MOST_VOTES, TokenMemory
from data_pipelines.token_memory.text_votes import TextVotes, votes_on
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from retro_jax.distributed import processes
from retro_jax.distributed.progress import progress_bar
from retro_jax.errors import UserError
from retro_jax.storage import files

# Their own documents are found by the names of these: what mixes models reads the first four.
COLUMNS = tuple(field.name for field in dataclasses.fields(TextVotes))


def memory_of(database: ChunkDatabase) -> TokenMemory:
    """The token memory of a workdir's database, which the first process builds where it is missing."""

    def build() -> str:
        prepare_and_open(database)
        return ""

    processes.from_first(build)
    return prepare_and_open(database)


def stored_votes(
    memory: TokenMemory, split: Split, text: np.ndarray, folder: pathlib.Path
) -> TextVotes:
    """The memory's votes on a split, read where they are there already.

    Args:
      memory: of the retrieval database. split: the text. text: [n, 64] bool, its tokens that count.
      folder: W/evaluation.

    Raises:
      UserError: the memory has another tokeniser than the split.
    """
    ours, theirs = (_tokeniser(each) for each in (split.database, memory.database))
    if ours != theirs:
        raise UserError(
            f"{split.database.directory} has the tokeniser {ours}: expected {theirs}, that of the"
            " token memory"
        )
    hashes = [*memory.hashes, memory.database.manifest.hash, split.database.manifest.hash]
    digest = hashlib.sha256(files.to_json([hashes, LONGEST, MOST_VOTES, *COLUMNS]))
    digest.update(split.ids.tobytes() + text.tobytes())
    path = folder / f"{split.name}-votes-{digest.hexdigest()[:12]}.npy"
    if not processes.as_first([path.is_file()])[0]:
        with progress_bar(len(split.ids), "token memory: look-up", "chunk") as bar:
            found = votes_on(memory, split.database, split.ids, text, on_chunks=bar.update)
        processes.from_first(lambda: _write(path, found))
    return TextVotes(*files.read_arrays(path, len(COLUMNS)))


def _tokeniser(database: ChunkDatabase) -> str:
    """What names a database's tokeniser: its hash, or else the size of its vocabulary."""
    first = getattr(database, "parts", (database,))[0]
    digest = first.manifest.parents.get("tokenizer", "")
    return digest[:12] or f"of {database.vocab_size} tokens"


def _write(path: pathlib.Path, votes: TextVotes) -> str:
    """Writes the columns of votes."""
    files.write_arrays(path, [getattr(votes, name) for name in COLUMNS])
    return ""
