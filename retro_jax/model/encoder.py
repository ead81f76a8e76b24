"""ENCODER: reads every neighbour in both directions, conditioned on the chunk that retrieved it."""

from collections.abc import Iterator

import jax
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.attention import Attention, Widths
from retro_jax.model.few_keys import FewKeys, attend_few
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
        h_BxCxMxD = h_BxNxD.reshape(batch, chunks, config.chunk_length, -1)
        readable_BxCxM = (tokens_BxN != config.pad_id).reshape(batch, chunks, config.chunk_length)
        present_BxCxKxR = neighbours_BxCxKxR != config.pad_id
        keys = _branch_keys(dropout_key, 3 * config.encoder_num_layers + 1)

        def dropped(branch_BxCxKxRxE: jax.Array) -> jax.Array:
            return dropout(branch_BxCxKxRxE, config.dropout, next(keys))

        embed = embedding if config.share_embeddings else self.embedding
        e_BxCxKxRxE = dropped(embed(neighbours_BxCxKxR))
        for p in range(1, config.encoder_num_layers + 1):
            layer = take_layer(self.layers, p - 1)
            branch = _self_attention(layer.attention, e_BxCxKxRxE, present_BxCxKxR)
            e_BxCxKxRxE = e_BxCxKxRxE + dropped(branch)
            if p in config.encoder_cca_layers:
                cross = take_layer(self.cross_attention, config.encoder_cca_layers.index(p))
                branch = _cross_attention(cross, e_BxCxKxRxE, h_BxCxMxD, readable_BxCxM)
                e_BxCxKxRxE = e_BxCxKxRxE + dropped(branch)
            e_BxCxKxRxE = e_BxCxKxRxE + dropped(layer.feed_forward(e_BxCxKxRxE))
        return self.norm(e_BxCxKxRxE)


def _branch_keys(key: jax.Array | None, count: int) -> Iterator[jax.Array | None]:
    """One dropout key for every residual branch, or None each time."""
    return iter([None] * count if key is None else list(jax.random.split(key, count)))


def _self_attention(
    attention: Attention, e_BxCxKxRxE: jax.Array, present_BxCxKxR: jax.Array
) -> jax.Array:
    """Bidirectional attention within one neighbour, [B, C, K, R, E]; d = i - i'."""
    return attend_few(attention, e_BxCxKxRxE, None, FewKeys(present_BxCxKxR))


def _cross_attention(
    attention: Attention, e_BxCxKxRxE: jax.Array, h_BxCxMxD: jax.Array, readable_BxCxM: jax.Array
) -> jax.Array:
    """Neighbour tokens attend to the M activations of their own chunk; d(i', i) = i' - i."""
    *leading, neighbours, length, width = e_BxCxKxRxE.shape
    e_BxCxSxE = e_BxCxKxRxE.reshape(*leading, neighbours * length, width)
    few = FewKeys(readable_BxCxM, texts=neighbours)
    return attend_few(attention, e_BxCxSxE, h_BxCxMxD, few).reshape(e_BxCxKxRxE.shape)
