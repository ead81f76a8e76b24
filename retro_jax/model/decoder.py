"""The decoder's layers, and Algorithm 1's operators on a batch of whole sequences."""

import dataclasses
import functools
from typing import Any, Protocol

import jax
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.attention import Attention, Widths
from retro_jax.model.causal_attention import causal_attention
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.model.layers import FeedForward, Layout, dropout
from retro_jax.model.positions import positions_of


class DecoderLayer(nnx.Module):
    """The ATTN and FFW of one decoder layer."""

    def __init__(self, config: RetroConfig, *, layout: Layout, rngs: nnx.Rngs):
        widths = Widths(config.d_model, config.d_model, config.num_heads, config.head_dim)
        positions = positions_of(config.positions)
        self.attention = Attention(
            config, widths, positions=positions, cross=False, layout=layout, rngs=rngs
        )
        self.feed_forward = FeedForward(
            config, config.d_model, config.d_ff, layout=layout, rngs=rngs
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The neighbours as CCA reads them.

    Attributes:
      encoded: [B, C, K, R, E], the encoder's output E. present: [B, C, K, R] bool, False at padding.
    """

    encoded: jax.Array
    present: jax.Array


class Operators(Protocol):
    """How the operators of a layer act on what goes from layer to layer, and what each adds to it.

    The carry is the residual stream, or a tree with it and a cache: layer_stack.run_layers. An object
    with operators is a tree of the arrays that they read.
    """

    def attend(self, layer: DecoderLayer, carry: Any, p: jax.Array | int) -> Any:
        """ATTN of layer p."""

    def cross_attend(
        self, cca: ChunkedCrossAttention, carry: Any, p: jax.Array | int, retrieved: Retrieved
    ) -> Any:
        """CCA of layer p."""

    def feed_forward(self, layer: DecoderLayer, carry: Any, p: jax.Array | int) -> Any:
        """FFW of layer p."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["documents", "dropout_key"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class WholeSequences:
    """The operators on all positions at once; the carry is the residual stream [B, N, D].

    Attributes:
      config: the architecture.
      documents: [B, C], which document each chunk is of, or None for one document a row.
      dropout_key: a key while training with dropout, else None.
    """

    config: RetroConfig
    documents: jax.Array | None = None
    dropout_key: jax.Array | None = None

    def attend(self, layer: DecoderLayer, h_BxNxD: jax.Array, p: jax.Array | int) -> jax.Array:
        """H + ATTN(H) of layer p."""
        branch_BxNxD = causal_attention(
            layer.attention, h_BxNxD, self.documents, chunk_length=self.config.chunk_length
        )
        return h_BxNxD + self.dropped(branch_BxNxD, 4 * p)

    def cross_attend(
        self,
        cca: ChunkedCrossAttention,
        h_BxNxD: jax.Array,
        p: jax.Array | int,
        retrieved: Retrieved,
    ) -> jax.Array:
        """H + CCA(H, E) of layer p."""
        branch_BxNxD = cca(h_BxNxD, retrieved.encoded, retrieved.present, self.documents)
        return h_BxNxD + self.dropped(branch_BxNxD, 4 * p + 1)

    def feed_forward(
        self, layer: DecoderLayer, h_BxNxD: jax.Array, p: jax.Array | int
    ) -> jax.Array:
        """H + FFW(H) of layer p."""
        return h_BxNxD + self.dropped(layer.feed_forward(h_BxNxD), 4 * p + 2)

    def dropped(self, branch: jax.Array, number: jax.Array | int) -> jax.Array:
        """A branch after dropout; each branch of the model has its own number."""
        return dropout(branch, self.config.dropout, self.key(number))

    def key(self, number: jax.Array | int) -> jax.Array | None:
        """The dropout key of one branch, the same for any way of running the layers."""
        key = self.dropout_key
        return None if key is None else jax.random.fold_in(key, number)
