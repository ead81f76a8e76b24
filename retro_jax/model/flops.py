"""How many floating-point operations a RETRO needs, counted from its configuration.

A product of [m, k] and [k, n] counts 2 m k n. The count has, for one token of the decoder:

    projections      2 x the weights of every matrix it passes: Q, K, V, O, feed-forward, read-out
    self attention   2 (N + 1) inner for logits and values together: a token reads half the sequence
    relative         half as much again: q.R(d) of every distance that the logits need
    CCA              Q and O as above; K and V of the K x R / M neighbour tokens a decoder token has;
                     4 K R inner for logits and values, 2 R inner for q.R(d), the same for all
                     neighbours. The first M - 1 tokens of a sequence have no CCA
    encoder          the same per neighbour token, with R keys in both directions; its
                     cross-attention has M keys, whose K and V are computed once for all neighbours

Gated CCA (DecoderForm.gated_cca) has the decoder's own layers, up to the last that it reads, as encoder
of 1 + R tokens per neighbour, and keys and values as wide as the decoder's.

inner is heads x head width. Left out: embedding look-ups, norms, softmax, activations, and R(d)
itself, a product per layer that does not grow with the batch. Nothing is taken off for documents, nor
for padding: only the shape of a batch counts. The backward pass counts twice the forward pass
in all cases: rematerialisation is work of the program, not of the algorithm.
"""

import dataclasses

from retro_jax.config import RetroConfig
from retro_jax.model.positions import decoder_positions, positions_of

TRAINING = 3  # forward, and twice that backward


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of the forward pass for one token of the decoder, by part; `total` sums them."""

    decoder: float
    cca: float
    encoder: float
    read_out: float

    @property
    def total(self) -> float:
        """Forward operations per token."""
        return self.decoder + self.cca + self.encoder + self.read_out

    @property
    def training(self) -> float:
        """Forward and backward operations per token."""
        return TRAINING * self.total


def forward_flops(
    config: RetroConfig, sequence_length: int, neighbours: int, *, kept: bool = False
) -> Flops:
    """Counts the forward pass.

    Args:
      config: the architecture.
      sequence_length: N, tokens per sequence.
      neighbours: K, neighbours per chunk; 0 for retrieval off.
      kept: whether gated CCA reads kept states (retrofit.kept_states) instead of encoding neighbours.

    Returns:
      Operations for one token of the decoder, on average over the sequence.
    """
    decoder = config.num_layers * _decoder_layer(config, sequence_length)
    flops = Flops(decoder, 0.0, 0.0, 2.0 * config.d_model * config.vocab_size)
    if not (config.has_retrieval and neighbours):
        return flops
    if not config.has_encoder:
        return dataclasses.replace(
            flops,
            cca=_gated_cca(config, sequence_length, neighbours),
            encoder=0.0 if kept else _decoder_as_encoder(config, neighbours),
        )
    return dataclasses.replace(
        flops,
        cca=_cca(config, sequence_length, neighbours),
        encoder=_encoder(config, neighbours),
    )


def in_context_flops(config: RetroConfig, row: int) -> Flops:
    """Counts the forward pass of neighbours before the text (evaluate.in_context).

    Args:
      config: the architecture. row: tokens of a row, of which one chunk is read out.

    Returns:
      Operations for one token of that chunk.
    """
    layers = config.num_layers * _decoder_layer(config, row) * row / config.chunk_length
    return Flops(layers, 0.0, 0.0, 2.0 * config.d_model * config.vocab_size)


def training_flops(config: RetroConfig, sequence_length: int, neighbours: int) -> float:
    """Forward and backward operations of one sequence.

    Args:
      config: the architecture. sequence_length: N. neighbours: K, 0 for retrieval off.
    """
    return sequence_length * forward_flops(config, sequence_length, neighbours).training


def _decoder_layer(config: RetroConfig, length: int) -> float:
    """A decoder layer, for one token of a sequence of a length."""
    d, form = config.d_model, config.form
    inner, narrow = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    matrices = 3 if form.feed_forward == "gated" else 2
    pair = 4 + decoder_positions(config).flops_per_distance  # q.k, weight.v, q.R(d)
    weights = 2 * d * (inner + narrow) + matrices * d * config.d_ff
    return 2 * weights + pair * inner * (length + 1) / 2


def _gated_cca(config: RetroConfig, sequence_length: int, neighbours: int) -> float:
    """All gated CCA layers, for one decoder token."""
    inner, narrow = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    keys = neighbours * (1 + config.neighbour_length)
    d, rank = config.d_model, config.form.cca_rank
    keys_values = 2 * (2 * d * narrow + rank * (d + 2 * narrow)) * keys / config.chunk_length
    query = 2 * 2 * (d * inner + rank * (d + inner)) + 4 * keys * inner
    reads = (sequence_length - config.chunk_length + 1) / sequence_length
    return len(config.cca_layers) * (keys_values + reads * query)


def _decoder_as_encoder(config: RetroConfig, neighbours: int) -> float:
    """The decoder's layers that read neighbours, for one decoder token."""
    length = 1 + config.neighbour_length
    layers = (config.form.neighbour_layer or config.cca_layers[-1]) - 1
    return layers * _decoder_layer(config, length) * neighbours * length / config.chunk_length


def _cca(config: RetroConfig, sequence_length: int, neighbours: int) -> float:
    """All CCA layers, for one decoder token."""
    inner = config.num_heads * config.head_dim
    keys = neighbours * config.neighbour_length
    keys_values = 2 * 2 * config.encoder_d_model * inner * keys / config.chunk_length
    query = 2 * 2 * config.d_model * inner + 4 * keys * inner
    if config.cca_positions:
        per_distance = positions_of(config.positions).flops_per_distance
        query += per_distance * config.neighbour_length * inner
    reads = (sequence_length - config.chunk_length + 1) / sequence_length
    return len(config.cca_layers) * (keys_values + reads * query)


def _encoder(config: RetroConfig, neighbours: int) -> float:
    """The encoder, for one decoder token, which has K R / M neighbour tokens."""
    e, inner = config.encoder_d_model, config.encoder_num_heads * config.encoder_head_dim
    pair = 4 + positions_of(config.positions).flops_per_distance
    layer = (
        2 * (4 * e * inner + 2 * e * config.encoder_d_ff) + pair * inner * config.neighbour_length
    )
    crossed = 2 * 2 * e * inner + pair * inner * config.chunk_length
    layers, crosses = config.encoder_num_layers, len(config.encoder_cca_layers)
    tokens = neighbours * config.neighbour_length / config.chunk_length
    chunk_keys = crosses * 2 * 2 * config.d_model * inner
    return tokens * (layers * layer + crosses * crossed) + chunk_keys
