"""Retrieval without a reader: neighbours before the text, as published for frozen models.

Each scored chunk is a row of its own, as the neighbours before it change from chunk to chunk (In-Context
RALM, arXiv 2302.00083, with a stride of one chunk):

    neighbours of chunk u - 1, the nearest last | chunks of u's document in its window | chunk u
                                                                             scored:     -------

The model runs with retrieval off. A row's text begins where the window begins that would score the
chunk (score.py), one chunk earlier where that were the chunk itself.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.batch import ChunkText, RetroBatch
from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.evaluate.score import TokenLosses, WindowConfig, one_behind, text_windows
from retro_jax.model import Retro


def row_length(neighbours: int, neighbour_length: int, windows: WindowConfig, chunk: int) -> int:
    """Tokens of a row: k neighbours of R tokens, and a window of chunks of M tokens, two at least."""
    return neighbours * neighbour_length + max(2, windows.chunks) * chunk


def check_context(
    retro: RetroConfig, neighbours: int, windows: WindowConfig, *, limit: int, model: str
) -> None:
    """Refuses rows that a model was not made for.

    Args:
      retro: the model's. neighbours: before the text, chunks with their continuations. windows: of the
        text.
      limit: the longest context, in tokens, that the model was trained for.
      model: its name in messages.

    Raises:
      UserError: the rows are longer.
    """
    length = row_length(neighbours, 2 * retro.chunk_length, windows, retro.chunk_length)
    if length > limit:
        raise UserError(
            f"in context, {neighbours} neighbours and a window are {length} tokens: expected at most"
            f" {limit}, the context of {model} (--window_chunks, --num_neighbours)"
        )


def chunk_losses(model: Retro, batch: RetroBatch) -> jax.Array:
    """[B, M] float32 nats of the M targets of each row, which are next to each other; 0 for padding.

    Other positions are not read out.
    """
    pad_id, chunk = model.config.pad_id, model.config.chunk_length
    h_BxNxD = model.hidden_states(batch.tokens)
    first_B = jnp.argmax(batch.targets != pad_id, axis=1)
    places_BxM = first_B[:, None] + jnp.arange(chunk)
    chosen_BxMxN = places_BxM[..., None] == jnp.arange(h_BxNxD.shape[1])
    h_BxMxD = jnp.einsum(
        "bmn,bnd->bmd", chosen_BxMxN.astype(h_BxNxD.dtype), h_BxNxD, precision="highest"
    )
    targets_BxM = jnp.sum(jnp.where(chosen_BxMxN, batch.targets[:, None], 0), axis=2)
    targets_BxM = jnp.where(jnp.any(chosen_BxMxN, axis=2), targets_BxM, pad_id)
    return model.losses(h_BxMxD, targets_BxM)


def score_in_context(
    token_losses: TokenLosses,
    text: ChunkText,
    config: WindowConfig,
    *,
    rows: Sequence[int] | None = None,
    on_windows: Callable[[int], object] | None = None,
    part: slice = slice(None),
) -> np.ndarray:
    """Scores every token of a text, or of some of its windows, each chunk after the neighbours of the chunk before it.

    Args:
      token_losses: [B, M] nats, of `chunk_losses`.
      config, rows, on_windows, part: as score.score_chunks's; `batch_size` rows at once.
      text: with neighbours. Those of a document's first chunk are not read, as nothing found them.

    Returns:
      [n, M] float32 nats, as score.score_chunks gives them.
    """
    if text.neighbours is None:
        raise ValueError("expected a text with neighbours")
    plan = text_windows(text, config)[part]
    wanted = np.ones(len(text.ids), bool) if text.wanted is None else text.wanted
    ranges = [(start, [u for u in range(a, b) if wanted[u]]) for start, a, b in plan.tolist()]
    scored = [(start, u) for start, chunks in ranges for u in chunks]
    chunk = text.chunks(text.ids[:1]).shape[1] if len(text.ids) else 0
    scores = np.zeros((len(text.ids), chunk), np.float32)
    finished = np.cumsum([len(chunks) for _, chunks in ranges])
    done = 0
    for places, losses in one_behind(_losses(token_losses, text, config, scored, rows)):
        nats = np.asarray(losses, np.float32)
        for row, (u, first) in enumerate(places):
            alone = first == 0  # nothing predicts a row's first token
            scores[u, int(alone) :] = nats[row, : chunk - alone]
        if on_windows is not None:
            before = int(np.searchsorted(finished, done, side="right"))
            done += len(places)
            on_windows(int(np.searchsorted(finished, done, side="right")) - before)
    return scores


def _losses(
    token_losses: TokenLosses,
    text: ChunkText,
    config: WindowConfig,
    scored: Sequence[tuple[int, int]],
    mine: Sequence[int] | None,
) -> Iterator[tuple[list[tuple[int, int]], object]]:
    """Batches of rows: (chunk, where it begins in its row) of each, and the losses of all."""
    for first in range(0, len(scored), config.batch_size):
        made = [_row(text, start, u) for start, u in scored[first : first + config.batch_size]]
        places = [(u, place) for (_, place), (_, u) in zip(made, scored[first:], strict=False)]
        k, length = text.neighbours(text.ids[:1]).shape[1:]  # type: ignore[misc]
        chunk = text.chunks(text.ids[:1]).shape[1]
        shape = (config.batch_size, row_length(k, length, config, chunk))
        tokens, targets = (np.full(shape, text.pad_id, np.int32) for _ in range(2))
        for row, (content, place) in enumerate(made):
            tokens[row, : len(content)] = content
            begin = max(place, 1)
            targets[row, begin - 1 : len(content) - 1] = content[begin:]
        batch = RetroBatch(
            tokens=tokens,
            targets=targets,
            documents=np.zeros((shape[0], shape[1] // chunk), np.int32),
            corpus=np.zeros(shape[0], np.int32),
        )
        if mine is not None:
            part = np.asarray(mine, np.int64)
            batch = RetroBatch(
                batch.tokens[part], batch.targets[part], batch.documents[part], batch.corpus[part]
            )
        yield places, token_losses(batch)


def _row(text: ChunkText, start: int, u: int) -> tuple[np.ndarray, int]:
    """The tokens of a row, without padding between neighbours, and where chunk u begins in it."""
    first = max(0, min(start, u - 1))
    same = np.flatnonzero(text.documents[first : u + 1] == text.documents[u]) + first
    parts = list(text.chunks(text.ids[same]))
    if len(same) > 1:
        assert text.neighbours is not None
        found = text.neighbours(text.ids[u - 1 : u])[0][::-1]
        parts = [each[each != text.pad_id] for each in found] + parts
    content = np.concatenate(parts)
    return content, len(content) - len(parts[-1])
