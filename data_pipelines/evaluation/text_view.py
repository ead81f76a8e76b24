"""Chunks and neighbours as text, for the sampler's output and the report."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from retro_jax.report.views import NeighbourView, SampleChunk, Span, merged, shared_runs, spans

SCORES = {"squared_l2": "distance", "bm25": "BM25"}  # what a neighbour's score is called


@dataclasses.dataclass(frozen=True)
class Viewer:
    """Makes text of tokens, and of chunks of the retrieval database."""

    tokenizer: Tokenizer
    retrieval: ChunkDatabase
    chunk_length = CHUNK_LENGTH

    def spans(
        self,
        tokens: np.ndarray,
        gains: np.ndarray | None = None,
        shared: np.ndarray | None = None,
    ) -> list[Span]:
        """Tokens [n] as spans; `gains` in bits and `shared` are by token."""
        pieces = [self.tokenizer.token_bytes[int(token)] for token in tokens]
        return spans(
            pieces,
            None if gains is None else gains.tolist(),
            None if shared is None else shared.tolist(),
        )

    def text(self, tokens: np.ndarray) -> str:
        """Tokens [n] as text; special ones are nothing."""
        return self.tokenizer.decode(tokens[tokens != self.retrieval.pad_id])

    def neighbours(
        self, ids: np.ndarray, distances: np.ndarray, reader: np.ndarray, kind: str = "squared_l2"
    ) -> list[NeighbourView]:
        """Neighbours by their ids [k] (-1 for none) and distances [k].

        Args:
          reader: [n] tokens of the text that read them; runs that it shares are marked.
          kind: of the distances, as a table says it.
        """
        views = []
        for chunk, distance in zip(ids.tolist(), distances.tolist(), strict=True):
            if chunk < 0:
                continue
            record = self.retrieval.record(self.retrieval.document(chunk))
            tokens = self.retrieval.value(chunk)
            tokens = tokens[tokens != self.retrieval.pad_id]
            marks = shared_runs(tokens, reader)
            first = slice(None, CHUNK_LENGTH)
            rest = slice(CHUNK_LENGTH, None)
            views.append(
                NeighbourView(
                    document=record.id,
                    corpus=record.corpus,
                    distance=float(distance),
                    chunk=merged(self.spans(tokens[first], shared=marks[first])),
                    continuation=merged(self.spans(tokens[rest], shared=marks[rest])),
                    score=SCORES[kind],
                )
            )
        return views


def sample_chunk_from_json(fields: Mapping[str, Any]) -> SampleChunk:
    """What dataclasses.asdict made of a SampleChunk, read back."""
    return SampleChunk(
        prompt=fields["prompt"],
        generated=fields["generated"],
        neighbours=[
            NeighbourView(**{**view, **{part: _spans(view[part]) for part in _PARTS}})
            for view in fields["neighbours"]
        ],
    )


_PARTS = ("chunk", "continuation")


def _spans(fields: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Spans read back from JSON."""
    return [Span(**span) for span in fields]
