"""Losses for several numbers of neighbours in one pass.

Parts that are equal for every k are computed once: the layers up to the first CCA, and the encoder, in
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
from retro_jax.model.decoder import Retrieved, WholeSequences

_AT_ONCE = 8  # neighbours of a chunk that the encoder reads together


def sweep_losses(ks: Sequence[int]) -> Callable[[Retro, RetroBatch], jax.Array]:
    """For score.compiled_token_losses: losses [len(ks), B, N] with the first k neighbours each.

    Args:
      ks: positive, ascending; a batch has at least the last one's neighbours.
    """
    groups = _groups(ks)

    def losses(model: Retro, batch: RetroBatch) -> jax.Array:
        operators = WholeSequences(model.config, batch.documents)
        h = model.below_retrieval(batch.tokens, operators, batch.below)
        retrieved = _encode(model, batch, h, operators)
        parts = [_losses(model, batch, h, retrieved, operators, group) for group in groups]
        return jnp.concatenate(parts)

    return losses


def _groups(ks: Sequence[int]) -> list[list[int]]:
    """Those between two powers of two together: 3, 4 and 5, 6, 7, 8 and 9 to 16."""
    groups: dict[int, list[int]] = {}
    for k in ks:
        groups.setdefault((k - 1).bit_length(), []).append(k)
    return list(groups.values())


def _encode(model: Retro, batch: RetroBatch, h: jax.Array, operators: WholeSequences) -> Retrieved:
    """All neighbours as the encoder reads them, a block after the other."""
    if batch.neighbours is None:
        raise ValueError("a sweep over k needs a batch with neighbours")
    neighbours = batch.neighbours
    batch_size, chunks, k, length = neighbours.shape
    if batch.states is not None:
        return Retrieved(batch.states, model.present(neighbours, batch.tokens))
    if k <= _AT_ONCE:
        return model.encode(neighbours, h, batch.tokens, operators)
    pad_id = model.config.pad_id
    filled = ((0, 0), (0, 0), (0, -k % _AT_ONCE), (0, 0))
    blocks = jnp.pad(neighbours, filled, constant_values=pad_id)
    blocks = jnp.moveaxis(blocks.reshape(batch_size, chunks, -1, _AT_ONCE, length), 2, 0)

    def encode(block: jax.Array) -> jax.Array:
        return model.encode(block, h, batch.tokens, operators).encoded

    encoded = jnp.moveaxis(jax.lax.map(encode, blocks), 0, 2)
    encoded = encoded.reshape(batch_size, chunks, -1, *encoded.shape[4:])[:, :, :k]
    return Retrieved(encoded, model.present(neighbours, batch.tokens))


def _losses(
    model: Retro,
    batch: RetroBatch,
    h: jax.Array,
    retrieved: Retrieved,
    operators: WholeSequences,
    ks: Sequence[int],
) -> jax.Array:
    """[len(ks), B, N]: the losses of a group."""
    nearest = jax.tree.map(lambda x: x[:, :, : ks[-1]], retrieved)

    def losses(retrieved: Retrieved) -> jax.Array:
        return model.losses(
            model.norm(model.after_retrieval(h, retrieved, operators)), batch.targets
        )

    if len(ks) == 1:
        return losses(nearest)[None]

    def one(k: jax.Array) -> jax.Array:
        inside = (jnp.arange(ks[-1]) < k)[None, None, :, None]
        return losses(dataclasses.replace(nearest, present=nearest.present & inside))

    return jax.lax.map(one, jnp.array(ks))
