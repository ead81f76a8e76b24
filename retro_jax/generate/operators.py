"""Algorithm 1's operators on a block of new tokens of every text, beside a cache of the old ones.

A block has T tokens for each row, from the row's own position on, and never crosses a chunk's end:
a whole chunk of a prompt, one token while generating, several of a draft. With M = 4:

    position     0  1  2  3 | 4  5  6  7 | 8
    block        ---- T=4 --  T=1  T=1 ...
    reads        .  .  .  E0  E0 E0 E0 E1  E1

The chunk's last token reads the neighbours of its own chunk, and the others those of the chunk
before. So the encoder runs inside of the block that completes a chunk: between the two parts of the
loop, when the activations of all of the chunk's tokens are there.

With a stride of s < M tokens, neighbours are retrieved again after every s tokens, with the last M
tokens as the query. Blocks end at multiples of s then, and the last M activations lie in a ring. Each
row has a stride of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from retro_jax.config import RetroConfig
from retro_jax.generate import cache as caches
from retro_jax.generate.cache import Cache, ChunkCache, PerLayer
from retro_jax.model.attention import MASKED, Attention, shared_softmax
from retro_jax.model.backend import scores
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.model.decoder import DecoderLayer, Retrieved
from retro_jax.model.layers import LearnedPositions
from retro_jax.sharding import Shardings, target_platform

# The residual stream [B, T, D] of a block, and the cache.
Carry = tuple[jax.Array, Cache]
# What an attention reads: heads [B, T, H, W], and the logarithm of its denominators [B, T, H].
Heads = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistanceTables:
    """The positions' values for every distance, the largest first; None where they need none.

    Attributes:
      attention: of every layer, [S, ...] for distances S - 1 to 0, S the longest window.
      cca: of every CCA layer, for all distances of one neighbour's keys (`cca_queries`).
    """

    attention: PerLayer | None
    cca: PerLayer | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompletedChunks:
    """Chunks that are complete with this block, and their neighbours.

    Attributes:
      neighbours: [n, K, R] int32. tokens: [n, M] int32, of the chunks. rows: [n] int32, whose they are.
      source: [B] int32, which of the n belongs to a row; any number where `completes` [B] is False.
    """

    neighbours: jax.Array
    tokens: jax.Array
    rows: jax.Array
    source: jax.Array
    completes: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["starts", "tables", "completed", "strides"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class CachedBlock:
    """The operators on one block; the carry is (stream [B, T, D], cache).

    Attributes:
      config: the architecture. starts: [B] int32, the position of each row's first token.
      tables: of the distances.
      completed: chunks that are complete with this block, or None for none.
      strides: [B] int32, s of each row, tokens between retrievals; M, or a divisor of it.
    """

    config: RetroConfig
    starts: jax.Array
    tables: DistanceTables
    completed: CompletedChunks | None
    strides: jax.Array

    def attend(self, layer: DecoderLayer, carry: Carry, p: Any) -> Carry:
        """H + ATTN(H) of layer p, and its keys and values in the cache."""
        (heads_BxTxHxW, _), carry = self._read_text(layer, carry, p)
        return self._with_branch(layer, carry, layer.attention.read_out(heads_BxTxHxW))

    def _with_branch(self, layer: DecoderLayer, carry: Carry, branch_BxTxD: jax.Array) -> Carry:
        """`attend` with what ATTN has read."""
        h_BxTxD, cache = carry
        sum_BxTxD = h_BxTxD + branch_BxTxD
        if self.config.form.parallel_residual:
            sum_BxTxD = sum_BxTxD + layer.feed_forward(h_BxTxD)
        return sum_BxTxD, cache

    def _read_text(self, layer: DecoderLayer, carry: Carry, p: Any) -> tuple[Heads, Carry]:
        """What ATTN of layer p reads, before its output; the carry with keys and values in the cache."""
        h_BxTxD, cache = carry
        attention = layer.attention
        shardings = attention.layout.shardings
        query, key, value = attention.project(h_BxTxD, None)
        positions_BxT = self._positions(h_BxTxD.shape[1])
        query = attention.positions.turn(query, positions_BxT)
        key = attention.positions.turn(key, positions_BxT)
        old = caches.take(cache.keys, p - 1), caches.take(cache.values, p - 1)
        query, biases = self._self_biases(attention, query, p, cache.capacity)
        mask_Bx1xS = jnp.arange(cache.capacity) < self.starts[:, None, None]
        mask_TxT = jnp.tril(jnp.ones((h_BxTxD.shape[1],) * 2, bool))
        before = Part(*old, mask_Bx1xS[:, None], biases[0])
        new = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1)
        block = Part(*new, mask_TxT, biases[1])
        heads_BxTxHxW, total_BxTxH = attend_and_total(query, [before, block], shardings)
        keys, values = (
            caches.write_block(
                cached, after(projection, heads_BxTxHxW, shardings), self.starts, shardings
            )
            for cached, projection in zip(old, (key, value), strict=True)
        )
        cache = dataclasses.replace(
            cache,
            keys=caches.put(cache.keys, p - 1, keys),
            values=caches.put(cache.values, p - 1, values),
        )
        return (heads_BxTxHxW, total_BxTxH), (h_BxTxD, cache)

    def attend_beside(
        self,
        layer: DecoderLayer,
        cca: ChunkedCrossAttention,
        carry: Carry,
        p: Any,
        retrieved: Retrieved,
    ) -> Carry:
        """H + ATTN(H) + CCA(H, E) of layer p, as gated CCA has it."""
        h_BxTxD, cache = carry
        read, cache = self._read_neighbours(cca, h_BxTxD, cache, p, retrieved)
        if not self.config.form.shared_softmax:
            sum_BxTxD, cache = self.attend(layer, (h_BxTxD, cache), p)
            return sum_BxTxD + self._read_out(cca, read[0]), cache
        own, carry = self._read_text(layer, (h_BxTxD, cache), p)
        gate_H = cca.attention.layout.weight(cca.gate)
        own_BxTxHxW, read_BxTxHxW = shared_softmax(own, read, gate_H)
        carry = self._with_branch(layer, carry, layer.attention.read_out(own_BxTxHxW))
        return carry[0] + cca.attention.read_out(read_BxTxHxW), carry[1]

    def cross_attend(
        self, cca: ChunkedCrossAttention, carry: Carry, p: Any, retrieved: Retrieved
    ) -> Carry:
        """H + CCA(H, E) of layer p; the encoder's new output replaces the chunk before."""
        h_BxTxD, cache = carry
        (heads_BxTxHxW, _), cache = self._read_neighbours(cca, h_BxTxD, cache, p, retrieved)
        return h_BxTxD + self._read_out(cca, heads_BxTxHxW), cache

    def _read_neighbours(
        self,
        cca: ChunkedCrossAttention,
        h_BxTxD: jax.Array,
        cache: Cache,
        p: Any,
        retrieved: Retrieved,
    ) -> tuple[Heads, Cache]:
        """What CCA of layer p reads, before gates and output; the cache with E's new keys and values."""
        chunk = cast(ChunkCache, cache.chunk)
        index, shardings = self._cca_index(p), cca.attention.layout.shardings
        old = (caches.take(chunk.keys, index), caches.take(chunk.values, index))
        context_NxQxE = self._context(retrieved, index)
        if cca.gated:
            context_NxQxE = cca.attention.norm(context_NxQxE)
        query, *projection = cca.attention.project(h_BxTxD, context_NxQxE)
        offsets_BxT = self._positions(h_BxTxD.shape[1]) % self.strides[:, None]
        last_BxT = offsets_BxT == self.strides[:, None] - 1
        # A chunk's last token is the first that reads its neighbours.
        positions_BxT = cca_queries(self.config).start + jnp.where(last_BxT, 0, offsets_BxT + 1)
        query = cca.attention.positions.turn(query, positions_BxT)
        bias = None
        if self.tables.cca is not None:
            table = caches.take(self.tables.cca, index)
            query, bias = self._cca_bias(cca.attention, query, table, positions_BxT)
        before = Part(*old, chunk.present[:, None, None], bias)
        if self.completed is None:
            return attend_and_total(query, [before], shardings), cache
        new = self._new_keys(cca.attention, projection, old)
        present = self._present(chunk, retrieved)
        new_part = Part(*new, present[:, None, None], bias)
        heads, total = attend_and_total(query, [new_part], shardings)
        if h_BxTxD.shape[1] > 1:
            heads_before, total_before = attend_and_total(query, [before], shardings)
            heads = jnp.where(last_BxT[..., None, None], heads, heads_before)
            total = jnp.where(last_BxT[..., None], total, total_before)
        chunk = dataclasses.replace(
            chunk,
            keys=caches.put(chunk.keys, index, new[0]),
            values=caches.put(chunk.values, index, new[1]),
        )
        return (heads, total), dataclasses.replace(cache, chunk=chunk)

    @staticmethod
    def _read_out(cca: ChunkedCrossAttention, heads_BxTxHxW: jax.Array) -> jax.Array:
        """Heads, times their gates where they have any, as a branch [B, T, D]."""
        if cca.gated:
            heads_BxTxHxW = heads_BxTxHxW * cca.attention.layout.weight(cca.gate)[:, None]
        return cca.attention.read_out(heads_BxTxHxW)

    def _context(self, retrieved: Retrieved, index: Any) -> jax.Array:
        """[n, Q, E]: what a CCA layer reads of the chunks completed, neighbours side by side."""
        encoded = retrieved.encoded
        if encoded.ndim == 6:  # for each CCA layer
            encoded = jax.lax.dynamic_index_in_dim(encoded, index, axis=3, keepdims=False)
        rows, _, neighbours, length, width = encoded.shape
        return encoded.reshape(rows, neighbours * length, width)

    def feed_forward(self, layer: DecoderLayer, carry: Carry, p: Any) -> Carry:
        """H + FFW(H); H where `attend` has added FFW."""
        if self.config.form.parallel_residual:
            return carry
        h_BxTxD, cache = carry
        return h_BxTxD + layer.feed_forward(h_BxTxD), cache

    def add_positions(self, table: LearnedPositions, h_BxTxD: jax.Array) -> jax.Array:
        """Embedded tokens with learned positions."""
        return h_BxTxD + table(self._positions(h_BxTxD.shape[1]))

    def dropped(self, branch: jax.Array, number: Any) -> jax.Array:
        """The branch: nothing is dropped while decoding."""
        return branch

    def finish(self, cache: Cache, retrieved: Retrieved | None) -> Cache:
        """After the last layer: which positions of new neighbours are not padding."""
        if self.completed is None or cache.chunk is None or retrieved is None:
            return cache
        chunk = dataclasses.replace(cache.chunk, present=self._present(cache.chunk, retrieved))
        return dataclasses.replace(cache, chunk=chunk)

    def _positions(self, length: int) -> jax.Array:
        """[B, T]: where each token is in its text."""
        return self.starts[:, None] + jnp.arange(length)

    def _cca_index(self, p: Any) -> Any:
        """Which of the CCA layers layer p is, from 0."""
        if isinstance(p, int):
            return self.config.cca_layers.index(p)
        return jnp.searchsorted(jnp.asarray(self.config.cca_layers), p)

    def _self_biases(
        self, attention: Attention, query: jax.Array, p: Any, capacity: int
    ) -> tuple[jax.Array, list[jax.Array | None]]:
        """Queries, and the terms that distances add to logits of S old keys and of the block's T."""
        if self.tables.attention is None:
            return query, [None, None]
        table = caches.take(self.tables.attention, p - 1)
        query, by_distance = attention.by_distance(query, table[table.shape[0] - capacity :])
        # Columns are distances S - 1 to 0. Keys that come after the query are masked anyway.
        padded = jnp.pad(by_distance, ((0, 0),) * 3 + ((0, capacity - 1),))
        first_BxT = capacity - 1 - self._positions(query.shape[1])
        shardings = attention.layout.shardings
        old = caches.cut_rows(padded, first_BxT, capacity, shardings)
        first_BxT = first_BxT + self.starts[:, None]
        return query, [old, caches.cut_rows(padded, first_BxT, query.shape[1], shardings)]

    def _cca_bias(
        self,
        attention: Attention,
        query: jax.Array,
        table: jax.Array,
        positions_BxT: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Queries, and the terms of distances in the logits of one neighbour's keys: [B, H, T, R]."""
        query, by_distance = attention.by_distance(query, table)
        largest = cca_queries(self.config)[-1]
        length, shardings = caches.encoded_length(self.config), attention.layout.shardings
        return query, caches.cut_rows(by_distance, largest - positions_BxT, length, shardings)

    def _new_keys(
        self, attention: Attention, projection: list[jax.Array], old: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, G, W, Q]: those of the chunks completed, else as they were."""
        completed = cast(CompletedChunks, self.completed)
        key_NxQxGxW, value_NxQxGxW = projection
        length = caches.encoded_length(self.config)
        positions = np.tile(np.arange(length), key_NxQxGxW.shape[1] // length)
        key_NxQxGxW = attention.positions.turn(key_NxQxGxW, positions)
        mask = completed.completes[:, None, None, None]

        def chosen(new_NxQxGxW: jax.Array, old_BxGxWxQ: jax.Array) -> jax.Array:
            new = caches.take_rows(new_NxQxGxW.transpose(0, 2, 3, 1), completed.source)
            return jnp.where(mask, new, old_BxGxWxQ)

        return chosen(key_NxQxGxW, old[0]), chosen(value_NxQxGxW, old[1])

    def _present(self, chunk: ChunkCache, retrieved: Retrieved) -> jax.Array:
        """[B, Q] bool, after this block."""
        completed = cast(CompletedChunks, self.completed)
        new = retrieved.present.reshape(retrieved.present.shape[0], -1)
        return jnp.where(
            completed.completes[:, None], caches.take_rows(new, completed.source), chunk.present
        )


def cca_queries(config: RetroConfig) -> range:
    """The positions of the M tokens that read a chunk's neighbours, whose keys are at 0 and after."""
    first = config.chunk_length - 1
    if config.form.gated_cca:
        first = caches.encoded_length(config) + config.form.neighbour_distance
    return range(first, first + config.chunk_length)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the keys that queries read.

    Attributes:
      keys, values: [B, G, W, S]. mask: of [B, 1, T, S], broadcast, True where a query may read a key.
      bias: [B, H, T, S], or fewer columns that are repeated for each neighbour; None for none.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    bias: jax.Array | None


def attend_and_total(
    query_BxTxHxW: jax.Array, parts: Sequence[Part], shardings: Shardings = Shardings()
) -> Heads:
    """model.attention.attend with one softmax over keys that are not in one array.

    The H / G heads of queries that read one head of keys are rows of one product, [B, G, rows, S]
    with rows = H / G * T: keys are not repeated.

    Returns:
      [B, T, H, W], and the logarithm of the softmax's denominator, [B, T, H].
    """
    *_, num_heads, width = query_BxTxHxW.shape
    shared = num_heads // parts[0].keys.shape[1]
    query = _fold_heads(query_BxTxHxW, shared, shardings)
    masked, masks = [], []
    for part in parts:
        logits = scores(query, part.keys.transpose(0, 3, 1, 2))
        if part.bias is not None:
            repeats = part.keys.shape[3] // part.bias.shape[-1]
            bias = jnp.concatenate([part.bias] * repeats, axis=-1)
            logits = logits + bias.reshape(logits.shape).astype(jnp.float32)
        mask = part.mask
        if shared > 1 and mask.shape[-2] > 1:
            mask = jnp.concatenate([mask] * shared, axis=-2)
        masks.append(mask)
        masked.append(jnp.where(mask, logits / math.sqrt(width), MASKED))
    peaks = [jnp.max(logits, axis=-1, keepdims=True) for logits in masked]
    peak = functools.reduce(jnp.maximum, peaks)
    weights = [
        jnp.where(mask, jnp.exp(logits - peak), 0.0)
        for mask, logits in zip(masks, masked, strict=True)
    ]
    total = sum(jnp.sum(weight, axis=-1, keepdims=True) for weight in weights)
    divisor = jnp.where(total == 0.0, 1.0, total)
    share = 1.0 / divisor
    heads = [
        jnp.einsum("bhts,bhws->bthw", (weight * share).astype(part.values.dtype), part.values)
        for part, weight in zip(parts, weights, strict=True)
    ]
    log_total_BxTxGx1 = (peak + jnp.log(divisor)).swapaxes(1, 2)
    return (
        _unfold_heads(sum(heads[1:], heads[0]), shared, shardings),
        _unfold_heads(log_total_BxTxGx1, shared, shardings)[..., 0],
    )


def _fold_heads(query_BxTxHxW: jax.Array, shared: int, shardings: Shardings) -> jax.Array:
    """[B, H / G * T, G, W]: head h = g * H / G + i of token t is row i * T + t of head g."""
    if shared == 1:
        return query_BxTxHxW
    batch, length, heads, width = query_BxTxHxW.shape
    split = (batch, length, heads // shared, shared, width)
    query = jnp.reshape(query_BxTxHxW, split, out_sharding=_by_group(shardings))
    shape = (batch, shared * length, heads // shared, width)
    return jnp.reshape(query.transpose(0, 3, 1, 2, 4), shape, out_sharding=shardings.heads(4))


def _unfold_heads(heads_BxTxGxW: jax.Array, shared: int, shardings: Shardings) -> jax.Array:
    """The inverse of `_fold_heads`: [B, T, H, W]."""
    if shared == 1:
        return heads_BxTxGxW
    batch, rows, groups, width = heads_BxTxGxW.shape
    split = (batch, shared, rows // shared, groups, width)
    heads = jnp.reshape(heads_BxTxGxW, split, out_sharding=shardings.heads(5))
    shape = (batch, rows // shared, groups * shared, width)
    return jnp.reshape(heads.transpose(0, 2, 3, 1, 4), shape, out_sharding=shardings.heads(4))


def _by_group(shardings: Shardings) -> P | None:
    """The sharding of [B, T, G, H / G, W]."""
    spec = shardings.heads(4)
    return None if spec is None else P(*spec[:3], None, None)


def after(
    block_BxTxGxW: jax.Array, heads_BxTxHxW: jax.Array, shardings: Shardings = Shardings()
) -> jax.Array:
    """The block's keys, or values, once the cache has been read: only then XLA writes in place.

    On a CPU its passes drop barriers before they decide on copies, so the order is a sum.
    """
    if target_platform() != "cpu":
        return block_BxTxGxW
    batch, length, heads, width = heads_BxTxHxW.shape
    groups = block_BxTxGxW.shape[2]
    split = (batch, length, groups, heads // groups, width)
    read = jnp.reshape(heads_BxTxHxW, split, out_sharding=_by_group(shardings))
    return block_BxTxGxW + 0 * read[:, :1, :, 0, :1]
