"""What retrieval changed in a finished text, token by token.

Each figure is of a whole forward pass that reads the text as generation did:

    with        all neighbours, as they were retrieved
    without     none
    less one    all but one: what its removal changes is its effect

With chunks of 4 tokens the neighbours of chunk u are read while chunk u + 1 is predicted, and so they
are the ones that can have an effect on its tokens at once:

    chunk        0          1          2
    tokens       bos a b c  d e f g    h
    neighbours              of chunk 0 of chunk 1

An effect is exact for one neighbour. Two neighbours that say the same each have a small one, since
the other remains. Effects by way of a later chunk's self attention are not counted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.model.decoder import DecoderLayer, Retrieved, WholeSequences, cca_number
from retro_jax.model.retro import Retro

LEAST_EFFECT = 0.01  # nats; below, no neighbour is held responsible


@dataclasses.dataclass(frozen=True)
class Trace:
    """The figures of one text of n tokens; all log-probabilities are in nats.

    Attributes:
      tokens: [n] int32. prompt_length: how many of them are the prompt.
      log_probabilities: [n] float32, of each token after those before it; 0 for the first.
      without: [n] float32, the same with retrieval off.
      effects: [n, K] float32, how much the token's log-probability falls without each of the
        neighbours that it reads, those of the chunk before; 0 where there is none.
      neighbours: [C, K, R] int32 of the complete chunks; None with retrieval off.
      attention: [P, n, K, R] float32, CCA's attention over these neighbours while the token is
        predicted, for each CCA layer the mean over heads; None with retrieval off.
      chunk_length: M. pad_id: of neighbours. layers: P, the CCA layers.
    """

    tokens: np.ndarray
    prompt_length: int
    log_probabilities: np.ndarray
    without: np.ndarray
    effects: np.ndarray
    neighbours: np.ndarray | None
    attention: np.ndarray | None
    chunk_length: int
    pad_id: int
    layers: tuple[int, ...]

    @property
    def changes(self) -> np.ndarray:
        """[n] float32: how much more likely retrieval made each token, in nats."""
        return self.log_probabilities - self.without

    def responsible(self) -> np.ndarray:
        """[n] int: the neighbour of the chunk before with the largest effect on each token; -1 for none."""
        return largest_effect(self.effects)

    def read_by(self, chunk: int) -> np.ndarray:
        """[K, R] int32: the neighbours that a chunk's tokens read; [0, R] for none."""
        if self.neighbours is None or not 0 < chunk <= len(self.neighbours):
            return np.zeros((0, 2 * self.chunk_length), np.int32)
        return self.neighbours[chunk - 1]


def largest_effect(effects: np.ndarray, least: float = LEAST_EFFECT) -> np.ndarray:
    """[n] int: the neighbour whose removal changes most; -1 where that is little.

    Args:
      effects: [n, K] nats, either way. least: nats of an effect that counts.
    """
    if not effects.shape[1]:
        return np.full(len(effects), -1)
    sizes = np.abs(effects)
    return np.where(sizes.max(axis=1) >= least, sizes.argmax(axis=1), -1)


def trace(
    model: Retro,
    tokens: np.ndarray,
    neighbours: np.ndarray | None,
    *,
    chunks: int,
    prompt_length: int = 0,
    batch_size: int = 8,
    between: Callable[[], object] = lambda: None,
) -> Trace:
    """Measures what neighbours changed in a text.

    Takes 2 + K forward passes of the text's chunks for every chunk that reads neighbours.

    Args:
      model: on one device. tokens: [n] of one text from bos on.
      neighbours: [C, K, R] of its complete chunks from the first on, pad_id where a slot is empty, as
        Generation has them; None for retrieval off.
      chunks: of the longest context, the trained sequence length. A longer text is read through a
        window that moves by a chunk, as while generating.
      prompt_length: kept beside the figures.
      batch_size: forward passes at once.
      between: called before each batch; what it raises ends the trace.

    Raises:
      UserError: no token, or neighbours of another shape.
    """
    config = model.config
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 1 or not len(tokens):
        raise UserError(f"tokens have shape {tokens.shape}: expected [n], n at least 1")
    given = _checked(config, tokens, neighbours)
    k = 0 if given is None else given.shape[1]
    figures = np.full((2 + k, len(tokens)), np.nan, np.float32)
    figures[:2, 0] = 0
    layers = config.cca_layers
    attention = np.zeros((len(layers), len(tokens), k, config.neighbour_length), np.float32)
    graphdef, params = nnx.split(model)
    for window in _windows(config, tokens, given, chunks):
        for passes in _batches(window.passes(), batch_size):
            between()
            losses = _losses(graphdef, params, *window.inputs(passes))
            for one, nats in zip(passes, np.asarray(losses), strict=False):
                window.put(figures[one.figure], one.predicted, -nats)
        if given is not None:
            tokens_1xN, _, neighbours_1xCxKxR = window.inputs([window.whole()])
            weights = np.asarray(_attention(graphdef, params, tokens_1xN, neighbours_1xCxKxR))
            for to, of in zip(attention, weights, strict=True):
                window.put(to, window.predicted, of)
    whole, without = figures[:2] if k else (figures[0], figures[0])
    effects = np.nan_to_num(whole[:, None] - figures[2:].T, nan=0.0)
    return Trace(
        tokens=tokens,
        prompt_length=prompt_length,
        log_probabilities=whole,
        without=without,
        effects=effects,
        neighbours=given,
        attention=None if given is None else attention,
        chunk_length=config.chunk_length,
        pad_id=config.pad_id,
        layers=tuple(layers),
    )


