"""Multi-head attention with relative or rotary positions: one operator for self and cross attention.

Shape letters: T queries, S keys, H heads; `...` stands for the leading axes [B, ...].

Relative positions (Transformer-XL; paper, appendix B.1.1):

    logits_ij = (q_i.k_j + u.k_j + q_i.R(d_ij) + v.R(d_ij)) / sqrt(head_dim)

The distance d_ij = i - j + offset takes only T + S - 1 values, so q.R is computed once per distance
and each query's row is then shifted into place. With T = 3, S = 4, offset 0 and columns from the
largest distance down, row i must begin at column T - 1 - i:

    columns d:    2  1  0 -1 -2 -3          row 0 reads  0 -1 -2 -3   (from column 2)
                                            row 1 reads  1  0 -1 -2   (from column 1)
                                            row 2 reads  2  1  0 -1   (from column 0)

Read as one flat array of rows of width W = 6, dropping the first T - 1 values and cutting rows of
width W - 1 moves each row's beginning one further to the left than the row before: the shift. libtpu
takes hours over a reshape of such widths, so TPUs are given slices: of groups of rows, then of the
rows of a group.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.layers import Layout, RMSNorm, normal, residual_gain
from retro_jax.model.matmul import product, scores
from retro_jax.model.positions import shift, sinusoids

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Widths:
    """The sizes of one attention: the query stream's width, the key stream's, heads and their width."""

    query: int
    key: int
    num_heads: int
    head_dim: int


class Attention(nnx.Module):
    """Norm on the queries, projections, positions, softmax, output; without the residual.

    Self attention has one fused projection; cross attention reads the key stream as it is.
    """

    def __init__(
        self,
        config: RetroConfig,
        widths: Widths,
        *,
        cross: bool,
        layout: Layout,
        rngs: nnx.Rngs,
        positions: str | None = None,
    ):
        heads = (widths.num_heads, widths.head_dim)
        self.norm = RMSNorm(widths.query, config.norm_epsilon)
        if cross:
            self.query = normal(rngs, (widths.query, *heads), fan_in=widths.query)
            self.key_value = normal(rngs, (widths.key, 2, *heads), fan_in=widths.key)
        else:
            self.query_key_value = normal(rngs, (widths.query, 3, *heads), fan_in=widths.query)
        self.output = normal(
            rngs,
            (*heads, widths.query),
            fan_in=math.prod(heads),
            gain=residual_gain(config, widths.query),
        )
        self.positions = positions if positions is not None else config.positions
        if self.positions == "relative":
            self.relative = normal(rngs, (widths.query, *heads), fan_in=widths.query)
            self.content_bias = nnx.Param(jnp.zeros(heads, jnp.float32))
            self.position_bias = nnx.Param(jnp.zeros(heads, jnp.float32))
        self.cross = cross
        self.layout = layout

    def project(
        self, x: jax.Array, context: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [..., T, H, head_dim], keys and values [..., S, H, head_dim]."""
        x = self.norm(x)
        if not self.cross:
            query, key, value = self._project(x, "query_key_value", self.query_key_value)
            return query, key, value
        assert context is not None
        (query,) = self._project(x, "query", self.query)
        key, value = self._project(context, "key_value", self.key_value)
        return query, key, value

    def _project(self, x: jax.Array, name: str, weight: nnx.Param) -> tuple[jax.Array, ...]:
        """One product for all of a weight's parts, cut apart afterwards."""
        w = self.layout.weight(name, weight)
        made = product(x, w, out_sharding=self.layout.shardings.heads(x.ndim - 1 + w.ndim - 1))
        if w.ndim == 3:
            return (made,)
        # The gradients of what a split makes are joined; those of slices are padded and added.
        parts = jax.lax.split(made, (1,) * w.shape[1], axis=x.ndim - 1)
        return tuple(jnp.squeeze(part, x.ndim - 1) for part in parts)

    def position_keys(self, distances: jax.Array) -> jax.Array:
        """R(d): [n] distances -> [n, H, head_dim], the learned map of the distances' sinusoids."""
        weight = self.layout.weight("relative", self.relative)
        table = sinusoids(distances, weight.shape[0]).astype(self.layout.dtype)
        return jnp.einsum("nd,dhk->nhk", table, weight)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array,
        position_keys: jax.Array | None,
        repeats: int = 1,
    ) -> jax.Array:
        """Softmax attention with the relative terms where there are position keys.

        Args:
          query: [..., T, H, head_dim]. key, value: [..., S, H, head_dim].
          mask: [..., 1, T or 1, S] bool. position_keys: [T + S / repeats - 1, H, head_dim] or None.
          repeats: how many times the same distances stand side by side along S (neighbours).

        Returns:
          [..., T, H, head_dim].
        """
        if position_keys is None:
            return attend(query, key, value, mask)
        by_distance = jnp.einsum(
            "...thk,nhk->...htn",
            query + self._bias("position_bias", self.position_bias),
            position_keys,
            preferred_element_type=jnp.float32,
        )
        bias = shift(by_distance, key.shape[-3] // repeats)
        bias = jnp.concatenate([bias] * repeats, axis=-1)
        return attend(
            query + self._bias("content_bias", self.content_bias),
            key,
            value,
            mask,
            bias,
        )

    def _bias(self, name: str, param: nnx.Param) -> jax.Array:
        """u or v, [H, head_dim]."""
        return self.layout.weight(name, param)

    def read_out(self, heads: jax.Array) -> jax.Array:
        """[..., T, H, head_dim] -> [..., T, D]."""
        spec = self.layout.shardings.rows(heads.ndim - 1)
        return product(
            heads, self.layout.weight("output", self.output), contracted=2, out_sharding=spec
        )


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax((q.k + bias) / sqrt(head_dim)) v in float32; a query that may read no key gets zero.

    Args:
      query: [..., T, H, head_dim]. key, value: [..., S, H, head_dim].
      mask: [..., 1, T or 1, S] bool, True where a query may read a key.
      bias: [..., H, T, S], added to q.k before the division; None for none.

    Returns:
      [..., T, H, head_dim] in the queries' dtype.
    """
    logits = scores(query, key)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    logits = jnp.where(mask, logits / math.sqrt(query.shape[-1]), MASKED)
    # The maximum only guards exp against overflow: softmax does not depend on it, nor do gradients.
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    return jnp.einsum("...hts,...shk->...thk", weights.astype(value.dtype), value)
