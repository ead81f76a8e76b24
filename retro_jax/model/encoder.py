"""ENCODER: reads every neighbour in both directions, conditioned on the chunk that retrieved it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.attention import Attention, Widths
from retro_jax.model.layer_stack import stack_layers, take_layer
from retro_jax.model.layers import Embedding, FeedForward, Layout, RMSNorm, dropout
from retro_jax.model.positions import distances, rotate


class EncoderLayer(nnx.Module):
    """The ATTN and FFW of one encoder layer."""

    def __init__(self, config: RetroConfig, *, layout: Layout, rngs: nnx.Rngs):
        width = config.encoder_d_model
        widths = Widths(width, width, config.encoder_num_heads, config.encoder_head_dim)
        self.attention = Attention(config, widths, cross=False, layout=layout, rngs=rngs)
        self.feed_forward = FeedForward(
            config, width, config.encoder_d_ff, layout=layout, rngs=rngs
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
            widths = Widths(
                width, config.d_model, config.encoder_num_heads, config.encoder_head_dim
            )
            self.cross_attention = stack_layers(
                lambda r: Attention(config, widths, cross=True, layout=layout, rngs=r),
                len(config.encoder_cca_layers),
                rngs,
            )
        self.norm = RMSNorm(width, config.norm_epsilon)

    def __call__(
        self,
        neighbours: jax.Array,
        h: jax.Array,
        tokens: jax.Array,
        embedding: Embedding,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Encodes neighbours.

        Args:
          neighbours: [B, C, K, R] token ids.
          h: [B, N, D], the decoder's activations after the ATTN of layer min(P).
          tokens: [B, N], the decoder's input: where it is padding, h is not read.
          embedding: the decoder's, read where embeddings are shared.
          dropout_key: a key while training with dropout, else None.

        Returns:
          [B, C, K, R, E].
        """
        config = self.config
        batch, chunks = neighbours.shape[:2]
        h_BxCx1xMxD = h.reshape(batch, chunks, config.chunk_length, -1)[:, :, None]
        readable = (tokens != config.pad_id).reshape(batch, chunks, config.chunk_length)
        readable = readable[:, :, None, None, None, :]
        present = (neighbours != config.pad_id)[:, :, :, None, None, :]
        keys = _branch_keys(dropout_key, 3 * config.encoder_num_layers + 1)

        e = (embedding if config.share_embeddings else self.embedding)(neighbours)
        e = dropout(e, config.dropout, next(keys))
        crossed = 0
        for p in range(1, config.encoder_num_layers + 1):
            layer = take_layer(self.layers, p - 1)
            e = e + dropout(
                _self_attention(layer.attention, e, present), config.dropout, next(keys)
            )
            if p in config.encoder_cca_layers:
                cross = take_layer(self.cross_attention, crossed)
                crossed += 1
                branch = _cross_attention(cross, e, h_BxCx1xMxD, readable)
                e = e + dropout(branch, config.dropout, next(keys))
            e = e + dropout(layer.feed_forward(e), config.dropout, next(keys))
        return self.norm(e)


def _branch_keys(key: jax.Array | None, count: int):
    """One dropout key for every residual branch, or None each time."""
    return iter([None] * count if key is None else list(jax.random.split(key, count)))


def _self_attention(attention: Attention, e: jax.Array, present: jax.Array) -> jax.Array:
    """Bidirectional attention within one neighbour, [B, C, K, R, E]; d = i - i'."""
    length = e.shape[-2]
    query, key, value = attention.project(e, None)
    table = None
    if attention.positions == "rotary":
        positions = np.arange(length)
        query, key = rotate(query, positions), rotate(key, positions)
    else:
        table = attention.position_keys(distances(length, length))
    return attention.read_out(attention.attend(query, key, value, present, table))


def _cross_attention(
    attention: Attention, e: jax.Array, h: jax.Array, readable: jax.Array
) -> jax.Array:
    """Neighbour tokens attend to the M activations of their own chunk; d(i', i) = i' - i."""
    length, chunk_length = e.shape[-2], h.shape[-2]
    query, key, value = attention.project(e, h)
    table = None
    if attention.positions == "rotary":
        query = rotate(query, np.arange(length))
        key = rotate(key, np.arange(chunk_length))
    else:
        table = attention.position_keys(distances(length, chunk_length))
    key = jnp.broadcast_to(key, (*query.shape[:-3], *key.shape[-3:]))
    value = jnp.broadcast_to(value, key.shape)
    return attention.read_out(attention.attend(query, key, value, readable, table))
