"""CCA: the decoder reads the encoded neighbours, shifted so that nothing leaks backwards.

A worked trace with M = 4 tokens per chunk, C = 3 chunks (paper, section 2.4 and figure 2):

    token        0  1  2  3 | 4  5  6  7 | 8  9 10 11
    chunk        ---- 0 ----  ---- 1 ----  ---- 2 ----
    reads        .  .  .  E0  E0 E0 E0 E1  E1 E1 E1 E2

Chunk 0's neighbours E0 were found with all of tokens 0..3, so the first token that may know them is
token 3, which predicts token 4. Dropping the first M - 1 tokens gives rows that line up:

    attending    3  4  5  6 | 7  8  9 10 | 11 .  .  .       "." is padding, dropped afterwards
    neighbours   --- E0 ---   --- E1 ---   --- E2 ---

Tokens 0..2 have no retrieval. Where chunk 1 belongs to another document than chunk 0, tokens 4..6
may not read E0, while token 3 (chunk 0's own last) still does.

With DecoderForm.gated_cca the same rows attend by a copy of the layer's own self attention. It treats
a neighbour of S = 1 + R tokens as a prefix: keys at positions 0 to R, queries from S on, and
DecoderForm.neighbour_distance beyond. Each head is multiplied by its gate. With
DecoderForm.shared_softmax the gate is inside of the softmax, which `heads` leaves to the decoder.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from retro_jax.config import RetroConfig
from retro_jax.model.attention import MASKED, Attention, Widths
from retro_jax.model.backend import settled
from retro_jax.model.few_keys import FewKeys, Prepared, attend_few, attend_prepared, prepare
from retro_jax.model.layers import Layout, bias
from retro_jax.model.positions import NoPositions, decoder_positions, positions_of
from retro_jax.sharding import TENSOR


def decoder_attention(
    config: RetroConfig, *, cross: bool, layout: Layout, rngs: nnx.Rngs
) -> Attention:
    """Attention in the decoder's form: a layer's own, or CCA made as it (cross), without a bias after it."""
    form = dataclasses.replace(config.form, out_bias=False) if cross else config.form
    heads = (config.num_heads, config.head_dim, config.num_kv_heads)
    return Attention(
        config,
        Widths(config.d_model, config.d_model, *heads),
        positions=decoder_positions(config),
        cross=cross,
        layout=layout,
        rngs=rngs,
        form=form,
    )


class ChunkedCrossAttention(nnx.Module):
    """CCA(H, E), without the residual; one softmax over the K * R merged neighbour positions."""

    # With DecoderForm.gated_cca.
    gate: nnx.Param

    def __init__(self, config: RetroConfig, *, layout: Layout, rngs: nnx.Rngs):
        self.gated, self.distance = config.form.gated_cca, config.form.neighbour_distance
        if self.gated:
            self.attention = decoder_attention(config, cross=True, layout=layout, rngs=rngs)
            self.gate = bias((config.num_heads,), P(TENSOR))
            return
        widths = Widths(config.d_model, config.encoder_d_model, config.num_heads, config.head_dim)
        self.attention = Attention(
            config,
            widths,
            positions=positions_of(config.positions) if config.cca_positions else NoPositions(),
            cross=True,
            layout=layout,
            rngs=rngs,
        )

    def __call__(
        self,
        h_BxNxD: jax.Array,
        encoded_BxCxKxRxE: jax.Array,
        present_BxCxKxR: jax.Array,
        documents_BxC: jax.Array | None,
    ) -> jax.Array:
        """Attends from the shifted chunks to their neighbours.

        Args:
          h_BxNxD: the residual stream.
          encoded_BxCxKxRxE: the encoder's output.
          present_BxCxKxR: bool, False where a neighbour is padding.
          documents_BxC: the document of each chunk, or None for one document per row.

        Returns:
          [B, N, D]; zero for the first M - 1 tokens.
        """
        batch, length, _ = h_BxNxD.shape
        chunk_length = length // encoded_BxCxKxRxE.shape[1]
        streams = self._streams(h_BxNxD, encoded_BxCxKxRxE)
        few = self._few(present_BxCxKxR, documents_BxC, chunk_length)
        if self.gated:
            given = prepare(self.attention, *streams, few)
            heads = attend_prepared(self.attention, given, few)
            gate_H = self.attention.layout.vector(self.gate)
            out = self.attention.read_out((heads * gate_H[:, None]).astype(heads.dtype))
        else:
            out = attend_few(self.attention, *streams, few)
        out_BxNxD = out.reshape(batch, length, -1)
        ahead = chunk_length - 1
        return jnp.pad(out_BxNxD, ((0, 0), (ahead, 0), (0, 0)))[:, :length]

    def heads(
        self,
        h_BxNxD: jax.Array,
        encoded_BxCxKxRxE: jax.Array,
        present_BxCxKxR: jax.Array,
        documents_BxC: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """What is read before gates and output, with the arguments of a call.

        Returns:
          Heads [B, N, H, W], and the logarithm of their softmax's denominators [B, N, H] float32, MASKED
          for tokens that read nothing.
        """
        batch, length, _ = h_BxNxD.shape
        chunks, neighbours = encoded_BxCxKxRxE.shape[1:3]
        ahead = length // chunks - 1
        given = self._prepared(h_BxNxD, encoded_BxCxKxRxE, present_BxCxKxR, documents_BxC)
        heads, total = self.attention.attend_and_total(
            given.query, given.key, given.value, given.mask, given.table, repeats=neighbours
        )
        heads = heads.reshape(batch, length, *heads.shape[3:])
        total = total.reshape(batch, length, -1)
        before = ((0, 0), (ahead, 0), (0, 0))
        total = jnp.pad(total, before, constant_values=MASKED)[:, :length]
        return jnp.pad(heads, (*before, (0, 0)))[:, :length], total

    def weights(
        self,
        h_BxNxD: jax.Array,
        encoded_BxCxKxRxE: jax.Array,
        present_BxCxKxR: jax.Array,
        documents_BxC: jax.Array | None,
        share_BxNxH: jax.Array | None = None,
    ) -> jax.Array:
        """The attention of each token over the neighbours that it reads, the mean over heads.

        The other arguments are those of a call. share_BxNxH: multiplies that of each head.

        Returns:
          [B, N, K * R] float32; zero for tokens that read none.
        """
        batch, length, _ = h_BxNxD.shape
        chunks, neighbours = encoded_BxCxKxRxE.shape[1:3]
        ahead = length // chunks - 1
        given = self._prepared(h_BxNxD, encoded_BxCxKxRxE, present_BxCxKxR, documents_BxC)
        weights_BxCxHxMxS = self.attention.weights(
            given.query, given.key, given.mask, given.table, repeats=neighbours
        )
        if share_BxNxH is not None:
            padded = jnp.pad(share_BxNxH[:, ahead:], ((0, 0), (0, ahead), (0, 0)))
            share_BxCxMxH = padded.reshape(batch, chunks, ahead + 1, -1)
            weights_BxCxHxMxS *= jnp.moveaxis(share_BxCxMxH, 3, 2)[..., None]
        mean_BxNxS = jnp.mean(weights_BxCxHxMxS, axis=2).reshape(batch, length, -1)
        return jnp.pad(mean_BxNxS, ((0, 0), (ahead, 0), (0, 0)))[:, :length]

    def _prepared(
        self,
        h_BxNxD: jax.Array,
        encoded_BxCxKxRxE: jax.Array,
        present_BxCxKxR: jax.Array,
        documents_BxC: jax.Array | None,
    ) -> Prepared:
        """The shifted chunks as queries, their neighbours as keys and values, and who may read what."""
        few = self._few(
            present_BxCxKxR, documents_BxC, h_BxNxD.shape[1] // present_BxCxKxR.shape[1]
        )
        return prepare(self.attention, *self._streams(h_BxNxD, encoded_BxCxKxRxE), few)

    def _streams(
        self, h_BxNxD: jax.Array, encoded_BxCxKxRxE: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The shifted chunks [B, C, M, D], and the neighbours of each side by side, [B, C, K * R, E]."""
        batch, chunks, neighbours, neighbour_length, width = encoded_BxCxKxRxE.shape
        chunk_length = h_BxNxD.shape[1] // chunks
        ahead = chunk_length - 1
        context_BxCxSxE = encoded_BxCxKxRxE.reshape(
            batch, chunks, neighbours * neighbour_length, width
        )
        h_BxCxMxD = jnp.pad(h_BxNxD[:, ahead:], ((0, 0), (0, ahead), (0, 0))).reshape(
            batch, chunks, chunk_length, -1
        )
        if self.gated:
            context_BxCxSxE = self.attention.norm(context_BxCxSxE)
        return h_BxCxMxD, context_BxCxSxE

    def _few(
        self, present_BxCxKxR: jax.Array, documents_BxC: jax.Array | None, chunk_length: int
    ) -> FewKeys:
        """Who may read what, from where."""
        batch, chunks, neighbours, neighbour_length = present_BxCxKxR.shape
        return FewKeys(
            readable=present_BxCxKxR.reshape(batch, chunks, -1),
            may_read=self._may_read(documents_BxC, chunk_length),
            query_offset=neighbour_length + self.distance if self.gated else chunk_length - 1,
            neighbours=neighbours,
        )

    @staticmethod
    def _may_read(documents_BxC: jax.Array | None, chunk_length: int) -> jax.Array | None:
        """[B, C, M]: a chunk's own last token always, the next chunk's in its document; None for all."""
        if documents_BxC is None:
            return None
        last_of_chunk_M = jnp.arange(chunk_length) == 0
        following_BxC = jnp.pad(documents_BxC[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        may_read_BxCxM = last_of_chunk_M | (documents_BxC == following_BxC)[:, :, None]
        return settled(may_read_BxCxM)
