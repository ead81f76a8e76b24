"""The decoder's ATTN: causal, inside documents, by a fused kernel or by blocks of queries.

A block of queries reads only the keys up to its own end, so that about half of the products of a
full [N, N] matrix are never made, and only one block's logits exist at a time: memory grows with N,
not with its square. One block as long as the sequence is the plain form.

With every block written out, programs and their compilation would grow with N. More than four blocks
are gathered in four spans, each a loop over its blocks, which read the keys up to the span's end:

    queries   0..3   4..7   8..11  12..15      16 blocks in 4 spans make 10 of 16 squares, where
    keys      0..3   0..7   0..11  0..15       blocks by themselves make 8.5 and one loop all 16
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.model.attention import Attention
from retro_jax.model.attention_kernels import attention_kind, fused_attention
from retro_jax.model.layers import largest_divisor
from retro_jax.model.positions import distances, rotate
from retro_jax.sharding import target_platform

_SPANS = 4


def causal_attention(
    attention: Attention,
    x: jax.Array,
    documents: jax.Array | None,
    *,
    chunk_length: int,
) -> jax.Array:
    """ATTN(H) without the residual.

    Args:
      attention: the layer's self attention.
      x: [B, N, D], the residual stream.
      documents: [B, C] which document each chunk is of, or None for one document a row.
      chunk_length: M, with N = C * M.

    Returns:
      [B, N, D].
    """
    length = x.shape[1]
    execution = attention.layout.execution
    query, key, value = attention.project(x, None)
    kind = attention_kind(
        execution,
        platform=target_platform(),
        positions=attention.positions,
        head_dim=query.shape[-1],
        length=length,
    )
    segments = None if documents is None else jnp.repeat(documents, chunk_length, axis=1)
    if attention.positions == "rotary":
        positions = np.arange(length)
        query, key = rotate(query, positions), rotate(key, positions)
    if kind == "fused":
        shardings = attention.layout.shardings
        heads = fused_attention(
            query, key, value, segments, platform=target_platform(), shardings=shardings
        )
        return attention.read_out(heads)
    block = length if kind == "plain" else min(execution.attention_block, length)
    return attention.read_out(_attend_by_spans(attention, query, key, value, segments, block))


def _attend_by_spans(
    attention: Attention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    block: int,
) -> jax.Array:
    """Attends by blocks of queries, gathered in spans: [B, N, H, head_dim]."""
    length = query.shape[1]
    span, block = _span_and_block(length, block)
    table = None
    if attention.positions == "relative":
        table = attention.position_keys(distances(span, length, offset=length - span))
    outputs = []
    for start in range(0, length, span):
        stop = min(start + span, length)
        keys = (
            key[:, :stop],
            value[:, :stop],
            None if segments is None else segments[:, :stop],
            None if table is None else table[length - stop :],
        )
        if span == length:
            return _attend_block(attention, query, *keys, start=0)
        outputs.append(_attend_span(attention, query[:, start:stop], keys, start, block))
    return jnp.concatenate(outputs, axis=1)


def _span_and_block(length: int, block: int) -> tuple[int, int]:
    """How many queries are given the same keys, and how many of them are run at once."""
    if length <= block * _SPANS:
        return block, block
    block = largest_divisor(length, block)
    return -(-(length // block) // _SPANS) * block, block


def _attend_span(
    attention: Attention, query: jax.Array, keys: tuple, start: int, block: int
) -> jax.Array:
    """The positions from `start` to the last key as queries, a block at a time: [B, T, H, head_dim]."""
    batch, length, *heads = query.shape
    # The logits of a block are made again in the backward pass.
    if length <= block:
        return jax.checkpoint(functools.partial(_attend_block, attention, start=start))(
            query, *keys
        )

    @jax.checkpoint
    def run(query: jax.Array, start: jax.Array, keys: tuple) -> jax.Array:
        return _attend_block(attention, query, *keys, start=start)

    queries = jnp.moveaxis(query.reshape(batch, length // block, block, *heads), 1, 0)
    starts = start + block * jnp.arange(length // block)
    out = jax.lax.map(lambda xs: run(*xs, keys), (queries, starts))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape)


def _attend_block(
    attention: Attention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    table: jax.Array | None,
    *,
    start: jax.Array | int,
) -> jax.Array:
    """T positions from `start` on as queries over the first S as keys: [B, T, H, head_dim].

    The table's first row is of the largest distance there is, from position S - 1 to position 0.
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    mask = jnp.arange(num_keys) <= start + jnp.arange(num_queries)[:, None]
    mask = mask[None, None]
    if segments is not None:
        own = jax.lax.dynamic_slice_in_dim(segments, start, num_queries, axis=1)
        mask = mask & (own[:, None, :, None] == segments[:, None, None, :])
    if table is not None:
        # From the block's last query and the first key to its first query and last key.
        first = num_keys - start - num_queries
        table = jax.lax.dynamic_slice_in_dim(table, first, num_queries + num_keys - 1)
    return attention.attend(query, key, value, mask, table)
