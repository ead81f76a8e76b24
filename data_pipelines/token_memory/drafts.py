"""A token memory as generation asks it: drafts, and votes to mix with.

Both are what followed the longest ending of a text in the database.
"""

from collections.abc import Callable

import numpy as np

from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.token_memory.memory import TokenMemory

_VOTES = 8  # occurrences that are asked: where they disagree, a draft has little chance


class MemoryDrafts:
    """Looks up drafts; a retro_jax.generate.drafts.LookUp.

    Attributes:
      memory: of the database.
    """

    def __init__(self, memory: TokenMemory, exclude: np.ndarray | None = None):
        """`exclude` [d] are numbers of documents that no draft comes from."""
        self.memory, self._exclude = memory, exclude

    def __call__(self, ending: np.ndarray, most: int) -> tuple[int, np.ndarray]:
        """The length of the longest ending that occurs, and up to `most` tokens that followed it.

        Of several occurrences, the first of those whose next token has most votes.
        """
        match = self.memory.match(
            ending, longest=len(ending), most_votes=_VOTES, exclude=self._exclude
        )
        if not len(match.tokens):
            return 0, np.zeros(0, np.int32)
        values, counts = np.unique(match.tokens, return_counts=True)
        first = int(np.argmax(match.tokens == values[np.argmax(counts)]))
        return match.length, self._following(match.chunks[first], match.places[first], most)

    def _following(self, chunk: int, place: int, most: int) -> np.ndarray:
        """Tokens of a document from a place on."""
        database = self.memory.database
        ids = chunk + np.arange(1 + (place + most - 1) // CHUNK_LENGTH)
        ids = ids[ids < len(database)]
        ids = ids[database.documents(ids) == database.document(int(chunk))]
        tokens = database.chunks(ids).reshape(-1)[place : place + most]
        ends = np.flatnonzero(tokens == database.pad_id)
        return tokens[: ends[0]] if len(ends) else tokens


def memory_votes(
    memory: TokenMemory, exclude: np.ndarray | None = None
) -> Callable[[np.ndarray], tuple[int, np.ndarray]]:
    """The votes on the token after an ending, as retro_jax.generate.mixture asks for them."""

    def ask(ending: np.ndarray) -> tuple[int, np.ndarray]:
        match = memory.match(ending, exclude=exclude)
        return match.length, match.tokens

    return ask
