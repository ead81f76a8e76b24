"""Losses for several numbers of neighbours in one pass.

What is the same for every k is computed once: the layers up to the first CCA, and the encoder, in
which no neighbour sees another. Only the layers from the first CCA on run for each k.

    tokens -- layers 1 .. ATTN of min(P) -- ENCODER of k = 40 neighbours --+-- k = 1:  CCA .. loss
                                                                           +-- k = 2:  CCA .. loss
                                                                           +-- k = 40: CCA .. loss
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from retro_jax.batch import RetroBatch
from retro_jax.model import Retro
from retro_jax.model.layers import take_layer
from retro_jax.model.retro import Context


def sweep_losses(ks: Sequence[int]) -> Callable[[Retro, RetroBatch], jax.Array]:
    """For score.compiled_token_losses: losses [len(ks), B, N] with the first k neighbours each."""

    def losses(model: Retro, batch: RetroBatch) -> jax.Array:
        return jnp.stack([model.losses(h, batch.targets) for h in hidden_states(model, batch, ks)])

    return losses


def hidden_states(model: Retro, batch: RetroBatch, ks: Sequence[int]) -> list[jax.Array]:
    """Retro.hidden_states of a batch with the first k of its neighbours, [B, N, D] for each k.

    Args:
      model: one with retrieval.
      batch: with at least max(ks) neighbours a chunk.
      ks: positive numbers of neighbours.
    """
    first, *_ = model.config.cca_layers
    context = Context(documents=batch.documents, dropout_key=None)
    h = model.embedding(batch.tokens)
    for p in range(1, first):
        h = model.run_layer(take_layer(model.layers, p - 1), None, h, p, context)
    h = model.attend(take_layer(model.layers, first - 1), h, first, context)
    assert batch.neighbours is not None
    context = model.encode(batch.neighbours, h, batch.tokens, context)
    return [_rest(model, h, _with_neighbours(context, k)) for k in ks]


def _with_neighbours(context: Context, k: int) -> Context:
    """The context with the first k neighbours of each chunk."""
    assert context.encoded is not None and context.present is not None
    encoded, present = context.encoded[:, :, :k], context.present[:, :, :k]
    return dataclasses.replace(context, encoded=encoded, present=present)


def _rest(model: Retro, h: jax.Array, context: Context) -> jax.Array:
    """From the first CCA to the final norm."""
    cca_layers = model.config.cca_layers
    for p in range(cca_layers[0], model.config.num_layers + 1):
        layer = take_layer(model.layers, p - 1)
        cca = take_layer(model.cca, cca_layers.index(p)) if p in cca_layers else None
        if p == cca_layers[0] and cca is not None:  # its ATTN has been run
            h = model.feed_forward(layer, model.retrieve(cca, h, p, context), p, context)
        else:
            h = model.run_layer(layer, cca, h, p, context)
    return model.norm(h)
