"""ENCODER: reads every neighbour in both directions, conditioned on the chunk that retrieved it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.attention import Attention, Widths
from retro_jax.model.layer_stack import stack_layers, take_layer
from retro_jax.model.layers import Embedding, FeedForward, Layout, RMSNorm, dropout
from retro_jax.model.positions import positions_of


class EncoderLayer(nnx.Module):
    """The ATTN and FFW of one encoder layer."""

    def __init__(self, config: RetroConfig, *, layout: Layout, rngs: nnx.Rngs):
        width = config.encoder_d_model
        layers = config.encoder_num_layers
        heads = (config.encoder_num_heads, config.encoder_head_dim)
        widths = Widths(width, width, *heads, layers=layers)
        positions = positions_of(config.positions)
        self.attention = Attention(
            config, widths, positions=positions, cross=False, layout=layout, rngs=rngs
        )
        self.feed_forward = FeedForward(
            config, width, config.encoder_d_ff, layout=layout, rngs=rngs, layers=layers
        )


class Encoder(nnx.Module):
    """ENCODER(RET, H) of Algorithm 1: the same weights for every chunk and every neighbour."""

    def __init__(self, config: RetroConfig, *, layout: Layout, rngs: nnx.Rngs):
        self.config = config
        width = config.encoder_d_model
        if not config.share_embeddings:
            self.embedding = Embedding(config.vocab_size, width, layout=layout, rngs=rngs)
        self.layers = stack_layers(
            lambda r: EncoderLayer(config, layout=layout, rngs=r),
            config.encoder_num_layers,
            rngs,
        )
        if config.encoder_cca_layers:
            heads = (config.encoder_num_heads, config.encoder_head_dim)
            widths = Widths(width, config.d_model, *heads, layers=config.encoder_num_layers)
            if config.norm_conditioning:
                self.conditioning_norm = RMSNorm(config.d_model, config.norm_epsilon)
            self.cross_attention = stack_layers(
                lambda r: Attention(
                    config,
                    widths,
                    positions=positions_of(config.positions),
                    cross=True,
                    layout=layout,
                    rngs=r,
                ),
                len(config.encoder_cca_layers),
                rngs,
            )
        self.norm = RMSNorm(width, config.norm_epsilon)

    def __call__(
        self,
        neighbours_BxCxKxR: jax.Array,
        h_BxNxD: jax.Array,
        tokens_BxN: jax.Array,
        embedding: Embedding,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Encodes neighbours.

        Args:
          neighbours_BxCxKxR: token ids.
          h_BxNxD: the decoder's activations after the ATTN of layer min(P).
          tokens_BxN: the decoder's input: where it is padding, h is not read.
          embedding: the decoder's, read where embeddings are shared.
          dropout_key: a key while training with dropout, else None.

        Returns:
          [B, C, K, R, E].
        """
        config = self.config
        if config.encoder_cca_layers and config.norm_conditioning:
            h_BxNxD = self.conditioning_norm(h_BxNxD)
        batch, chunks = neighbours_BxCxKxR.shape[:2]
        h_BxCx1xMxD = h_BxNxD.reshape(batch, chunks, config.chunk_length, -1)[:, :, None]
        readable_BxCxM = (tokens_BxN != config.pad_id).reshape(batch, chunks, config.chunk_length)
        readable = readable_BxCxM[:, :, None, None, None, :]
        present = (neighbours_BxCxKxR != config.pad_id)[:, :, :, None, None, :]
        keys = _branch_keys(dropout_key, 3 * config.encoder_num_layers + 1)

        def dropped(branch_BxCxKxRxE: jax.Array) -> jax.Array:
            return dropout(branch_BxCxKxRxE, config.dropout, next(keys))

        embed = embedding if config.share_embeddings else self.embedding
        e_BxCxKxRxE = dropped(embed(neighbours_BxCxKxR))
        for p in range(1, config.encoder_num_layers + 1):
            layer = take_layer(self.layers, p - 1)
            branch = _self_attention(layer.attention, e_BxCxKxRxE, present)
            e_BxCxKxRxE = e_BxCxKxRxE + dropped(branch)
            if p in config.encoder_cca_layers:
                cross = take_layer(self.cross_attention, config.encoder_cca_layers.index(p))
                branch = _cross_attention(cross, e_BxCxKxRxE, h_BxCx1xMxD, readable)
                e_BxCxKxRxE = e_BxCxKxRxE + dropped(branch)
            e_BxCxKxRxE = e_BxCxKxRxE + dropped(layer.feed_forward(e_BxCxKxRxE))
        return self.norm(e_BxCxKxRxE)


def _branch_keys(key: jax.Array | None, count: int) -> Iterator[jax.Array | None]:
    """One dropout key for every residual branch, or None each time."""
    return iter([None] * count if key is None else list(jax.random.split(key, count)))


def _self_attention(attention: Attention, e_BxCxKxRxE: jax.Array, present: jax.Array) -> jax.Array:
    """Bidirectional attention within one neighbour, [B, C, K, R, E]; d = i - i'."""
    length = e_BxCxKxRxE.shape[-2]
    query, key, value = attention.project(e_BxCxKxRxE, None)
    query, key = (attention.positions.turn(x, np.arange(length)) for x in (query, key))
    table = attention.distance_table(length, length)
    return attention.read_out(attention.attend(query, key, value, present, table))


def _cross_attention(
    attention: Attention, e_BxCxKxRxE: jax.Array, h_BxCx1xMxD: jax.Array, readable: jax.Array
) -> jax.Array:
    """Neighbour tokens attend to the M activations of their own chunk; d(i', i) = i' - i."""
    length, chunk_length = e_BxCxKxRxE.shape[-2], h_BxCx1xMxD.shape[-2]
    query, key, value = attention.project(e_BxCxKxRxE, h_BxCx1xMxD)
    query = attention.positions.turn(query, np.arange(length))
    key = attention.positions.turn(key, np.arange(chunk_length))
    table = attention.distance_table(length, chunk_length)
    key = jnp.broadcast_to(key, (*query.shape[:-3], *key.shape[-3:]))
    value = jnp.broadcast_to(value, key.shape)
    return attention.read_out(attention.attend(query, key, value, readable, table))
