"""The documents of a retrieval database, as traces name them and check against them."""

import functools

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.text_view import SCORES
from data_pipelines.token_memory.memory import Match, TokenMemory
from retro_jax.report.views import NeighbourSource, SourceDocument


class DatabaseLibrary:
    """What trace_value asks of tokens and documents: its Library."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        database: ChunkDatabase,
        memory: TokenMemory | None = None,
        score: str = "squared_l2",
    ):
        """Takes what is open: the database at a revision, and its token memory where there is one.

        `score` says what the scores of neighbours are, a name of SCORES.
        """
        self._tokenizer, self._database, self._memory = tokenizer, database, memory
        self._kind = SCORES[score]
        self._tokens_of = functools.lru_cache(maxsize=256)(self._read)

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes of a token; none for a special one."""
        return self._tokenizer.token_bytes[token]

    def label(self, token: int) -> str:
        """The name of a special token."""
        names = {
            self._tokenizer.pad_id: "pad",
            self._tokenizer.eos_id: "eos",
            self._tokenizer.bos_id: "bos",
        }
        return names.get(token, f"token {token}")

    def document(self, number: int) -> SourceDocument:
        """A document of the database."""
        record = self._database.record(number)
        return SourceDocument(record.id, record.corpus, lambda: self._tokens_of(number))

    def votes(self, before: np.ndarray) -> Match | None:
        """The token memory's votes on what follows tokens [p]; None without a memory."""
        return None if self._memory is None else self._memory.match(before)

    def sources(self, ids: np.ndarray, scores: np.ndarray) -> list[NeighbourSource | None]:
        """The sources of neighbours by their ids [k], -1 for none, and scores [k]."""
        return [
            None if chunk < 0 else self._source(chunk, score)
            for chunk, score in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def _source(self, chunk: int, score: float) -> NeighbourSource:
        """The source of one chunk."""
        number = self._database.document(chunk)
        record = self._database.record(number)
        return NeighbourSource(
            document=self.document(number),
            chunk=chunk - record.first_chunk + 1,
            chunks=record.chunks,
            score=score,
            kind=self._kind,
            revision=self._database.manifest.revision,
        )

    def _read(self, number: int) -> np.ndarray:
        """[m] the tokens of a document, without padding."""
        record = self._database.record(number)
        first = record.first_chunk
        rows = self._database.chunks(np.arange(first, first + record.chunks))
        return rows[rows != self._database.pad_id]
