"""The form of a batch: the contract between the data pipelines and the model.

Shape letters: B batch, N sequence length, C chunks per sequence, M chunk length (N = C * M),
K neighbours per chunk, R neighbour length (a retrieved chunk and its continuation).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from retro_jax.packed import Packed

Array = Any  # NumPy on the host, JAX on the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetroBatch:
    """A batch of sequences in which every chunk carries its neighbours' tokens.

    Arrays are NumPy on the host and JAX on the device. `pad_id` (RetroConfig.pad_id) marks what is
    absent: a position without text, a target without loss, a neighbour slot that was not filled.

    Attributes:
      tokens: [B, N] int32, input tokens.
      targets: [B, N] int32, the next token of the same document; pad_id where there is none, and
        then the position has no loss.
      documents: [B, C] int32, the document of each chunk. Attention never crosses documents.
        The numbers only need to differ between documents of one sequence; -1 is a padding chunk.
      corpus: [B] int32, the corpus of each sequence (an index into the mixture's names).
      neighbours: [B, C, K, R] int32, or None for RETRO[OFF] and the baseline. Chunk u's neighbours
        were retrieved with chunk u as the query; the model reads them from the last token of
        chunk u onward.
      states: what a frozen decoder computes of each neighbour (model.decoder.Retrieved.encoded), kept
        from before, so that the model need not; or None.
      below: [B, N, D], the residual stream that the first layer with CCA reads, kept likewise; or None.
      noise: [B, C] bool, the chunks whose neighbours are another chunk's, for training only; or None.
    """

    tokens: Array
    targets: Array
    documents: Array
    corpus: Array
    neighbours: Array | None = None
    states: Packed | None = None
    below: Packed | None = None
    noise: Array | None = None

    def without_neighbours(self) -> "RetroBatch":
        """The same sequences with retrieval off, and nothing kept."""
        return dataclasses.replace(self, neighbours=None, states=None, below=None, noise=None)


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A retrieved chunk by its place, for readers: the model reads its tokens.

    Attributes:
      document, corpus: as the database names them. place: which chunk of the document, from 0.
      score: squared distance of embeddings, or BM25's score. revision: of the database.
      text, continuation: of the chunk, and of the one after it.
    """

    document: str
    corpus: str
    place: int
    score: float
    revision: int
    text: str
    continuation: str


class SizedDocument(Protocol):
    """Facts about a document: its corpus, UTF-8 bytes, whitespace words and line ends."""

    @property
    def corpus(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def words(self) -> int: ...
    @property
    def lines(self) -> int: ...


def text_mask(tokens: np.ndarray, documents: np.ndarray, *, eos_id: int, pad_id: int) -> np.ndarray:
    """[n, M] bool: the tokens of the documents' text, without bos, eos and padding.

    Args:
      tokens: [n, M]. documents: [n], the document of each chunk; a document's chunks are consecutive.
    """
    first = np.ones(len(documents), bool)
    first[1:] = documents[1:] != documents[:-1]
    mask = (tokens != pad_id) & (tokens != eos_id)
    mask[first, 0] = False
    return mask


@dataclasses.dataclass(frozen=True)
class ChunkText:
    """A text to score: whole documents, as chunks in order.

    Attributes:
      ids: [n] int64, the chunk ids.
      documents: [n] int, the document number of each chunk; a document's chunks are consecutive.
      chunks: gives [len(ids), M] tokens for an array of ids, all pad_id for the id -1.
      neighbours: gives [len(ids), K, R] tokens for an array of ids (-1 as above); None is
        retrieval off.
      pad_id: the token that means "nothing here".
      wanted: [n] bool, the chunks that are scored where a sample is; the others' losses are 0. None for all.
    """

    ids: np.ndarray
    documents: np.ndarray
    chunks: Callable[[np.ndarray], np.ndarray]
    neighbours: Callable[[np.ndarray], np.ndarray] | None
    pad_id: int
    wanted: np.ndarray | None = None
