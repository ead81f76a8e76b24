"""The decoder's ATTN: causal, inside documents, by blocks of queries.

A block of queries reads only the keys up to its own end, so that about half of the products of a
full [N, N] matrix are never made, and only one block's logits exist at a time: memory grows with N,
not with its square. One block as long as the sequence is the plain form.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from retro_jax.model import attention as ops
from retro_jax.model.attention import Attention


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
    block = length if execution.attention == "plain" else min(execution.attention_block, length)
    query, key, value = attention.project(x, None)
    table = None
    if attention.positions == "rotary":
        positions = jnp.arange(length)
        query, key = ops.rotate(query, positions), ops.rotate(key, positions)
    else:
        table = attention.position_keys(ops.distances(block, length, offset=length - block))
    segments = None if documents is None else jnp.repeat(documents, chunk_length, axis=1)

    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        run: Callable[..., jax.Array] = functools.partial(_attend_block, attention)
        if block < length:
            run = jax.checkpoint(run)  # the logits of a block are made again in the backward pass
        outputs.append(
            run(
                query[:, start:stop],
                key[:, :stop],
                value[:, :stop],
                None if segments is None else segments[:, :stop],
                # From the block's last query and the first key to its first query and last key.
                None if table is None else table[length - stop : length + stop - start - 1],
            )
        )
    return attention.read_out(outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1))


def _attend_block(
    attention: Attention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    table: jax.Array | None,
) -> jax.Array:
    """The last T of S positions as queries over all S as keys: [B, T, H, head_dim]."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    start = num_keys - num_queries
    mask = jnp.arange(num_keys) <= jnp.arange(start, num_keys)[:, None]
    mask = mask[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, start:, None] == segments[:, None, None, :])
    return attention.attend(query, key, value, mask, table)
