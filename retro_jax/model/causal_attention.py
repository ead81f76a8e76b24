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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.model.attention import Attention
from retro_jax.model.attention_kernels import attention_kind, fused_attention, relative_block
from retro_jax.model.layers import largest_divisor
from retro_jax.sharding import target_platform

_SPANS = 4
# Attention.attend, or attend_and_total.
_Attend = Callable[..., Any]


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
    heads_BxNxHxW = _attend(
        attention, x_BxNxD, documents_BxC, chunk_length=chunk_length, with_total=False
    )
    return attention.read_out(heads_BxNxHxW)


def causal_heads(
    attention: Attention,
    x_BxNxD: jax.Array,
    documents_BxC: jax.Array | None,
    *,
    chunk_length: int,
) -> tuple[jax.Array, jax.Array]:
    """ATTN(H) before its output: heads [B, N, H, W], and the logarithm of their denominators [B, N, H].

    The arguments are those of `causal_attention`. There is no fused kernel for it.
    """
    return _attend(attention, x_BxNxD, documents_BxC, chunk_length=chunk_length, with_total=True)


def _attend(
    attention: Attention,
    x_BxNxD: jax.Array,
    documents_BxC: jax.Array | None,
    *,
    chunk_length: int,
    with_total: bool,
) -> Any:
    """Heads [B, N, H, W], or those of `causal_heads`."""
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
    if kind == "fused" and not with_total:
        query_BxNxHxW, relative = attention.for_kernel(query_BxNxHxW, relative_block(length))
        return fused_attention(
            query_BxNxHxW,
            key_BxNxHxW,
            value_BxNxHxW,
            segments_BxN,
            relative=relative,
            platform=target_platform(),
            shardings=attention.layout.shardings,
        )
    block = length if kind == "plain" else min(execution.attention_block, length)
    keys = _Keys(key_BxNxHxW, value_BxNxHxW, segments_BxN)
    attend = attention.attend_and_total if with_total else attention.attend
    return _attend_by_spans(attention, attend, query_BxNxHxW, keys, block)


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
    attention: Attention, attend: _Attend, query_BxNxHxW: jax.Array, keys: _Keys, block: int
) -> Any:
    """Attends by blocks of queries, gathered in spans: [B, N, ...] of each array that `attend` gives."""
    length = query_BxNxHxW.shape[1]
    span, block = _span_and_block(length, block)
    table = attention.distance_table(span, length, offset=length - span)
    keys = dataclasses.replace(keys, table=table)
    if span == length:
        return _attend_block(attend, query_BxNxHxW, keys, start=0)
    outputs = []
    for start in range(0, length, span):
        stop = min(start + span, length)
        query_BxTxHxW = query_BxNxHxW[:, start:stop]
        outputs.append(_attend_span(attend, query_BxTxHxW, keys.first(stop), start, block))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outputs)


def _span_and_block(length: int, block: int) -> tuple[int, int]:
    """How many queries are given the same keys, and how many of them are run at once."""
    if length <= block * _SPANS:
        return block, block
    block = largest_divisor(length, block)
    return -(-(length // block) // _SPANS) * block, block


def _attend_span(
    attend: _Attend, query_BxTxHxW: jax.Array, keys: _Keys, start: int, block: int
) -> Any:
    """The positions from `start` to the last key as queries, a block at a time: [B, T, ...]."""
    batch, length, *heads = query_BxTxHxW.shape
    # The logits of a block are computed again in the backward pass.
    if length <= block:
        return jax.checkpoint(functools.partial(_attend_block, attend, start=start))(
            query_BxTxHxW, keys
        )

    @jax.checkpoint
    def run(query: jax.Array, start: jax.Array, keys: _Keys) -> Any:
        return _attend_block(attend, query, keys, start=start)

    blocks = query_BxTxHxW.reshape(batch, length // block, block, *heads)
    starts = start + block * jnp.arange(length // block)
    out = jax.lax.map(lambda xs: run(*xs, keys), (jnp.moveaxis(blocks, 1, 0), starts))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:]), out)


def _attend_block(
    attend: _Attend, query_BxTxHxW: jax.Array, keys: _Keys, *, start: jax.Array | int
) -> Any:
    """T positions from `start` on as queries over the first S as keys: [B, T, ...]."""
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
    return attend(query_BxTxHxW, keys.key, keys.value, mask, table)
