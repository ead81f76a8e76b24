"""A model mixed with the token memory of the retrieval database, as a condition of launch.evaluate.

The memory is W/token_memory, with one more for each revision; it is built where it is missing. Its
votes on a text are saved as W/evaluation/SPLIT-votes-ID.npy. The weights of the mixture are tuned on
the first chunks of the validation split.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.evaluation.splits import Split, first_documents, open_split
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.memory import LONGEST, MOST_VOTES, TokenMemory
from data_pipelines.token_memory.text_votes import TextVotes, votes_on
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from launch.evaluation.conditions import TUNING_CHUNKS
from retro_jax.distributed import processes
from retro_jax.distributed.progress import progress_bar
from retro_jax.errors import UserError
from retro_jax.evaluate.token_mixture import Votes, mixed_nll, summary, tune_weights
from retro_jax.storage import files

_COLUMNS = tuple(field.name for field in dataclasses.fields(Votes))


@dataclasses.dataclass(frozen=True)
class TokenMixture:
    """How a condition's model is mixed with the token memory.

    Attributes:
      neighbours: a chunk's, of the condition. nll_of: the nats [n, 64] of the condition alone on a
        split, given the tokens [n, 64] bool that count. data: of the prepared data. folder:
        W/evaluation.
    """

    neighbours: int
    nll_of: Callable[[Split, np.ndarray], np.ndarray]
    data: pathlib.Path
    folder: pathlib.Path

    def mix(
        self, split: Split, text: np.ndarray, nll: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The nats [n, 64] of the mixture, and the facts of its tuning.

        Args:
          split: the text. text: [n, 64] bool, the tokens that count. nll: [n, 64] of the model.

        Raises:
          UserError: the text is the database itself, the database has another tokeniser than the text,
            or there is no validation split to tune on.
        """
        database = open_database(self.data)
        if split.database.manifest.hash == database.manifest.hash:
            raise UserError(
                "--retrieval=tokens of the training split itself, whose own documents would vote:"
                " expected another split"
            )
        memory = self._memory(database)
        tuning = open_split(self.data, "validation", neighbours=self.neighbours)
        tuning, mask = first_documents(tuning, TUNING_CHUNKS)
        tuning_votes = self._votes(memory, tuning, mask)
        model_nll = self.nll_of(tuning, mask)[mask]
        weights = tune_weights(model_nll, tuning_votes)
        votes = self._votes(memory, split, text)
        mixed = nll.astype(np.float64)
        mixed[text] = mixed_nll(mixed[text], votes, weights)
        facts = {
            "memories": list(memory.hashes),
            "weights": weights.tolist(),
            "tuned_on_tokens": len(tuning_votes),
            "by_length": summary(nll[text], votes, weights),
        }
        return mixed.astype(np.float32), facts

    def _memory(self, database: ChunkDatabase) -> TokenMemory:
        """The token memory, which the first process builds where it is missing."""

        def build() -> str:
            prepare_and_open(database)
            return ""

        processes.from_first(build)
        return prepare_and_open(database)

    def _votes(self, memory: TokenMemory, split: Split, text: np.ndarray) -> Votes:
        """The memory's votes on a split, read where it is there already."""
        if split.database.vocab_size != memory.database.vocab_size:
            raise UserError(
                f"{split.database.directory} has {split.database.vocab_size} tokens: expected"
                f" {memory.database.vocab_size}, those of the token memory"
            )
        digest = _digest(
            [*memory.hashes, memory.database.manifest.hash, split.database.manifest.hash],
            [LONGEST, MOST_VOTES],
            split.ids,
            text,
        )
        path = self.folder / f"{split.name}-votes-{digest}.npy"
        if not processes.as_first([path.is_file()])[0]:
            with progress_bar(len(split.ids), "token memory: look-up", "chunk") as bar:
                columns = votes_on(memory, split.database, split.ids, text, on_chunks=bar.update)
            processes.from_first(lambda: _write(path, columns))
        return Votes(*files.read_arrays(path, len(_COLUMNS)))


def _write(path: pathlib.Path, votes: TextVotes) -> str:
    """Writes the columns of votes."""
    files.write_arrays(path, [getattr(votes, name) for name in _COLUMNS])
    return ""


def _digest(*parts: Any) -> str:
    """A few digits that differ where any part does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else files.to_json(part))
    return digest.hexdigest()[:12]
