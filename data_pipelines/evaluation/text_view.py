"""Chunks and neighbours as text, for the sampler's output and the report."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.splits import Split
from retro_jax.report.views import (
    ChunkView,
    NeighbourView,
    SampleChunk,
    Span,
    merged,
    shared_runs,
    spans,
)

_LEAST_TOKENS = 32  # of a chunk that is shown
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


def chunk_views(
    split: Split,
    viewer: Viewer,
    corpora: Sequence[str],
    *,
    k: int,
    gains: np.ndarray,
    counted: np.ndarray,
    bits: np.ndarray,
) -> list[ChunkView]:
    """For each corpus: the chunk with the largest gain, that with the largest loss, and a random one.

    Args:
      split: with its neighbours. viewer: of its tokens. k: neighbours that are shown.
      gains: [n, 64] bits that retrieval saved on the tokens of split.ids.
      counted: [n, 64] bool, the tokens that are scored. bits: [n] of the chunks without retrieval.
    """
    owners = split.database.documents(split.ids)
    eligible = counted.sum(axis=1) >= _LEAST_TOKENS
    eligible[0] = False
    eligible[1:] &= owners[1:] == owners[:-1]  # a document's first chunk reads no neighbours
    views = []
    for corpus in corpora:
        inside = np.zeros(len(split.ids), bool)
        for part in split.database.corpora[corpus]:
            inside |= (split.ids >= part.start) & (split.ids < part.stop)
        places = np.flatnonzero(eligible & inside)
        if not len(places):
            continue
        totals = gains[places].sum(axis=1)
        selection = {
            "Largest gain": places[np.argmax(totals)],
            "Largest loss": places[np.argmin(totals)],
            "Chosen at random": np.random.default_rng(0).choice(places),
        }
        for heading, row in selection.items():
            view = _chunk_view(
                split,
                viewer,
                int(split.ids[row]),
                k=k,
                gains=gains[row],
                heading=f"{heading} · {corpus}",
                bits=float(bits[row]),
            )
            views.append(view)
    return views


def _chunk_view(
    split: Split,
    viewer: Viewer,
    chunk: int,
    *,
    k: int,
    gains: np.ndarray,
    heading: str,
    bits: float,
) -> ChunkView:
    """One chunk, the chunk before it, and that one's neighbours."""
    assert split.table is not None
    tokens = split.database.chunks(np.array([chunk - 1, chunk]))
    record = split.database.record(split.database.document(chunk))
    text = tokens[1] != split.database.pad_id
    return ChunkView(
        heading=heading,
        source=f"{record.id} · chunk {chunk - record.first_chunk + 1} of {record.chunks}",
        gain=float(gains.sum()),
        bits=bits,
        query=viewer.spans(tokens[0]),
        spans=viewer.spans(tokens[1][text], gains=gains[text]),
        neighbours=viewer.neighbours(
            split.table.ids(np.array([chunk - 1]), k)[0],
            split.table.scores(np.array([chunk - 1]), k)[0],
            tokens[1][text],
            split.table.score,
        ),
    )


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
