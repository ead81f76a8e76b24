"""RETRO: Algorithm 1 of Borgeaud et al. 2021 (arXiv 2112.04426) as a Flax NNX module.

    H = EMB(X)
    for p in 1..L:
        H = ATTN(H)                               causal, inside documents
        if p == min(P): E = ENCODER(RET, H)       conditioned on H after this ATTN
        if p in P:      H = CCA(H, E)
        H = FFW(H)
    O = READ(H)

Every operator adds to the residual stream H and normalises its own input. Parameters of equal
layers are stacked: `layers` has a leading axis of L, `cca` of len(P). The loop below is the
definition; depth.py runs the same layers by scan, which compiles faster.
"""

import dataclasses
import functools

import jax
from flax import nnx

from retro_jax.batch import RetroBatch
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import layer_stack, loss
from retro_jax.model.attention import Attention, Widths
from retro_jax.model.causal_attention import causal_attention
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.model.encoder import Encoder
from retro_jax.model.layer_stack import stack_layers, take_layer
from retro_jax.model.layers import Embedding, FeedForward, Layout, RMSNorm, dropout, normal
from retro_jax.sharding import Shardings


class DecoderLayer(nnx.Module):
    """The ATTN and FFW of one decoder layer."""

    def __init__(self, config: RetroConfig, *, layout: Layout, rngs: nnx.Rngs):
        widths = Widths(config.d_model, config.d_model, config.num_heads, config.head_dim)
        self.attention = Attention(config, widths, cross=False, layout=layout, rngs=rngs)
        self.feed_forward = FeedForward(
            config, config.d_model, config.d_ff, layout=layout, rngs=rngs
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer may read besides the residual stream.

    Attributes:
      documents: [B, C] or None. encoded: [B, C, K, R, E], the encoder's output, or None before it
        has run and with retrieval off. present: [B, C, K, R] bool, where neighbours are no padding.
      dropout_key: a key while training with dropout, else None.
    """

    documents: jax.Array | None = None
    encoded: jax.Array | None = None
    present: jax.Array | None = None
    dropout_key: jax.Array | None = None


class Retro(nnx.Module):
    """The retrieval-enhanced transformer; without `cca_layers` the baseline transformer.

    Args:
      config: the architecture.
      execution: how it is computed.
      shardings: where arrays lie on a mesh; the default needs no mesh.
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
        if config.has_retrieval:
            self.encoder = Encoder(config, layout=layout, rngs=rngs)
            self.cca = stack_layers(
                lambda r: ChunkedCrossAttention(config, layout=layout, rngs=r),
                len(config.cca_layers),
                rngs,
            )
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        if not config.tie_embeddings:
            self.read_out = normal(rngs, (config.vocab_size, config.d_model), fan_in=config.d_model)

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
          documents: [B, C] int32, or None for one document a row.

        Returns:
          [B, N, V] float32.

        Raises:
          UserError: a shape that does not fit the configuration.
        """
        return self.read(self.hidden_states(tokens, neighbours, documents))

    def read(self, h: jax.Array) -> jax.Array:
        """Logits [B, N, V] float32 of final activations [B, N, D], or of some positions of them."""
        return loss.read_out(h, self._read_out_table(), self.layout)

    def token_losses(self, batch: RetroBatch, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, N] float32 negative log-likelihoods in nats, 0 where the target is pad_id."""
        h = self.hidden_states(batch.tokens, batch.neighbours, batch.documents, dropout_key)
        return self.losses(h, batch.targets)

    def losses(self, h: jax.Array, targets: jax.Array) -> jax.Array:
        """`token_losses` of final activations [B, N, D] and targets [B, N]."""
        return loss.token_losses(
            h,
            self._read_out_table(),
            targets,
            pad_id=self.config.pad_id,
            layout=self.layout,
        )

    def hidden_states(
        self,
        tokens: jax.Array,
        neighbours: jax.Array | None = None,
        documents: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The normalised activations that the read-out reads, [B, N, D]."""
        check_inputs(self.config, tokens, neighbours, documents)
        if not self.config.has_retrieval:
            neighbours = None
        context = Context(documents=documents, dropout_key=dropout_key)
        h = dropout(self.embedding(tokens), self.config.dropout, self._key(context, 0))
        if self.layout.execution.scan_layers:
            h = layer_stack.scan_layers(self, h, tokens, neighbours, context)
        else:
            h = self._loop_layers(h, tokens, neighbours, context)
        return self.norm(h)

    def _loop_layers(
        self,
        h: jax.Array,
        tokens: jax.Array,
        neighbours: jax.Array | None,
        context: Context,
    ) -> jax.Array:
        """Algorithm 1, layer by layer."""
        cca_layers = self.config.cca_layers
        for p in range(1, self.config.num_layers + 1):
            layer = take_layer(self.layers, p - 1)
            cca = None
            if neighbours is not None and p in cca_layers:
                cca = take_layer(self.cca, cca_layers.index(p))
            if neighbours is not None and p == cca_layers[0]:
                h, context = layer_stack.first_retrieval(
                    self, layer, cca, h, tokens, neighbours, context
                )
            else:
                run_layer = functools.partial(self.run_layer, layer, cca)
                h = layer_stack.rematerialised(run_layer, self.layout)(h, p, context)
        return h

    def run_layer(
        self,
        layer: DecoderLayer,
        cca: ChunkedCrossAttention | None,
        h: jax.Array,
        p: jax.Array | int,
        context: Context,
    ) -> jax.Array:
        """ATTN, CCA where the layer has one, FFW."""
        h = self.attend(layer, h, p, context)
        if cca is not None:
            h = self.retrieve(cca, h, p, context)
        return self.feed_forward(layer, h, p, context)

    def attend(
        self, layer: DecoderLayer, h: jax.Array, p: jax.Array | int, context: Context
    ) -> jax.Array:
        """H + ATTN(H) of layer p."""
        branch = causal_attention(
            layer.attention, h, context.documents, chunk_length=self.config.chunk_length
        )
        return h + dropout(branch, self.config.dropout, self._key(context, 4 * p))

    def encode(
        self, neighbours: jax.Array, h: jax.Array, tokens: jax.Array, context: Context
    ) -> Context:
        """The context with E = ENCODER(RET, H) in it."""
        encoded = self.encoder(
            neighbours, h, tokens, self.embedding, dropout_key=self._key(context, 1)
        )
        return dataclasses.replace(
            context, encoded=encoded, present=neighbours != self.config.pad_id
        )

    def retrieve(
        self,
        cca: ChunkedCrossAttention,
        h: jax.Array,
        p: jax.Array | int,
        context: Context,
    ) -> jax.Array:
        """H + CCA(H, E) of layer p."""
        assert context.encoded is not None and context.present is not None
        branch = cca(h, context.encoded, context.present, context.documents)
        return h + dropout(branch, self.config.dropout, self._key(context, 4 * p + 1))

    def feed_forward(
        self, layer: DecoderLayer, h: jax.Array, p: jax.Array | int, context: Context
    ) -> jax.Array:
        """H + FFW(H) of layer p."""
        branch = layer.feed_forward(h)
        return h + dropout(branch, self.config.dropout, self._key(context, 4 * p + 2))

    @staticmethod
    def _key(context: Context, branch: jax.Array | int) -> jax.Array | None:
        """The dropout key of one residual branch, the same for any way of running the layers."""
        key = context.dropout_key
        return None if key is None else jax.random.fold_in(key, branch)

    def _read_out_table(self) -> jax.Array:
        """[V, D] float32."""
        tied = self.config.tie_embeddings
        return (self.embedding.table if tied else self.read_out)[...]


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
