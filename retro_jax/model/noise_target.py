"""Losses of training on neighbours of which some are noise: another chunk's, drawn at random.

Tokens that read noise can teach two things. Trained on the text, CCA learns of the corpus whatever the
neighbours say, and unrelated neighbours end as worth more than none. Trained on what the model predicts
with retrieval off, it learns to leave unrelated neighbours alone. Near those predictions their divergence
grows with the square of a change, and what is learnt of the corpus with the change itself: some of it
always remains. Unlearning takes the text away there: what is learnt of the corpus with related neighbours
is unlearnt with unrelated ones, and what related ones say remains.
Both cost reading where related and unrelated neighbours look alike: docs/retrofit_figures.md has figures.
"""

import jax
import jax.numpy as jnp

from retro_jax.batch import RetroBatch
from retro_jax.model.retro import Retro

NOISE_TARGETS = ("text", "off")


def losses_toward_off(
    model: Retro,
    batch: RetroBatch,
    dropout_key: jax.Array | None = None,
    *,
    weight: float = 1.0,
    unlearning: float = 0.0,
) -> jax.Array:
    """`Retro.token_losses`, with other gradients at the positions that read noise.

    There the gradient by the final activations h is that of the cross-entropy with RETRO[OFF]'s
    distribution p instead of the text's token y. With g = W^T (p - e_y), the gradient of RETRO[OFF]'s own
    loss by its activations, this is W^T (q - e_y) - g = W^T (q - p) for a model that predicts q: g is one
    backward pass of the read-out, and no distribution over the vocabulary is kept. A read-out that is
    trained itself learns from the text at all positions. RETRO[OFF] has no gradients here.

    Args:
      model: with retrieval. batch: with neighbours and `noise`.
      dropout_key: of both passes. weight: that the gradients at these positions are multiplied by.
      unlearning: how much of the text's gradients is taken away there, beside these.

    Returns:
      [B, N] float32 nats of the text, as token_losses.
    """
    if batch.noise is None:
        raise ValueError("the batch has no noise: expected RetroBatch.noise")
    h_BxNxD = model.activations(batch, dropout_key)
    losses_BxN = model.losses(h_BxNxD, batch.targets)
    frozen = model.frozen()
    off_BxNxD = frozen.activations_off(batch, dropout_key)
    g_BxNxD = jax.grad(lambda h: jnp.sum(frozen.losses(h, batch.targets)))(off_BxNxD)
    # Both differences are 0 and only their gradients count.
    moved_BxNxD = (h_BxNxD - jax.lax.stop_gradient(h_BxNxD)).astype(jnp.float32)
    away_BxN = jnp.sum(moved_BxNxD * g_BxNxD.astype(jnp.float32), axis=-1)
    factor = weight - unlearning - 1
    more_BxN = factor * (losses_BxN - jax.lax.stop_gradient(losses_BxN))
    reads_BxN = _reads_noise(batch.noise, batch.documents, model.config.chunk_length)
    return losses_BxN + jnp.where(reads_BxN, more_BxN - weight * away_BxN, 0.0)


def _reads_noise(noise_BxC: jax.Array, documents_BxC: jax.Array, chunk_length: int) -> jax.Array:
    """[B, N] bool: the positions that read the neighbours of a chunk with noise.

    These are its last position, and the next chunk's but the last where that is of the same document.
    """
    last = jnp.arange(noise_BxC.shape[1] * chunk_length) % chunk_length == chunk_length - 1
    follows_BxC = jnp.pad(noise_BxC[:, :-1], ((0, 0), (1, 0))) & (
        documents_BxC == jnp.pad(documents_BxC[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    )
    own_BxN, before_BxN = (
        jnp.repeat(one, chunk_length, axis=1) for one in (noise_BxC, follows_BxC)
    )
    return jnp.where(last, own_BxN, before_BxN)
