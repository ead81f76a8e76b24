"""How much text a retrieved chunk shares with the chunk that it was retrieved for.

Neighbours that share little are seldom of use (RetroConfig.min_shared_tokens). What is shared is counted
here as a set: of the distinct tokens of the chunk, those that the neighbour has anywhere.
"""

import jax
import jax.numpy as jnp


def shared_tokens(chunks: jax.Array, neighbours: jax.Array, pad_id: int) -> jax.Array:
    """The part of each chunk's distinct tokens that its neighbours have.

    Args:
      chunks: [B, C, M] int32. neighbours: [B, C, K, R] int32. pad_id: what is no token.

    Returns:
      [B, C, K] float32 from 0 to 1; 0 for a chunk or a neighbour without tokens.
    """
    length = chunks.shape[-1]
    earlier_MxM = jnp.tril(jnp.ones((length, length), bool), -1)
    equal_BxCxMxM = chunks[..., :, None] == chunks[..., None, :]
    repeated_BxCxM = jnp.any(equal_BxCxMxM & earlier_MxM, axis=-1)
    distinct_BxCxM = (chunks != pad_id) & ~repeated_BxCxM
    found_BxCxKxM = jnp.any(chunks[:, :, None, :, None] == neighbours[:, :, :, None, :], axis=-1)
    shared_BxCxK = jnp.sum(found_BxCxKxM & distinct_BxCxM[:, :, None], axis=-1)
    total_BxCx1 = jnp.sum(distinct_BxCxM, axis=-1)[..., None]
    return shared_BxCxK.astype(jnp.float32) / jnp.maximum(total_BxCx1, 1)
