"""Losses for several numbers of neighbours in one pass.

What is the same for every k is computed once: the layers up to the first CCA, and the encoder, in
which no neighbour sees another. Only the layers from the first CCA on run for each k.

    tokens -- layers 1 .. ATTN of min(P) -- ENCODER, 8 neighbours at once --+-- k = 1:    CCA .. loss
                                                                            +-- k = 2:    CCA .. loss
                                                                            +-- k = 3, 4: CCA .. loss
                                                                            +-- k = 5..8: CCA .. loss

Every k up to 40 is no larger a program, and needs no more memory, than a few: those between two powers
of two share a program, run one after the other, in which the neighbours beyond k are masked.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from retro_jax.batch import RetroBatch
from retro_jax.model import Retro
from retro_jax.model.layer_stack import take_layer
from retro_jax.model.retro import Context

_AT_ONCE = 8  # neighbours of a chunk that the encoder reads together


def sweep_losses(ks: Sequence[int]) -> Callable[[Retro, RetroBatch], jax.Array]:
    """For score.compiled_token_losses: losses [len(ks), B, N] with the first k neighbours each.

    Args:
      ks: positive, ascending; a batch has at least the last one's neighbours.
    """
    groups = _groups(ks)

    def losses(model: Retro, batch: RetroBatch) -> jax.Array:
        h, context = _shared(model, batch)
        found = [_losses(model, batch, h, context, group) for group in groups]
        return jnp.concatenate(found)

    return losses


def _groups(ks: Sequence[int]) -> list[list[int]]:
    """Those between two powers of two together: 3, 4 and 5, 6, 7, 8 and 9 to 16."""
    found: dict[int, list[int]] = {}
    for k in ks:
        found.setdefault((k - 1).bit_length(), []).append(k)
    return list(found.values())


def _shared(model: Retro, batch: RetroBatch) -> tuple[jax.Array, Context]:
    """The decoder's activations before the first CCA, and all neighbours as the encoder reads them."""
    first, *_ = model.config.cca_layers
    context = Context(documents=batch.documents, dropout_key=None)
    h = model.embedding(batch.tokens)
    for p in range(1, first):
        h = model.run_layer(take_layer(model.layers, p - 1), None, h, p, context)
    h = model.attend(take_layer(model.layers, first - 1), h, first, context)
    assert batch.neighbours is not None
    neighbours = batch.neighbours
    batch_size, chunks, k, length = neighbours.shape
    if k <= _AT_ONCE:
        return h, model.encode(neighbours, h, batch.tokens, context)
    pad_id = model.config.pad_id
    filled = ((0, 0), (0, 0), (0, -k % _AT_ONCE), (0, 0))
    blocks = jnp.pad(neighbours, filled, constant_values=pad_id)
    blocks = jnp.moveaxis(blocks.reshape(batch_size, chunks, -1, _AT_ONCE, length), 2, 0)

    def encode(block: jax.Array) -> jax.Array:
        encoded = model.encode(block, h, batch.tokens, context).encoded
        assert encoded is not None
        return encoded

    encoded = jnp.moveaxis(jax.lax.map(encode, blocks), 0, 2)
    encoded = encoded.reshape(batch_size, chunks, -1, *encoded.shape[4:])[:, :, :k]
    return h, dataclasses.replace(context, encoded=encoded, present=neighbours != pad_id)


def _losses(
    model: Retro, batch: RetroBatch, h: jax.Array, context: Context, ks: Sequence[int]
) -> jax.Array:
    """[len(ks), B, N]: the losses of a group."""
    assert context.encoded is not None and context.present is not None
    encoded, present = (x[:, :, : ks[-1]] for x in (context.encoded, context.present))
    few = dataclasses.replace(context, encoded=encoded, present=present)
    if len(ks) == 1:
        return model.losses(_rest(model, h, few), batch.targets)[None]

    def one(k: jax.Array) -> jax.Array:
        inside = (jnp.arange(ks[-1]) < k)[None, None, :, None]
        masked = dataclasses.replace(few, present=present & inside)
        return model.losses(_rest(model, h, masked), batch.targets)

    return jax.lax.map(one, jnp.array(ks))


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
