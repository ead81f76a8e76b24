"""Multi-head attention: one operator for self and cross attention, with any kind of positions.

Shape letters beside those of the model: I any leading axes [B, ...], T queries, S keys, W head width
(head_dim). positions.py describes the terms that positions add to the logits.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from retro_jax.config import DecoderForm, RetroConfig
from retro_jax.model.backend import scores
from retro_jax.model.layers import (
    Layout,
    RMSNorm,
    affine,
    bias,
    make_norm,
    normal,
    residual_gain,
)
from retro_jax.model.positions import Positions, distances
from retro_jax.sharding import FSDP, TENSOR

MASKED = -1e30
_MOST_APART = 60.0  # nats between two denominators: exp of it is finite, times a gate too


@dataclasses.dataclass(frozen=True)
class Widths:
    """The sizes of one attention: the query stream's width, the key stream's, heads and their width.

    kv_heads: G, heads of keys and values; 0 for num_heads. layers: of its stack, if that is not the
    decoder's.
    """

    query: int
    key: int
    num_heads: int
    head_dim: int
    kv_heads: int = 0
    layers: int = 0


class Attention(nnx.Module):
    """Norm on the queries, projections, positions, softmax, output; without the residual.

    Self attention has one fused projection, unless keys and values have fewer heads; cross attention
    reads the key stream as it is.
    """

    # Of Relative positions only.
    relative: nnx.Param
    content_bias: nnx.Param
    position_bias: nnx.Param
    # Of decoders whose form has them.
    query_norm: RMSNorm
    key_norm: RMSNorm

    def __init__(
        self,
        config: RetroConfig,
        widths: Widths,
        *,
        positions: Positions,
        cross: bool,
        layout: Layout,
        rngs: nnx.Rngs,
        form: DecoderForm = DecoderForm(),
    ):
        heads = (widths.num_heads, widths.head_dim)
        kv_heads = (widths.kv_heads or widths.num_heads, widths.head_dim)
        self.norm = make_norm(form, widths.query, config.norm_epsilon)
        self.fused = not cross and kv_heads == heads
        parts = P(FSDP, None, TENSOR, None)
        if self.fused:
            self.query_key_value = normal(
                rngs, (widths.query, 3, *heads), parts, fan_in=widths.query
            )
        else:
            spec = P(FSDP, TENSOR, None)
            self.query = normal(rngs, (widths.query, *heads), spec, fan_in=widths.query)
            self.key_value = normal(rngs, (widths.key, 2, *kv_heads), parts, fan_in=widths.key)
        self.output = normal(
            rngs,
            (*heads, widths.query),
            P(TENSOR, None, FSDP),
            fan_in=math.prod(heads),
            gain=residual_gain(widths.layers or config.num_layers, widths.query),
        )
        added = _extra_parameters(form, widths, self.fused)
        if cross and form.cca_rank:
            added |= _low_rank_parameters(form.cca_rank, widths, rngs)
        for name, param in added.items():
            setattr(self, name, param)
        if form.qk_norm:
            self.query_norm, self.key_norm = (
                RMSNorm(widths.head_dim, config.norm_epsilon) for _ in range(2)
            )
        self.has_head_norms = form.qk_norm
        for name, param in positions.parameters(rngs, widths.query, heads).items():
            setattr(self, name, param)
        self.positions = positions
        self.layout = layout

    def project(
        self, x_IxTxD: jax.Array, context: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [*I, T, H, W], keys and values [*I, S, G, W], before positions."""
        x_IxTxD = self.norm(x_IxTxD)
        if self.fused:
            query, key, value = self._project(x_IxTxD, "query_key_value")
        else:
            (query,) = self._project(x_IxTxD, "query")
            key, value = self._project(x_IxTxD if context is None else context, "key_value")
        if self.has_head_norms:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def _project(self, x_IxTxD: jax.Array, name: str) -> tuple[jax.Array, ...]:
        """One product for all of a weight's parts, cut apart afterwards."""
        shape, axis = getattr(self, name).shape, x_IxTxD.ndim - 1
        spec = self.layout.shardings.heads(axis + len(shape) - 1)
        product_IxTxPxHxW = affine(self, name, x_IxTxD, out_sharding=spec)
        if len(shape) == 3:
            return (product_IxTxPxHxW,)
        # The gradients of a split's parts are joined; those of slices are padded and added.
        parts = jax.lax.split(product_IxTxPxHxW, (1,) * shape[1], axis=axis)
        return tuple(jnp.squeeze(part, axis) for part in parts)

    def distance_table(self, num_queries: int, num_keys: int, offset: int = 0) -> jax.Array | None:
        """The positions' values for every distance, the largest first: [T + S - 1, ...] or None."""
        return self.positions.distance_table(self._weight, distances(num_queries, num_keys, offset))

    def for_kernel(
        self, query_IxTxHxW: jax.Array, beyond: int
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """The queries for a fused kernel of T queries and T keys, and its terms of positions.

        Args:
          query_IxTxHxW: turned queries. beyond: how many distances below 0 the kernel's table has.

        Returns:
          The queries for the products with keys; the queries [*I, T, H, W] for the products with a
          table [T + beyond, H, W] of distances from T - 1 down, and this table, or None.
        """
        table = self.distance_table(query_IxTxHxW.shape[-3], beyond + 1)
        if table is None:
            return query_IxTxHxW, None
        content_IxTxHxW, position_IxTxHxW = self.positions.biased(self._weight, query_IxTxHxW)
        return content_IxTxHxW, (position_IxTxHxW, table)

    def by_distance(
        self, query_IxTxHxW: jax.Array, table: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The terms of positions for every distance of a table, not yet shifted to keys.

        Args:
          query_IxTxHxW: queries. table: `distance_table` of Q distances.

        Returns:
          The queries [*I, T, H, W] for the products with keys, and an addend [*I, T, H, Q].
        """
        # A query alone has nothing to shift.
        query_IxTx1xHxW, addend_IxTxHx1xQ = self.positions.logits(
            self._weight, query_IxTxHxW[..., None, :, :], table, table.shape[0]
        )
        return query_IxTx1xHxW[..., 0, :, :], addend_IxTxHx1xQ[..., 0, :]

    def attend(
        self,
        query_IxTxHxW: jax.Array,
        key_IxSxHxW: jax.Array,
        value_IxSxHxW: jax.Array,
        mask: jax.Array,
        table: jax.Array | None,
        repeats: int = 1,
    ) -> jax.Array:
        """Softmax attention of turned queries and keys, with the positions' terms in the logits.

        Args:
          query_IxTxHxW, key_IxSxHxW, value_IxSxHxW: queries, keys, values; the latter of H or G heads.
          mask: [*I, 1, T or 1, S] bool. table: `distance_table` of T and S / repeats, or None.
          repeats: how many times the same distances come along S (neighbours).

        Returns:
          [*I, T, H, W].
        """
        weights_IxHxTxS = self.weights(query_IxTxHxW, key_IxSxHxW, mask, table, repeats)
        return weighted_sum(weights_IxHxTxS, value_IxSxHxW)

    def attend_and_total(
        self,
        query_IxTxHxW: jax.Array,
        key_IxSxHxW: jax.Array,
        value_IxSxHxW: jax.Array,
        mask: jax.Array,
        table: jax.Array | None,
        repeats: int = 1,
    ) -> tuple[jax.Array, jax.Array]:
        """`attend`, and the logarithm of its softmax's denominator, [*I, T, H] float32."""
        query, bias = self._positioned(query_IxTxHxW, key_IxSxHxW, table, repeats)
        weights_IxHxTxS, total_IxHxT = weights_and_total(query, key_IxSxHxW, mask, bias)
        return weighted_sum(weights_IxHxTxS, value_IxSxHxW), jnp.swapaxes(total_IxHxT, -1, -2)

    def weights(
        self,
        query_IxTxHxW: jax.Array,
        key_IxSxHxW: jax.Array,
        mask: jax.Array,
        table: jax.Array | None,
        repeats: int = 1,
    ) -> jax.Array:
        """The softmax of `attend`, [*I, H, T, S] float32; its arguments are those of `attend`."""
        query, bias = self._positioned(query_IxTxHxW, key_IxSxHxW, table, repeats)
        return attention_weights(query, key_IxSxHxW, mask, bias)

    def _positioned(
        self,
        query_IxTxHxW: jax.Array,
        key_IxSxHxW: jax.Array,
        table: jax.Array | None,
        repeats: int,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The queries for the products with keys, and what positions add to these, [*I, H, T, S] or None."""
        if table is None:
            return query_IxTxHxW, None
        query_IxTxHxW, bias = self.positions.logits(
            self._weight, query_IxTxHxW, table, key_IxSxHxW.shape[-3] // repeats
        )
        return query_IxTxHxW, jnp.concatenate([bias] * repeats, axis=-1)

    def read_out(self, heads_IxTxHxW: jax.Array) -> jax.Array:
        """[*I, T, H, W] -> [*I, T, D]."""
        spec = self.layout.shardings.rows(heads_IxTxHxW.ndim - 1)
        return affine(self, "output", heads_IxTxHxW, contracted=2, out_sharding=spec)

    def _weight(self, name: str) -> jax.Array:
        """A parameter of the positions."""
        return self.layout.vector(getattr(self, name))


def _extra_parameters(form: DecoderForm, widths: Widths, fused: bool) -> dict[str, nnx.Param]:
    """The biases of the projections, by name."""
    heads, kv_heads = widths.num_heads, widths.kv_heads or widths.num_heads
    parameters: dict[str, nnx.Param] = {}
    if form.qkv_bias and fused:
        shape = (3, heads, widths.head_dim)
        parameters["query_key_value_bias"] = bias(shape, P(None, TENSOR, None))
    elif form.qkv_bias:
        parameters["query_bias"] = bias((heads, widths.head_dim), P(TENSOR, None))
        parameters["key_value_bias"] = bias((2, kv_heads, widths.head_dim), P(None, TENSOR, None))
    if form.out_bias:
        parameters["output_bias"] = bias((widths.query,), P(None))
    return parameters


def _low_rank_parameters(rank: int, widths: Widths, rngs: nnx.Rngs) -> dict[str, nnx.Param]:
    """Weights of low rank beside the projections, by name: random ones down, zeros up."""
    heads = (widths.num_heads, widths.head_dim)
    kv_heads = (2, widths.kv_heads or widths.num_heads, widths.head_dim)
    inner = math.prod(heads)
    down, wide = P(FSDP, None), P(TENSOR, None)
    return {
        "query_down": normal(rngs, (widths.query, rank), down, fan_in=widths.query),
        "query_up": bias((rank, *heads), P(None, *wide)),
        "key_value_down": normal(rngs, (widths.key, rank), down, fan_in=widths.key),
        "key_value_up": bias((rank, *kv_heads), P(None, None, *wide)),
        "output_down": normal(rngs, (*heads, rank), P(TENSOR, None, None), fan_in=inner),
        "output_up": bias((rank, widths.query), P(None, FSDP)),
    }


def repeat_heads(x_IxSxGxW: jax.Array, num_heads: int) -> jax.Array:
    """Keys or values [*I, S, G, W] as [*I, S, H, W]: head h of queries reads head h // (H / G)."""
    *leading, groups, width = x_IxSxGxW.shape
    if groups == num_heads:
        return x_IxSxGxW
    sharding = jax.typeof(x_IxSxGxW).sharding
    spec = None if sharding.mesh.empty else sharding.spec
    shape = (*leading, groups, num_heads // groups, width)
    repeated = jnp.broadcast_to(x_IxSxGxW[..., None, :], shape)
    return jnp.reshape(repeated, (*leading, num_heads, width), out_sharding=spec)


def attend(
    query_IxTxHxW: jax.Array,
    key_IxSxHxW: jax.Array,
    value_IxSxHxW: jax.Array,
    mask: jax.Array,
    bias_IxHxTxS: jax.Array | None = None,
) -> jax.Array:
    """softmax((q.k + bias) / sqrt(W)) v in float32; a query that may read no key gets zero.

    Args:
      query_IxTxHxW, key_IxSxHxW, value_IxSxHxW: queries, keys, values; the latter of H heads, or of
        a divisor of H.
      mask: [*I, 1, T or 1, S] bool, True where a query may read a key.
      bias_IxHxTxS: added to q.k before the division; None for none.

    Returns:
      [*I, T, H, W] in the queries' dtype.
    """
    weights_IxHxTxS = attention_weights(query_IxTxHxW, key_IxSxHxW, mask, bias_IxHxTxS)
    return weighted_sum(weights_IxHxTxS, value_IxSxHxW)


def attention_weights(
    query_IxTxHxW: jax.Array,
    key_IxSxHxW: jax.Array,
    mask: jax.Array,
    bias_IxHxTxS: jax.Array | None = None,
) -> jax.Array:
    """softmax((q.k + bias) / sqrt(W)), [*I, H, T, S] float32; all zero where a query may read no key.

    The arguments are those of `attend`.
    """
    return weights_and_total(query_IxTxHxW, key_IxSxHxW, mask, bias_IxHxTxS)[0]


def weights_and_total(
    query_IxTxHxW: jax.Array,
    key_IxSxHxW: jax.Array,
    mask: jax.Array,
    bias_IxHxTxS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attention_weights`, and the logarithm of their denominator, [*I, H, T]: MASKED without a key."""
    key_IxSxHxW = repeat_heads(key_IxSxHxW, query_IxTxHxW.shape[-2])
    logits_IxHxTxS = scores(query_IxTxHxW, key_IxSxHxW)
    if bias_IxHxTxS is not None:
        logits_IxHxTxS = logits_IxHxTxS + bias_IxHxTxS.astype(jnp.float32)
    scaled_IxHxTxS = logits_IxHxTxS / math.sqrt(query_IxTxHxW.shape[-1])
    logits_IxHxTxS = jnp.where(mask, scaled_IxHxTxS, MASKED)
    # The maximum only guards exp against overflow: softmax does not depend on it, nor do gradients.
    peak = jax.lax.stop_gradient(jnp.max(logits_IxHxTxS, axis=-1, keepdims=True))
    weights_IxHxTxS = jnp.where(mask, jnp.exp(logits_IxHxTxS - peak), 0.0)
    total = jnp.sum(weights_IxHxTxS, axis=-1, keepdims=True)
    divisor = jnp.where(total == 0.0, 1.0, total)
    return weights_IxHxTxS / divisor, (peak + jnp.log(divisor))[..., 0]


def shared_softmax(
    own: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array], gate_H: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two parts of a softmax over the keys of two attentions, of which a gate multiplies the second's.

    With a gate of 0 the first is unchanged, bit for bit; with 1 they are one attention over all keys.

    Args:
      own, other: heads [*I, T, H, W] of each attention by itself, and the logarithm of its denominator,
        [*I, T, H]. gate_H: one for each head; where it is negative, the denominator has its amount.

    Returns:
      Both heads, each times its share.
    """
    shares = softmax_shares(own[1], other[1], gate_H)
    first, second = (
        (heads * share[..., None]).astype(heads.dtype)
        for (heads, _), share in zip((own, other), shares, strict=True)
    )
    return first, second


def softmax_shares(
    own_total_IxTxH: jax.Array, other_total_IxTxH: jax.Array, gate_H: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The shares [*I, T, H] of two attentions in `shared_softmax`, by their denominators' logarithms."""
    apart_IxTxH = jnp.minimum(other_total_IxTxH - own_total_IxTxH, _MOST_APART)
    ratio_IxTxH = gate_H * jnp.exp(apart_IxTxH)
    share_IxTxH = 1.0 / (1.0 + jnp.abs(ratio_IxTxH))
    return share_IxTxH, ratio_IxTxH * share_IxTxH


def weighted_sum(weights_IxHxTxS: jax.Array, value_IxSxHxW: jax.Array) -> jax.Array:
    """Sums of values, [*I, T, H, W] in their dtype, by weights; values of H heads, or of a divisor of H."""
    value_IxSxHxW = repeat_heads(value_IxSxHxW, weights_IxHxTxS.shape[-3])
    return jnp.einsum(
        "...hts,...shw->...thw", weights_IxHxTxS.astype(value_IxSxHxW.dtype), value_IxSxHxW
    )
