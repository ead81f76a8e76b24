"""The loss of every token, computed in blocks so that [B, N, V] never exists at once."""

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.model.backend import product
from retro_jax.model.layers import Layout, largest_divisor
from retro_jax.model.tiled_loss import Tiling, tiled_losses
from retro_jax.sharding import lay_out


def read_out(h_BxNxD: jax.Array, table_VxD: jax.Array, layout: Layout) -> jax.Array:
    """Final activations and the read-out's table -> [B, N, V] float32 logits."""
    if layout.dtype == jnp.float32:
        return product(h_BxNxD, table_VxD.T, out_sharding=layout.shardings.wide(3))
    return jnp.einsum(
        "bnd,vd->bnv",
        h_BxNxD,
        table_VxD.astype(layout.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=layout.shardings.wide(3),
    )


def token_losses(
    h_BxNxD: jax.Array,
    table: nnx.Param,
    targets_BxN: jax.Array,
    *,
    pad_id: int,
    layout: Layout,
) -> jax.Array:
    """Negative log-likelihood of every target in nats.

    Args:
      h_BxNxD: the final activations. table: [V, D], the read-out.
      targets_BxN: int32; pad_id where there is no loss.
      pad_id: RetroConfig.pad_id. layout: dtype, shardings and the block's size.

    Returns:
      [B, N] float32; 0 where the target is pad_id.
    """
    batch, length = targets_BxN.shape
    block = largest_divisor(length, layout.execution.loss_block or length)
    if layout.execution.vocab_block:
        ids, shardings = layout.execution.vocab_block, layout.shardings
        tiling = Tiling(ids, block, pad_id, layout.dtype, shardings)
        return tiled_losses(h_BxNxD, table[...], targets_BxN, tiling)
    # Gathered once and in float32, so that the blocks' gradients add up in float32.
    table_VxD = lay_out(table[...], layout.shardings.gathered(table))

    def block_losses(h_BxTxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
        logits_BxTxV = read_out(h_BxTxD, table_VxD, layout)
        hit_BxTxV = jnp.arange(logits_BxTxV.shape[-1]) == targets_BxT[..., None]
        # A masked sum, unlike a gather, works where the vocabulary is sharded.
        target_logits_BxT = jnp.sum(jnp.where(hit_BxTxV, logits_BxTxV, 0.0), axis=-1)
        losses_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - target_logits_BxT
        return jnp.where(targets_BxT == pad_id, 0.0, losses_BxT)

    if block == length:
        return block_losses(h_BxNxD, targets_BxN)

    def blocks(x_BxNxX: jax.Array) -> jax.Array:
        """[B, N, ...] -> [blocks, B, T, ...]."""
        shape = (batch, length // block, block, *x_BxNxX.shape[2:])
        return jnp.moveaxis(x_BxNxX.reshape(shape), 1, 0)

    losses = jax.lax.map(
        lambda xs: jax.checkpoint(block_losses)(*xs), (blocks(h_BxNxD), blocks(targets_BxN))
    )
    return jnp.moveaxis(losses, 0, 1).reshape(batch, length)