def _checked(
    config: RetroConfig, tokens: np.ndarray, neighbours: np.ndarray | None
) -> np.ndarray | None:
    """Neighbours as int32; None where the model or the text has none."""
    if neighbours is None or not config.has_retrieval:
        return None
    shape, most = neighbours.shape, len(tokens) // config.chunk_length
    if len(shape) != 3 or shape[0] > most or not shape[1] or shape[2] != config.neighbour_length:
        raise UserError(
            f"neighbours have shape {shape}: expected [C <= {most}, K >= 1,"
            f" {config.neighbour_length}] of {len(tokens)} tokens"
        )
    return np.asarray(neighbours, np.int32) if shape[0] else None


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One forward pass of a window: which figure it gives, of which tokens, with which neighbours."""

    figure: int
    predicted: range
    neighbours: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _Window:
    """The chunks that the model sees while it predicts some tokens.

    Attributes:
      first: token of the text with which it begins. predicted: tokens that it predicts.
      tokens, targets: [N] int32, padded to a bucket. neighbours: [C, K, R], padded too, or None.
      config: of the model.
    """

    first: int
    predicted: range
    tokens: np.ndarray
    targets: np.ndarray
    neighbours: np.ndarray | None
    config: RetroConfig

    def whole(self) -> _Pass:
        """The pass with everything."""
        return _Pass(0, self.predicted, self.neighbours)

    def passes(self) -> list[_Pass]:
        """All passes: with neighbours, without any, and without each one."""
        if self.neighbours is None:
            return [self.whole()]
        pad, length = self.config.pad_id, self.config.chunk_length
        result = [self.whole(), _Pass(1, self.predicted, np.full_like(self.neighbours, pad))]
        for u, slots in enumerate(self.neighbours):
            start = self.first + (u + 1) * length
            readers = range(
                max(start, self.predicted.start), min(start + length, self.predicted.stop)
            )
            for slot, neighbour in enumerate(slots):
                if readers and (neighbour != pad).any():
                    rest = self.neighbours.copy()
                    rest[u, slot] = pad
                    result.append(_Pass(2 + slot, readers, rest))
        return result

    def inputs(self, passes: list[_Pass]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens [B, N], targets [B, N] and neighbours [B, C, K, R] of passes."""
        tokens, targets = (np.stack([one] * len(passes)) for one in (self.tokens, self.targets))
        rows = [one.neighbours for one in passes if one.neighbours is not None]
        return tokens, targets, np.stack(rows) if rows else None

    def put(self, figures: np.ndarray, predicted: range, by_input: np.ndarray) -> None:
        """Writes what a pass gave at the inputs before some tokens to these tokens' places."""
        before = slice(predicted.start - 1 - self.first, predicted.stop - 1 - self.first)
        figures[predicted.start : predicted.stop] = by_input[before]


