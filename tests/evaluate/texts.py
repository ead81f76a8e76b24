"""Small made-up texts in the form of chunks, for the tests of evaluation."""

import dataclasses

import numpy as np

from retro_jax.batch import ChunkText

PAD, BOS, EOS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Document:
    """What the metrics need to know of a document."""

    corpus: str
    bytes: int
    words: int
    lines: int


def documents_of(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token lists bos + text + eos, one per length (of the text)."""
    rng = np.random.default_rng(seed)
    return [[BOS, *rng.integers(4, vocab_size, length).tolist(), EOS] for length in lengths]


def chunked(
    documents: list[list[int]], chunk_length: int, neighbours: np.ndarray | None = None
) -> tuple[ChunkText, np.ndarray]:
    """The documents as a ChunkText and its [n, M] tokens; `neighbours` is [n, K, R] by chunk."""
    rows, owners = [], []
    for number, tokens in enumerate(documents):
        for start in range(0, len(tokens), chunk_length):
            row = tokens[start : start + chunk_length]
            rows.append(row + [PAD] * (chunk_length - len(row)))
            owners.append(number)
    table = np.array(rows, np.int32)

    def read(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
        picked = values[ids].copy()
        picked[ids < 0] = PAD
        return picked

    text = ChunkText(
        ids=np.arange(len(table)),
        documents=np.array(owners),
        chunks=lambda ids: read(table, ids),
        neighbours=None if neighbours is None else lambda ids: read(neighbours, ids),
        pad_id=PAD,
    )
    return text, table
