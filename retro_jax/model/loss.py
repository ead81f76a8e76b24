"""The loss of every token, made in blocks so that [B, N, V] never exists at once."""

import jax
import jax.numpy as jnp

from retro_jax.model.layers import Layout, largest_divisor
from retro_jax.model.matmul import product
from retro_jax.sharding import lay_out


def read_out(h: jax.Array, table: jax.Array, layout: Layout) -> jax.Array:
    """[B, N, D] final activations and a [V, D] table -> [B, N, V] float32 logits."""
    if layout.dtype == jnp.float32:
        return product(h, table.T, out_sharding=layout.shardings.wide(3))
    return jnp.einsum(
        "bnd,vd->bnv",
        h,
        table.astype(layout.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=layout.shardings.wide(3),
    )


def token_losses(
    h: jax.Array, table: jax.Array, targets: jax.Array, *, pad_id: int, layout: Layout
) -> jax.Array:
    """Negative log-likelihood of every target in nats.

    Args:
      h: [B, N, D], the final activations. table: [V, D], the read-out.
      targets: [B, N] int32; pad_id where there is no loss.
      pad_id: RetroConfig.pad_id. layout: dtype, shardings and the block's size.

    Returns:
      [B, N] float32; 0 where the target is pad_id.
    """
    # Gathered once and in float32, so that the blocks' gradients add up in float32.
    table = lay_out(table, layout.shardings.parameter("read_out", gathered=True))

    def block_losses(h: jax.Array, targets: jax.Array) -> jax.Array:
        logits = read_out(h, table, layout)
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        # A masked sum, unlike a gather, works where the vocabulary is sharded.
        target_logits = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
        return jnp.where(targets == pad_id, 0.0, losses)

    batch, length = targets.shape
    block = largest_divisor(length, layout.execution.loss_block or length)
    if block == length:
        return block_losses(h, targets)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, length // block, block, *x.shape[2:]), 1, 0)

    losses = jax.lax.map(lambda xs: jax.checkpoint(block_losses)(*xs), (cut(h), cut(targets)))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, length)
