"""RETRO: Algorithm 1 of Borgeaud et al. 2021 (arXiv 2112.04426) as a Flax NNX module.

    H = EMB(X)
    for p in 1..L:
        H = ATTN(H)                               causal, inside documents
        if p == min(P): E = ENCODER(RET, H)       conditioned on H after this ATTN
        if p in P:      H = CCA(H, E)
        H = FFW(H)
    O = READ(H)

Every operator adds to the residual stream H and normalises its own input. Parameters of equal
layers are stacked: `layers` has a leading axis of L, `cca` of len(P).

The loop is written once, in two parts that meet at the first CCA, since E is computed there:

    before_retrieval        layers 1 .. min(P) - 1, and ATTN of layer min(P)
    encode                  E = ENCODER(RET, H)
    after_retrieval         CCA and FFW of layer min(P), layers min(P) + 1 .. L

With DecoderForm.gated_cca E is the decoder's own states of a neighbour alone, before H reads any:
before_retrieval ends before ATTN of layer min(P), and CCA is beside ATTN.

Training runs them once. The k sweep of evaluation runs the last part for each number of neighbours.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from retro_jax.batch import RetroBatch
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import layer_stack, loss
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.model.decoder import (
    Collecting,
    DecoderLayer,
    EmbeddingOperators,
    GatedOperators,
    Operators,
    Retrieved,
    WholeSequences,
)
from retro_jax.model.encoder import Encoder
from retro_jax.model.layer_stack import Extras, stack_layers, take_extra, take_layer
from retro_jax.model.layers import Embedding, Layout, LearnedPositions, make_norm, normal
from retro_jax.model.shared_tokens import shared_tokens
from retro_jax.packed import Packed
from retro_jax.sharding import FSDP, TENSOR, Shardings


class Retro(nnx.Module):
    """The retrieval-enhanced transformer; without `cca_layers` the baseline transformer.

    Args:
      config: the architecture.
      execution: how it is computed.
      shardings: the layout of arrays on a mesh; the default needs no mesh.
      rngs: the parameters' random stream.
    """

    def __init__(
        self,
        config: RetroConfig,
        execution: ExecutionConfig = ExecutionConfig(),
        *,
        shardings: Shardings = Shardings(),
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.layout = layout = Layout(execution, shardings)
        self.embedding = Embedding(config.vocab_size, config.d_model, layout=layout, rngs=rngs)
        self.layers = stack_layers(
            lambda r: DecoderLayer(config, layout=layout, rngs=r),
            config.num_layers,
            rngs,
        )
        if config.form.learned_positions:
            self.positions = LearnedPositions(
                config.form.learned_positions, config.d_model, layout=layout, rngs=rngs
            )
        if config.has_encoder:
            self.encoder = Encoder(config, layout=layout, rngs=rngs)
        if config.has_retrieval:
            self.cca = stack_layers(
                lambda r: ChunkedCrossAttention(config, layout=layout, rngs=r),
                len(config.cca_layers),
                rngs,
            )
        self.norm = make_norm(config.form, config.d_model, config.norm_epsilon)
        if not config.tie_embeddings:
            shape = (config.vocab_size, config.d_model)
            self.read_out = normal(rngs, shape, P(TENSOR, FSDP), fan_in=config.d_model)

    def __call__(
        self,
        tokens: jax.Array,
        neighbours: jax.Array | None = None,
        documents: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits.

        Args:
          tokens: [B, N] int32, N a multiple of the chunk length.
          neighbours: [B, C, K, R] int32, or None for RETRO[OFF].
          documents: [B, C] int32, or None for one document per row.

        Returns:
          [B, N, V] float32.

        Raises:
          UserError: a shape that does not fit the configuration.
        """
        return self.read(self.hidden_states(tokens, neighbours, documents))

    def read(self, h_BxNxD: jax.Array) -> jax.Array:
        """Logits [B, N, V] float32 of final activations, or of some positions of them."""
        return loss.read_out(h_BxNxD, self.read_out_table()[...], self.layout)

    def token_losses(self, batch: RetroBatch, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, N] float32 negative log-likelihoods in nats, 0 where the target is pad_id."""
        return self.losses(self.activations(batch, dropout_key), batch.targets)

    def activations(self, batch: RetroBatch, dropout_key: jax.Array | None = None) -> jax.Array:
        """`hidden_states` of a batch, [B, N, D]."""
        return self.hidden_states(
            batch.tokens,
            batch.neighbours,
            batch.documents,
            dropout_key,
            states=batch.states,
            below=batch.below,
        )

    def activations_off(self, batch: RetroBatch, dropout_key: jax.Array | None = None) -> jax.Array:
        """`activations` of the same batch with retrieval off, which reads `below` too where it is kept."""
        operators = WholeSequences(self.config, batch.documents, dropout_key)
        h_BxNxD = self.below_retrieval(batch.tokens, operators, batch.below)
        return self.norm(self.after_retrieval(h_BxNxD, None, operators))

    def losses(self, h_BxNxD: jax.Array, targets_BxN: jax.Array) -> jax.Array:
        """`token_losses` of final activations and targets."""
        return loss.token_losses(
            h_BxNxD,
            self.read_out_table(),
            targets_BxN,
            pad_id=self.config.pad_id,
            layout=self.layout,
        )

    def hidden_states(
        self,
        tokens: jax.Array,
        neighbours: jax.Array | None = None,
        documents: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        *,
        states: Packed | None = None,
        below: Packed | None = None,
    ) -> jax.Array:
        """The normalised activations that the read-out reads, [B, N, D].

        `states` and `below` are RetroBatch's, and are not read without neighbours.
        """
        check_inputs(self.config, tokens, neighbours, documents)
        operators = WholeSequences(self.config, documents, dropout_key)
        if neighbours is None or not self.config.has_retrieval:
            h_BxNxD = self.without_retrieval(self.embed(tokens, operators), operators)
            return self.norm(h_BxNxD)
        h_BxNxD = self.below_retrieval(tokens, operators, below)
        if states is None:
            retrieved = self.encode(neighbours, h_BxNxD, tokens, operators)
        else:
            retrieved = Retrieved(states, self.present(neighbours, tokens))
        return self.norm(self.after_retrieval(h_BxNxD, retrieved, operators))

    def below_retrieval(
        self, tokens_BxN: jax.Array, operators: WholeSequences, kept: Packed | None = None
    ) -> jax.Array:
        """`before_retrieval` of embedded tokens, [B, N, D]; or as it was kept."""
        if kept is not None:
            return kept.unpacked().astype(self.layout.dtype)
        return self.before_retrieval(self.embed(tokens_BxN, operators), operators)

    def embed(self, tokens_BxN: jax.Array, operators: EmbeddingOperators) -> jax.Array:
        """H = EMB(X), [B, N, D]."""
        h_BxNxD = self.embedding(tokens_BxN)
        if self.config.form.learned_positions:
            h_BxNxD = operators.add_positions(self.positions, h_BxNxD)
        return operators.dropped(h_BxNxD, 0)

    def without_retrieval(self, carry: Any, operators: Operators) -> Any:
        """All layers without CCA: the baseline, and RETRO[OFF]."""
        return self._run_layers(1, self.config.num_layers, carry, None, operators)

    def before_retrieval(self, carry: Any, operators: Operators) -> Any:
        """From the first layer to ATTN of layer min(P), or with gated CCA to the layer before it.

        Args:
          carry: `embed`'s. operators: of the layers.

        Returns:
          The carry whose stream ENCODER reads, and `after_retrieval` continues with.
        """
        first = self.config.cca_layers[0]
        carry = self._run_layers(1, first - 1, carry, None, operators)
        if self.config.form.gated_cca:
            return carry
        layer = take_layer(self.layers, first - 1)
        return self._rematerialised(lambda carry: operators.attend(layer, carry, first))(carry)

    def encode(
        self,
        neighbours_BxCxKxR: jax.Array,
        h_BxNxD: jax.Array,
        tokens_BxN: jax.Array,
        operators: WholeSequences,
    ) -> Retrieved:
        """E = ENCODER(RET, H), with H as `before_retrieval` returns it; gated CCA's E reads no H."""
        if self.config.form.gated_cca:
            states = self.decoder_states(neighbours_BxCxKxR)
            return Retrieved(states, self.present(neighbours_BxCxKxR, tokens_BxN))

        def run(h_BxNxD: jax.Array) -> jax.Array:
            return self.encoder(
                neighbours_BxCxKxR,
                h_BxNxD,
                tokens_BxN,
                self.embedding,
                dropout_key=operators.key(1),
            )

        encoded_BxCxKxRxE = self._rematerialised(run)(h_BxNxD)
        return Retrieved(encoded_BxCxKxRxE, self.present(neighbours_BxCxKxR, tokens_BxN))

    def present(self, neighbours_BxCxKxR: jax.Array, tokens_BxN: jax.Array) -> jax.Array:
        """Which encoded positions of neighbours CCA reads: bool [B, C, K, R], or [B, C, K, 1 + R].

        tokens_BxN: the chunks that they were retrieved for.
        """
        config = self.config
        present_BxCxKxR = neighbours_BxCxKxR != config.pad_id
        if config.min_shared_tokens:
            chunks_BxCxM = tokens_BxN.reshape(*neighbours_BxCxKxR.shape[:2], config.chunk_length)
            retrieved_BxCxKxM = neighbours_BxCxKxR[..., : config.chunk_length]
            shared_BxCxK = shared_tokens(chunks_BxCxM, retrieved_BxCxKxM, config.pad_id)
            present_BxCxKxR &= (shared_BxCxK >= config.min_shared_tokens)[..., None]
        if not self.config.form.gated_cca:
            return present_BxCxKxR
        # The sink of a neighbour that is all padding is not read, and none where the text has its own.
        sink_BxCxKx1 = present_BxCxKxR[..., :1] & (not self.config.form.shared_softmax)
        return jnp.concatenate([sink_BxCxKx1, present_BxCxKxR], axis=-1)

    def decoder_states(self, neighbours_BxCxKxR: jax.Array) -> jax.Array:
        """The decoder's states of each neighbour alone, without gradients: Retrieved.encoded.

        The tokens of a neighbour do not read the padding after them.
        """
        config, shardings = self.config, self.layout.shardings
        leading, length = neighbours_BxCxKxR.shape[:3], neighbours_BxCxKxR.shape[3] + 1
        sunk = jnp.pad(
            neighbours_BxCxKxR, ((0, 0),) * 3 + ((1, 0),), constant_values=config.form.sink_id
        )
        tokens_IxR = jnp.reshape(sunk, (-1, length), out_sharding=shardings.rows(2))
        frozen = self.frozen()
        one = config.form.neighbour_layer
        layers = (one,) if one else config.cca_layers
        states_IxPxRxD = frozen.inputs_of(layers, tokens_IxR)
        width = states_IxPxRxD.shape[-1]
        inner = (length, width) if one else (len(layers), length, width)
        shape = (*leading, *inner)
        return jnp.reshape(states_IxPxRxD, shape, out_sharding=shardings.rows(len(shape)))

    def frozen(self) -> "Retro":
        """The same model, through which no gradients pass."""
        graph, params = nnx.split(self)
        return nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, params))

    def inputs_of(self, layers: Sequence[int], tokens_BxN: jax.Array) -> jax.Array:
        """The streams that some layers read, without retrieval: [B, len(layers), N, D].

        Args:
          layers: numbers from 1, increasing. tokens_BxN: texts of one document each.
        """
        whole = WholeSequences(dataclasses.replace(self.config, cca_layers=tuple(layers)))
        h_BxNxD = self.embed(tokens_BxN, whole)
        batch, length, width = h_BxNxD.shape
        spec = self.layout.shardings.rows(4)
        # One place more than asked for: where the other layers write.
        shape = (batch, len(layers) + 1, length, width)
        states = jnp.zeros(shape, h_BxNxD.dtype, out_sharding=spec)
        carry = self._run_layers(1, layers[-1] - 1, (h_BxNxD, states), None, Collecting(whole))
        h_BxNxD, states = carry
        return states[:, :-1].at[:, -1].set(h_BxNxD)

    def after_retrieval(self, carry: Any, retrieved: Retrieved | None, operators: Operators) -> Any:
        """From CCA of layer min(P) to the last layer; the final norm comes after it.

        Args:
          carry: `before_retrieval`'s. retrieved: what CCA reads; None with retrieval off.
          operators: of the layers.
        """
        first = self.config.cca_layers[0]
        if self.config.form.gated_cca:
            return self._run_layers(first, self.config.num_layers, carry, retrieved, operators)
        layer, cca = take_layer(self.layers, first - 1), take_extra(self._ccas(), first)

        def run(carry: Any, retrieved: Retrieved | None, operators: Operators) -> Any:
            if retrieved is not None:
                carry = operators.cross_attend(cca, carry, first, retrieved)
            return operators.feed_forward(layer, carry, first)

        carry = self._rematerialised(run)(carry, retrieved, operators)
        return self._run_layers(first + 1, self.config.num_layers, carry, retrieved, operators)

    def _run_layers(
        self, first: int, last: int, carry: Any, retrieved: Retrieved | None, operators: Operators
    ) -> Any:
        """Algorithm 1's loop: ATTN, CCA where the layer has one and something is retrieved, FFW."""

        def run(
            layer: DecoderLayer, cca: ChunkedCrossAttention | None, carry: Any, p: Any, shared: Any
        ) -> Any:
            retrieved, operators = shared
            if cca is not None and self.config.form.gated_cca:
                gated = cast(GatedOperators, operators)
                carry = gated.attend_beside(layer, cca, carry, p, retrieved)
                return operators.feed_forward(layer, carry, p)
            carry = operators.attend(layer, carry, p)
            if cca is not None:
                carry = operators.cross_attend(cca, carry, p, retrieved)
            return operators.feed_forward(layer, carry, p)

        return layer_stack.run_layers(
            run,
            carry,
            (self.layers, None if retrieved is None else self._ccas()),
            first=first,
            last=last,
            shared=(retrieved, operators),
            execution=self.layout.execution,
        )

    def _ccas(self) -> Extras:
        """The CCA modules and their layers P."""
        return Extras(self.cca, self.config.cca_layers)

    def _rematerialised(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A part of the model as its execution rematerialises it."""
        return layer_stack.rematerialised(run, self.layout.execution)

    def read_out_table(self) -> nnx.Param:
        """[V, D] float32."""
        return self.embedding.table if self.config.tie_embeddings else self.read_out


def check_inputs(
    config: RetroConfig,
    tokens: jax.Array,
    neighbours: jax.Array | None,
    documents: jax.Array | None,
) -> None:
    """Refuses shapes that the configuration does not allow.

    Raises:
      UserError: naming the array, its shape and the shape expected.
    """
    m, r = config.chunk_length, config.neighbour_length
    if tokens.ndim != 2 or tokens.shape[1] % m or not tokens.shape[1]:
        raise UserError(
            f"tokens have shape {tokens.shape}: expected [B, N] with N a multiple of chunk_length {m}"
        )
    room = config.form.learned_positions
    if room and tokens.shape[1] > room:
        raise UserError(
            f"tokens have shape {tokens.shape}: expected at most {room}, the learned positions"
        )
    chunks = (tokens.shape[0], tokens.shape[1] // m)
    if documents is not None and documents.shape != chunks:
        raise UserError(f"documents have shape {documents.shape}: expected [B, C] = {chunks}")
    if neighbours is None:
        return
    shape = neighbours.shape
    if len(shape) != 4 or shape[:2] != chunks or shape[2] < 1 or shape[3] != r:
        raise UserError(
            f"neighbours have shape {shape}: expected [B, C, K, R] = ({chunks[0]}, {chunks[1]}, K >= 1, {r})"
        )
