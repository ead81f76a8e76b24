"""Log-probabilities of texts that come from outside, in the windows of an evaluation.

The texts are scored one after the other, as the documents of a split are: windows go across them, and
attention does not. So the texts of a split give the figures of launch.evaluate. A text of at most
C - stride + 1 chunks is always seen whole, whatever is scored with it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.batch import ChunkText, RetroBatch
from retro_jax.evaluate.score import (
    TokenLosses,
    WindowConfig,
    compiled_token_losses,
    score_chunks,
)
from retro_jax.model.retro import Retro


@dataclasses.dataclass(frozen=True)
class TextScores:
    """What the model says of each token of a text but the first.

    Attributes:
      log_probabilities: [n - 1] float32, nats. likeliest: [n - 1, A] token ids, likeliest first.
      likeliest_log_probabilities: [n - 1, A] float32.
    """

    log_probabilities: np.ndarray
    likeliest: np.ndarray
    likeliest_log_probabilities: np.ndarray


def token_scores(model: Retro, batch: RetroBatch, *, alternatives: int) -> jax.Array:
    """[1 + 2A, B, N] float32: nats of the targets, the A largest log-probabilities, and their tokens."""
    logits_BxNxV = model(batch.tokens, batch.neighbours, batch.documents)
    scores_BxNxV = jax.nn.log_softmax(logits_BxNxV.astype(jnp.float32), axis=-1)
    targets = jnp.minimum(batch.targets, scores_BxNxV.shape[-1] - 1)  # pad_id may be V
    of_targets = jnp.take_along_axis(scores_BxNxV, targets[..., None], axis=-1)
    values, ids = jax.lax.top_k(scores_BxNxV, alternatives)
    parts = [-of_targets, values, ids.astype(jnp.float32)]
    return jnp.moveaxis(jnp.concatenate(parts, axis=-1), -1, 0)


class TextScorer:
    """Scores texts with one model; its program is compiled for batches of 1 and of 8 windows.

    Attributes:
      config: the architecture.
      whole: tokens of a text that every window which scores it sees whole, whatever is scored with it.
    """

    def __init__(self, model: Retro, *, chunks: int, alternatives: int) -> None:
        """Windows have `chunks` chunks and advance by half of it, as launch.evaluate's do."""
        self.config = model.config
        self._chunks, self._stride = chunks, max(1, chunks // 2)
        losses = functools.partial(token_scores, alternatives=alternatives)
        self.whole = (chunks - self._stride + 1) * self.config.chunk_length
        self._losses: TokenLosses = compiled_token_losses(*nnx.split(model), losses=losses)

    def score(
        self,
        texts: Sequence[np.ndarray],
        retrieve: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> list[TextScores]:
        """Scores texts.

        Args:
          texts: each [n] token ids, n >= 1, bos first.
          retrieve: gives the neighbours [m, K, R] of complete chunks [m, M]; None is retrieval off.
        """
        length, pad_id = self.config.chunk_length, self.config.pad_id
        counts = [-(-len(text) // length) for text in texts]
        chunks = np.full((sum(counts), length), pad_id, np.int32)
        starts = np.cumsum([0, *counts])
        for text, start in zip(texts, starts, strict=False):
            chunks[start:].reshape(-1)[: len(text)] = text
        neighbours = self._neighbours(chunks, texts, starts, retrieve)
        together = ChunkText(
            ids=np.arange(len(chunks)),
            documents=np.repeat(np.arange(len(texts)), counts),
            chunks=_rows_of(chunks, pad_id),
            neighbours=None if neighbours is None else _rows_of(neighbours, pad_id),
            pad_id=pad_id,
        )
        few = len(chunks) <= self._chunks
        windows = WindowConfig(self._chunks, self._stride, batch_size=1 if few else 8)
        scores = score_chunks(self._losses, together, windows)
        by_token = scores.reshape(len(scores), -1)
        results = []
        for tokens, start in zip(texts, starts, strict=False):
            own = by_token[:, start * length + 1 : start * length + len(tokens)]
            best, ids = np.split(own[1:], 2)
            results.append(TextScores(-own[0], ids.T.astype(np.int32), best.T))
        return results

    def _neighbours(
        self,
        chunks: np.ndarray,
        texts: Sequence[np.ndarray],
        starts: np.ndarray,
        retrieve: Callable[[np.ndarray], np.ndarray] | None,
    ) -> np.ndarray | None:
        """[n, K, R]: those of complete chunks; nothing reads those of others."""
        if retrieve is None or not self.config.has_retrieval:
            return None
        complete = np.zeros(len(chunks), bool)
        for tokens, start in zip(texts, starts, strict=False):
            complete[start : start + len(tokens) // self.config.chunk_length] = True
        if not complete.any():
            return np.full((len(chunks), 1, self.config.neighbour_length), self.config.pad_id)
        found = retrieve(chunks[complete])
        every = np.full((len(chunks), *found.shape[1:]), self.config.pad_id, np.int32)
        every[complete] = found
        return every


def _rows_of(rows: np.ndarray, pad_id: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows by number; padding for -1."""
    padded = np.concatenate([rows, np.full((1, *rows.shape[1:]), pad_id, rows.dtype)])
    return lambda ids: padded[ids]
