"""Scores every token of a text exactly once, by windows of chunks that overlap.

With windows of 4 chunks and a stride of 2, over a text of 9 chunks ("s" scored, "." context only):

    chunk      0 1 2 3 4 5 6 7 8
    window 0   s s s s
    window 1       . . s s
    window 2           . . s s
    window 3               . . s         the last window is padded

A scored chunk sees at least `chunks - stride` chunks before it, or its document's start. A window
scores the predictions AT its chunks' positions. The window before scores the first token of
a window's first chunk, and the target of a window's last position is read beyond the window.
Results are indexed by the token predicted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.batch import ChunkText, RetroBatch
from retro_jax.config import require
from retro_jax.model import Retro

T = TypeVar("T")
TokenLosses = Callable[[RetroBatch], jax.Array | np.ndarray]  # [..., B, N]


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """How a text is cut for scoring.

    Attributes:
      chunks: chunks a window; the trained sequence length in chunks.
      stride: chunks by which windows advance; smaller means more context and more work.
      batch_size: windows scored at once.
    """

    chunks: int = 32
    stride: int = 16
    batch_size: int = 8

    def __post_init__(self) -> None:
        require(self.chunks > 0, self, "chunks", "a positive integer")
        require(
            0 < self.stride <= self.chunks,
            self,
            "stride",
            f"1 to chunks = {self.chunks}",
        )
        require(self.batch_size > 0, self, "batch_size", "a positive integer")


def windows(num_chunks: int, chunks: int, stride: int) -> np.ndarray:
    """Cuts `num_chunks` chunks into windows of `chunks` chunks.

    Returns:
      [W, 3] int64: the first chunk a window reads, the first one it scores, the end of those it
      scores (exclusive, and the end of what it reads). The scored ranges partition the chunks.
    """
    if num_chunks <= 0:
        return np.zeros((0, 3), np.int64)
    count = 1 + max(0, -(-(num_chunks - chunks) // stride))
    starts = stride * np.arange(count, dtype=np.int64)
    ends = np.minimum(starts + chunks, num_chunks)
    return np.stack([starts, np.concatenate([[0], ends[:-1]]), ends], axis=1)


def text_windows(text: ChunkText, config: WindowConfig) -> np.ndarray:
    """The windows of a text, as `windows` gives them; of a sample those around its chunks.

    A sampled chunk sees as many chunks before it as in the windows of the whole text. The first window
    of a run of them also scores the chunk before, whose last position predicts the run's first token:
    this token may see a chunk less.
    """
    if text.wanted is None:
        return windows(len(text.ids), config.chunks, config.stride)
    wanted, rows = text.wanted, []
    if config.chunks == 1:
        wanted = wanted | np.append(wanted[1:], False)
    step = max(1, min(config.stride, config.chunks - 1))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wanted, [0]]))).reshape(-1, 2)
    for first, last in edges.tolist():
        for c in range(first, last, step):
            start = max(0, c + step - config.chunks)
            begin = max(start, c - 1) if c == first else c
            rows.append((start, begin, min(c + step, last)))
    return np.array(rows, np.int64).reshape(-1, 3)


def window_batch(text: ChunkText, starts: np.ndarray, chunks: int) -> RetroBatch:
    """Reads the windows that begin at `starts` ([B], positions in text.ids) as one batch.

    Positions past the end of the text are padding: document -1, tokens and targets pad_id.
    """
    positions = starts[:, None] + np.arange(chunks + 1)
    inside = positions < len(text.ids)
    positions = np.minimum(positions, len(text.ids) - 1)
    ids = np.where(inside, text.ids[positions], -1)
    documents = np.where(inside, text.documents[positions], -1).astype(np.int32)
    tokens = text.chunks(ids.ravel()).astype(np.int32).reshape(*ids.shape, -1)
    follows = (documents[:, 1:] == documents[:, :-1]) & inside[:, 1:]
    following = np.where(follows, tokens[:, 1:, 0], text.pad_id)
    targets = np.concatenate([tokens[:, :-1, 1:], following[..., None]], axis=2)
    arrays: dict[str, Any] = {
        "tokens": tokens[:, :-1].reshape(len(starts), -1),
        "targets": targets.reshape(len(starts), -1),
        "documents": documents[:, :-1],
        "corpus": np.zeros(len(starts), np.int32),
    }
    if text.neighbours is not None:
        neighbours = text.neighbours(ids[:, :-1].ravel()).astype(np.int32)
        arrays["neighbours"] = neighbours.reshape(len(starts), chunks, *neighbours.shape[1:])
    return RetroBatch(**arrays)


def score_chunks(
    token_losses: TokenLosses,
    text: ChunkText,
    config: WindowConfig,
    *,
    rows: Sequence[int] | None = None,
    on_windows: Callable[[int], object] | None = None,
    part: slice = slice(None),
) -> np.ndarray:
    """Scores every token of a text, or of some of its windows.

    Args:
      token_losses: [..., B, N] nats of a batch, 0 where the target is pad_id; leading axes are
        several ways to predict it.
      text: the chunks, and their neighbours for retrieval on.
      config: windows, stride and batch size; every batch has the same shape (compiled once).
      rows: of each batch that token_losses is given, where several processes build it together (it
        returns the losses of all); None for all.
      on_windows: called with the number of windows each time some are done.
      part: which of the windows are scored.

    Returns:
      [..., n, M] float32, the loss in nats of each token given the tokens before it in its document; 0
      for padding, for a document's first token, which nothing predicts, and for what other windows
      score. Without any window [0, 0].
    """
    scores: np.ndarray | None = None
    for plan, losses in one_behind(_losses(token_losses, text, config, rows, part)):
        nats = np.asarray(losses, np.float32)
        nats = nats.reshape(*nats.shape[:-2], config.batch_size, config.chunks, -1)
        if scores is None:
            scores = np.zeros((*nats.shape[:-3], len(text.ids), nats.shape[-1]), np.float32)
        for number, (start, begin, end) in enumerate(plan):
            scores[..., begin:end, :] = nats[..., number, begin - start : end - start, :]
        if on_windows is not None:
            on_windows(len(plan))
    if scores is None:
        return np.zeros((0, 0), np.float32)
    by_position = scores.reshape(*scores.shape[:-2], -1)
    first = np.zeros((*by_position.shape[:-1], 1), np.float32)
    return np.concatenate([first, by_position[..., :-1]], axis=-1).reshape(scores.shape)


def _losses(
    token_losses: TokenLosses,
    text: ChunkText,
    config: WindowConfig,
    rows: Sequence[int] | None,
    part: slice,
) -> Iterator[tuple[np.ndarray, jax.Array | np.ndarray]]:
    """Batches of equal shape: rows of the plan, and the losses [batch_size, N] of their windows."""
    for some, batch in batches(text, config, rows, part):
        yield some, token_losses(batch)


def batches(
    text: ChunkText,
    config: WindowConfig,
    rows: Sequence[int] | None = None,
    part: slice = slice(None),
) -> Iterator[tuple[np.ndarray, RetroBatch]]:
    """The windows of a text, or a part of them, `batch_size` at once; they may be of any documents.

    Yields:
      Rows of the plan, as `windows` gives them, and their batch: whole, or the given rows of it.
    """
    plan = text_windows(text, config)[part]
    for first in range(0, len(plan), config.batch_size):
        some = plan[first : first + config.batch_size]
        starts = np.full(config.batch_size, len(text.ids), np.int64)
        starts[: len(some)] = some[:, 0]
        row_starts = starts if rows is None else starts[np.asarray(rows, np.int64)]
        yield some, window_batch(text, row_starts, config.chunks)


def one_behind(items: Iterator[T]) -> Iterator[T]:
    """Passes items on one late, so that the device computes one while the last is fetched."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def compiled_token_losses(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    place: Callable[[RetroBatch], RetroBatch] = lambda batch: batch,
    losses: Callable[[Any, RetroBatch], jax.Array] = Retro.token_losses,
) -> TokenLosses:
    """A model's losses as one compiled function of the batch.

    Args:
      graphdef, params: of a Retro, as nnx.split gives them; the parameters stay where they are.
      place: puts a batch of NumPy arrays where the model reads it (on a mesh).
      losses: of a model and a batch, [..., B, N].
    """

    @jax.jit
    def compiled(params: nnx.State, batch: RetroBatch) -> jax.Array:
        return losses(nnx.merge(graphdef, params), batch)

    return lambda batch: compiled(params, place(batch))


def token_hits(model: Retro, batch: RetroBatch) -> jax.Array:
    """[B, N] float32: 1 where the target is the model's most likely token, 0 where not or no target."""
    logits = model(batch.tokens, batch.neighbours, batch.documents)
    best = jnp.argmax(logits, axis=-1)
    return ((best == batch.targets) & (batch.targets != model.config.pad_id)).astype(jnp.float32)