def _windows(
    config: RetroConfig, tokens: np.ndarray, neighbours: np.ndarray | None, chunks: int
) -> Iterator[_Window]:
    """The windows through which generation saw the text."""
    length, room, count = config.chunk_length, chunks * config.chunk_length, len(tokens)
    ends = [*range(min(room + 1, count), count, length), count]
    starts = [1, *ends[:-1]]
    size = min(1 << (-(-min(count, room) // length) - 1).bit_length(), chunks)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start >= end:
            continue
        first = number * length
        inside = tokens[first : first + size * length]
        following = tokens[first + 1 : first + 1 + size * length]
        part = None
        if neighbours is not None:
            part = _padded(neighbours[number : number + size], size, config.pad_id)
        yield _Window(
            first=first,
            predicted=range(start, end),
            tokens=_padded(inside, size * length, config.pad_id),
            targets=_padded(following, size * length, config.pad_id),
            neighbours=part,
            config=config,
        )


def _padded(rows: np.ndarray, length: int, pad_id: int) -> np.ndarray:
    """The same rows and padding after them."""
    result = np.full((length, *rows.shape[1:]), pad_id, np.int32)
    result[: len(rows)] = rows
    return result


def _batches(passes: list[_Pass], size: int) -> Iterator[list[_Pass]]:
    """Passes in batches of one size, a power of two or `size`; the last one is filled up with repeats."""
    size = min(size, 1 << (len(passes) - 1).bit_length())
    for first in range(0, len(passes), size):
        part = passes[first : first + size]
        yield part + [part[0]] * (size - len(part))


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens_BxN: jax.Array,
    targets_BxN: jax.Array,
    neighbours_BxCxKxR: jax.Array | None,
) -> jax.Array:
    """[B, N] nats of the targets."""
    model: Retro = nnx.merge(graphdef, params)
    return model.losses(model.hidden_states(tokens_BxN, neighbours_BxCxKxR), targets_BxN)


@functools.partial(jax.jit, static_argnums=0)
def _attention(
    graphdef: nnx.GraphDef, params: nnx.State, tokens_1xN: jax.Array, neighbours_1xCxKxR: jax.Array
) -> jax.Array:
    """[P, N, K, R]: CCA's attention of every input token in every CCA layer."""
    model: Retro = nnx.merge(graphdef, params)
    config, whole = model.config, WholeSequences(model.config)
    _, _, k, length = neighbours_1xCxKxR.shape
    length += config.form.gated_cca  # the sink
    h_1xNxD = model.embed(tokens_1xN, whole)
    shape = (len(config.cca_layers), *tokens_1xN.shape, k * length)
    carry = (h_1xNxD, jnp.zeros(shape, jnp.float32))
    operators = _Watching(whole)
    carry = model.before_retrieval(carry, operators)
    retrieved = model.encode(neighbours_1xCxKxR, carry[0], tokens_1xN, whole)
    _, weights_Px1xNxS = model.after_retrieval(carry, retrieved, operators)
    weights_PxNxKxR = weights_Px1xNxS[:, 0].reshape(shape[0], shape[2], k, length)
    return weights_PxNxKxR[..., length - neighbours_1xCxKxR.shape[3] :]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["whole"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Watching:
    """The operators on whole sequences that also keep CCA's attention: the carry is (H, [P, B, N, S])."""

    whole: WholeSequences

    def attend(self, layer: DecoderLayer, carry: Any, p: jax.Array | int) -> Any:
        """H + ATTN(H) of layer p."""
        return self.whole.attend(layer, carry[0], p), carry[1]

    def attend_beside(
        self,
        layer: DecoderLayer,
        cca: ChunkedCrossAttention,
        carry: Any,
        p: jax.Array | int,
        retrieved: Retrieved,
    ) -> Any:
        """H + ATTN(H) + CCA(H, E) of layer p, and its attention."""
        share_BxNxH = None
        if self.whole.config.form.shared_softmax:
            share_BxNxH = self.whole.neighbours_share(layer, cca, carry[0], p, retrieved)
        weights = self._kept(cca, carry, p, retrieved, share_BxNxH)
        return self.whole.attend_beside(layer, cca, carry[0], p, retrieved), weights

    def cross_attend(
        self, cca: ChunkedCrossAttention, carry: Any, p: jax.Array | int, retrieved: Retrieved
    ) -> Any:
        """H + CCA(H, E) of layer p, and its attention."""
        weights = self._kept(cca, carry, p, retrieved)
        return self.whole.cross_attend(cca, carry[0], p, retrieved), weights

    def feed_forward(self, layer: DecoderLayer, carry: Any, p: jax.Array | int) -> Any:
        """H + FFW(H) of layer p."""
        return self.whole.feed_forward(layer, carry[0], p), carry[1]

    def _kept(
        self,
        cca: ChunkedCrossAttention,
        carry: Any,
        p: jax.Array | int,
        retrieved: Retrieved,
        share_BxNxH: jax.Array | None = None,
    ) -> jax.Array:
        """The carry's attention with that of layer p in its place."""
        h_BxNxD, weights_PxBxNxS = carry
        encoded = self.whole.encoded(retrieved, p)
        new = cca.weights(h_BxNxD, encoded, retrieved.present, self.whole.documents, share_BxNxH)
        index = cca_number(self.whole.config, p)
        return jax.lax.dynamic_update_index_in_dim(weights_PxBxNxS, new, index, axis=0)
