"""The decoder's layers, and Algorithm 1's operators on a batch of whole sequences."""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.attention import shared_softmax, softmax_shares
from retro_jax.model.causal_attention import causal_attention, causal_heads
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention, decoder_attention
from retro_jax.model.layers import FeedForward, Layout, LearnedPositions, dropout
from retro_jax.packed import Packed


class DecoderLayer(nnx.Module):
    """The ATTN and FFW of one decoder layer."""

    def __init__(self, config: RetroConfig, *, layout: Layout, rngs: nnx.Rngs):
        self.attention = decoder_attention(config, cross=False, layout=layout, rngs=rngs)
        self.feed_forward = FeedForward(
            config, config.d_model, config.d_ff, layout=layout, rngs=rngs, form=config.form
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The neighbours as CCA reads them.

    Attributes:
      encoded: [B, C, K, R, E], the encoder's output E. With DecoderForm.gated_cca the decoder's states
        of the neighbours, [B, C, K, 1 + R, D], or [B, C, K, len(P), 1 + R, D] for each CCA layer;
        packed where they were kept.
      present: [B, C, K, R or 1 + R] bool, False at padding.
    """

    encoded: Any  # jax.Array or Packed
    present: jax.Array

    def of_layer(self, index: jax.Array | int | None) -> jax.Array:
        """The states that a CCA layer reads: of all, or number `index` where each has its own."""
        states = self.encoded
        if index is not None:
            states = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=3, keepdims=False), states
            )
        return states.unpacked() if isinstance(states, Packed) else states


class Operators(Protocol):
    """How the operators of a layer act on the carry between layers, and what each adds to it.

    With DecoderForm.parallel_residual `attend` adds FFW of the same stream too, and `feed_forward`
    nothing. `embed` adds learned positions, where there are any.

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


class EmbeddingOperators(Protocol):
    """What is done to embedded tokens before the first layer."""

    def add_positions(self, table: LearnedPositions, h_BxNxD: jax.Array) -> jax.Array:
        """Embedded tokens with learned positions."""

    def dropped(self, branch: jax.Array, number: Any) -> jax.Array:
        """A branch after dropout."""


class GatedOperators(Operators, Protocol):
    """The operators of a decoder with DecoderForm.gated_cca.

    A layer that has CCA and something to read runs `attend_beside` instead of `attend` and
    `cross_attend`.
    """

    def attend_beside(
        self,
        layer: DecoderLayer,
        cca: ChunkedCrossAttention,
        carry: Any,
        p: jax.Array | int,
        retrieved: Retrieved,
    ) -> Any:
        """ATTN and CCA of layer p, which read the same stream."""


def cca_number(config: RetroConfig, p: jax.Array | int) -> jax.Array | int:
    """How many CCA layers come before layer p, a CCA layer; the number of all of them for other layers."""
    has_cca = np.isin(np.arange(config.num_layers + 1), config.cca_layers)
    numbers = np.where(has_cca, np.cumsum(has_cca) - 1, len(config.cca_layers))
    return int(numbers[p]) if isinstance(p, int) else jnp.asarray(numbers)[p]


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
      documents: [B, C], the document of each chunk, or None for one document per row.
      dropout_key: a key while training with dropout, else None.
    """

    config: RetroConfig
    documents: jax.Array | None = None
    dropout_key: jax.Array | None = None

    def add_positions(self, table: LearnedPositions, h_BxNxD: jax.Array) -> jax.Array:
        """Embedded tokens with learned positions."""
        return h_BxNxD + table(jnp.arange(h_BxNxD.shape[1]))

    def attend(self, layer: DecoderLayer, h_BxNxD: jax.Array, p: jax.Array | int) -> jax.Array:
        """H + ATTN(H) of layer p; with a parallel residual H + ATTN(H) + FFW(H)."""
        branch_BxNxD = causal_attention(
            layer.attention, h_BxNxD, self.documents, chunk_length=self.config.chunk_length
        )
        return self._with_branch(layer, h_BxNxD, branch_BxNxD, p)

    def _with_branch(
        self, layer: DecoderLayer, h_BxNxD: jax.Array, branch_BxNxD: jax.Array, p: jax.Array | int
    ) -> jax.Array:
        """`attend` with what ATTN has read."""
        sum_BxNxD = h_BxNxD + self.dropped(branch_BxNxD, 4 * p)
        if self.config.form.parallel_residual:
            sum_BxNxD = sum_BxNxD + self.dropped(layer.feed_forward(h_BxNxD), 4 * p + 2)
        return sum_BxNxD

    def attend_beside(
        self,
        layer: DecoderLayer,
        cca: ChunkedCrossAttention,
        h_BxNxD: jax.Array,
        p: jax.Array | int,
        retrieved: Retrieved,
    ) -> jax.Array:
        """H + ATTN(H) + CCA(H, E of layer p), of one softmax or of two."""
        encoded_BxCxKxRxE = self.encoded(retrieved, p).astype(h_BxNxD.dtype)
        inputs = (h_BxNxD, encoded_BxCxKxRxE, retrieved.present, self.documents)
        if not self.config.form.shared_softmax:
            return self.attend(layer, h_BxNxD, p) + self.dropped(cca(*inputs), 4 * p + 1)
        own = self._read_text(layer, h_BxNxD)
        gate_H = cca.attention.layout.vector(cca.gate)
        own_BxNxHxW, read_BxNxHxW = shared_softmax(own, cca.heads(*inputs), gate_H)
        sum_BxNxD = self._with_branch(layer, h_BxNxD, layer.attention.read_out(own_BxNxHxW), p)
        return sum_BxNxD + self.dropped(cca.attention.read_out(read_BxNxHxW), 4 * p + 1)

    def _read_text(self, layer: DecoderLayer, h_BxNxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """ATTN(H) before its output, and the logarithm of its denominators."""
        chunk_length = self.config.chunk_length
        return causal_heads(layer.attention, h_BxNxD, self.documents, chunk_length=chunk_length)

    def neighbours_share(
        self,
        layer: DecoderLayer,
        cca: ChunkedCrossAttention,
        h_BxNxD: jax.Array,
        p: jax.Array | int,
        retrieved: Retrieved,
    ) -> jax.Array:
        """[B, N, H]: how much of the shared softmax of layer p the neighbours have, times the gates."""
        encoded_BxCxKxRxE = self.encoded(retrieved, p).astype(h_BxNxD.dtype)
        _, total = cca.heads(h_BxNxD, encoded_BxCxKxRxE, retrieved.present, self.documents)
        gate_H = cca.attention.layout.vector(cca.gate)
        return softmax_shares(self._read_text(layer, h_BxNxD)[1], total, gate_H)[1]

    def encoded(self, retrieved: Retrieved, p: jax.Array | int) -> jax.Array:
        """The encoding that CCA of layer p reads: [B, C, K, R, E], or [B, C, K, 1 + R, D]."""
        one = not self.config.form.gated_cca or self.config.form.neighbour_layer
        return retrieved.of_layer(None if one else cca_number(self.config, p))

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
        """H + FFW(H) of layer p; H where `attend` has added FFW."""
        if self.config.form.parallel_residual:
            return h_BxNxD
        return h_BxNxD + self.dropped(layer.feed_forward(h_BxNxD), 4 * p + 2)

    def dropped(self, branch: jax.Array, number: jax.Array | int) -> jax.Array:
        """A branch after dropout; each branch of the model has its own number."""
        return dropout(branch, self.config.dropout, self.key(number))

    def key(self, number: jax.Array | int) -> jax.Array | None:
        """The dropout key of one branch, the same for any way of running the layers."""
        key = self.dropout_key
        return None if key is None else jax.random.fold_in(key, number)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["whole"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Collecting:
    """The operators on whole sequences that also keep the input of each layer of P.

    The carry is (H, [B, len(P) + 1, N, D]); the last place is where the other layers write.
    """

    whole: WholeSequences

    def attend(self, layer: DecoderLayer, carry: Any, p: jax.Array | int) -> Any:
        """H + ATTN(H) of layer p, and H kept."""
        h_BxNxD, states = carry
        index = cca_number(self.whole.config, p)
        states = jax.lax.dynamic_update_index_in_dim(states, h_BxNxD, index, axis=1)
        return self.whole.attend(layer, h_BxNxD, p), states

    def attend_beside(
        self,
        layer: DecoderLayer,
        cca: ChunkedCrossAttention,
        carry: Any,
        p: jax.Array | int,
        retrieved: Retrieved,
    ) -> Any:
        """`attend` with CCA beside it."""
        h_BxNxD, states = carry
        _, states = self.attend(layer, carry, p)
        return self.whole.attend_beside(layer, cca, h_BxNxD, p, retrieved), states

    def cross_attend(
        self, cca: ChunkedCrossAttention, carry: Any, p: jax.Array | int, retrieved: Retrieved
    ) -> Any:
        """H + CCA(H, E) of layer p."""
        return self.whole.cross_attend(cca, carry[0], p, retrieved), carry[1]

    def feed_forward(self, layer: DecoderLayer, carry: Any, p: jax.Array | int) -> Any:
        """H + FFW(H) of layer p."""
        return self.whole.feed_forward(layer, carry[0], p), carry[1]
