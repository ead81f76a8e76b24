"""The decoder's ATTN: causal, inside documents, by a fused kernel or by blocks of queries.

A block of queries reads only the keys up to its own end. About half of the products of a full
[N, N] matrix are never computed. Only one block's logits exist at a time: memory grows with N,
not with its square. One block as long as the sequence is the plain form.

With every block written out, programs and their compilation would grow with N. More than four blocks
are gathered in four spans, each a loop over its blocks, which read the keys up to the span's end:

    queries   0..3   4..7   8..11  12..15      16 blocks in 4 spans compute 10 of 16 squares;
    keys      0..3   0..7   0..11  0..15       single blocks compute 8.5 and one loop all 16
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.model.attention import Attention
from retro_jax.model.attention_kernels import attention_kind, fused_attention, relative_block
from retro_jax.model.layers import largest_divisor
from retro_jax.sharding import target_platform

_SPANS = 4


def causal_attention(
    attention: Attention,
    x_BxNxD: jax.Array,
    documents_BxC: jax.Array | None,
    *,
    chunk_length: int,
) -> jax.Array:
    """ATTN(H) without the residual.

    Args:
      attention: the layer's self attention.
      x_BxNxD: the residual stream.
      documents_BxC: the document of each chunk, or None for one document per row.
      chunk_length: M, with N = C * M.

    Returns:
      [B, N, D].
    """
    length = x_BxNxD.shape[1]
    execution, positions = attention.layout.execution, attention.positions
    query, key, value_BxNxHxW = attention.project(x_BxNxD, None)
    kind = attention_kind(
        execution,
        platform=target_platform(),
        positions=positions,
        head_dim=query.shape[-1],
        length=length,
    )
    segments_BxN = None
    if documents_BxC is not None:
        segments_BxN = jnp.repeat(documents_BxC, chunk_length, axis=1)
    query_BxNxHxW, key_BxNxHxW = (positions.turn(x, np.arange(length)) for x in (query, key))
    if kind == "fused":
        query_BxNxHxW, relative = attention.for_kernel(query_BxNxHxW, relative_block(length))
        heads_BxNxHxW = fused_attention(
            query_BxNxHxW,
            key_BxNxHxW,
            value_BxNxHxW,
            segments_BxN,
            relative=relative,
            platform=target_platform(),
            shardings=attention.layout.shardings,
        )
        return attention.read_out(heads_BxNxHxW)
    block = length if kind == "plain" else min(execution.attention_block, length)
    keys = _Keys(key_BxNxHxW, value_BxNxHxW, segments_BxN)
    return attention.read_out(_attend_by_spans(attention, query_BxNxHxW, keys, block))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Keys:
    """Inputs of queries: keys and values [B, S, H, W], and their documents [B, S] or None.

    table: the positions' values by distance, the largest first: from position S - 1 to 0.
    """

    key: jax.Array
    value: jax.Array
    segments: jax.Array | None
    table: jax.Array | None = None

    def first(self, count: int) -> "_Keys":
        """The first `count` keys, of all S."""
        dropped = self.key.shape[1] - count
        return _Keys(
            self.key[:, :count],
            self.value[:, :count],
            None if self.segments is None else self.segments[:, :count],
            None if self.table is None else self.table[dropped:],
        )


def _attend_by_spans(
    attention: Attention, query_BxNxHxW: jax.Array, keys: _Keys, block: int
) -> jax.Array:
    """Attends by blocks of queries, gathered in spans: [B, N, H, W]."""
    length = query_BxNxHxW.shape[1]
    span, block = _span_and_block(length, block)
    table = attention.distance_table(span, length, offset=length - span)
    keys = dataclasses.replace(keys, table=table)
    if span == length:
        return _attend_block(attention, query_BxNxHxW, keys, start=0)
    outputs = []
    for start in range(0, length, span):
        stop = min(start + span, length)
        query_BxTxHxW = query_BxNxHxW[:, start:stop]
        outputs.append(_attend_span(attention, query_BxTxHxW, keys.first(stop), start, block))
    return jnp.concatenate(outputs, axis=1)


def _span_and_block(length: int, block: int) -> tuple[int, int]:
    """How many queries are given the same keys, and how many of them are run at once."""
    if length <= block * _SPANS:
        return block, block
    block = largest_divisor(length, block)
    return -(-(length // block) // _SPANS) * block, block


def _attend_span(
    attention: Attention, query_BxTxHxW: jax.Array, keys: _Keys, start: int, block: int
) -> jax.Array:
    """The positions from `start` to the last key as queries, a block at a time: [B, T, H, W]."""
    batch, length, *heads = query_BxTxHxW.shape
    # The logits of a block are computed again in the backward pass.
    if length <= block:
        return jax.checkpoint(functools.partial(_attend_block, attention, start=start))(
            query_BxTxHxW, keys
        )

    @jax.checkpoint
    def run(query: jax.Array, start: jax.Array, keys: _Keys) -> jax.Array:
        return _attend_block(attention, query, keys, start=start)

    blocks = query_BxTxHxW.reshape(batch, length // block, block, *heads)
    starts = start + block * jnp.arange(length // block)
    out = jax.lax.map(lambda xs: run(*xs, keys), (jnp.moveaxis(blocks, 1, 0), starts))
    return jnp.moveaxis(out, 0, 1).reshape(query_BxTxHxW.shape)


def _attend_block(
    attention: Attention, query_BxTxHxW: jax.Array, keys: _Keys, *, start: jax.Array | int
) -> jax.Array:
    """T positions from `start` on as queries over the first S as keys: [B, T, H, W]."""
    num_queries, num_keys = query_BxTxHxW.shape[1], keys.key.shape[1]
    mask_TxS = jnp.arange(num_keys) <= start + jnp.arange(num_queries)[:, None]
    mask = mask_TxS[None, None]
    if keys.segments is not None:
        segments_BxT = jax.lax.dynamic_slice_in_dim(keys.segments, start, num_queries, axis=1)
        mask = mask & (segments_BxT[:, None, :, None] == keys.segments[:, None, None, :])
    table = keys.table
    if table is not None:
        # From the block's last query and the first key to its first query and last key.
        first = num_keys - start - num_queries
        table = jax.lax.dynamic_slice_in_dim(table, first, num_queries + num_keys - 1)
    return attention.attend(query_BxTxHxW, keys.key, keys.value, mask, table)
