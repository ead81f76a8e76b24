"""Causal attention with Transformer-XL's relative positions as one Pallas kernel for TPUs.

    logits[i, j] = (q_i + u).k_j + (q_i + v).R(i - j)        both queries scaled by 1 / sqrt(W)

A block of T queries and T keys has 2T - 1 distances. Its kernel multiplies the queries with the 2T rows
of R for these distances, and shifts row a of the product to the left by T - 1 - a, so that columns
become keys:

    distances, the largest first       keys
    a = 0    3  2  1  0 -1 -2 -3  .    0 -1 -2 -3     T = 4, queries and keys from the same place
    a = 1    3  2  1  0 -1 -2 -3  .    1  0 -1 -2
    a = 3    3  2  1  0 -1 -2 -3  .    3  2  1  0

kernel_parts.py says how. Logits never leave the chip, nor does the shift: in HBM both are [N, N] for each head.

The forward pass is flash attention's (Dao et al. 2022, arXiv 2205.14135). The backward pass is one kernel
too: it computes a block's logits once, and adds to the gradients of queries (a block), of keys and values
(of a row and head) and of R (of a head), which stay in the chip's memory meanwhile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from retro_jax.model.kernel_parts import MASKED, as_column, as_row, parameters, product, shifted

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def relative_attention(
    content_BxHxNxW: Array,
    position_BxHxNxW: Array,
    key_BxHxNxW: Array,
    value_BxHxNxW: Array,
    table_HxQxW: Array,
    segments_BxN: Array,
    block: int,
    interpret: bool,
) -> Array:
    """Causal attention inside segments, with relative positions.

    Args:
      content_BxHxNxW: (q + u) / sqrt(W). position_BxHxNxW: (q + v) / sqrt(W). key_BxHxNxW,
        value_BxHxNxW: of the same length N, a multiple of `block`.
      table_HxQxW: R of the distances N - 1, N - 2, ..., -block: Q = N + block. In float32 its gradient
        is in float32 too.
      segments_BxN: the document of each token, a number below 2^24.
      block: T, queries and keys of a block; a power of two.
      interpret: compute the same anywhere, slowly.

    Returns:
      [B, H, N, W] in the values' dtype.
    """
    return _forward(
        content_BxHxNxW,
        position_BxHxNxW,
        key_BxHxNxW,
        value_BxHxNxW,
        table_HxQxW,
        segments_BxN,
        block,
        interpret,
    )[0]


def _logits(refs: Any, i: Array, j: Array) -> Array:
    """The masked logits [T, T] of query block i and key block j, float32."""
    content, position, key, near, far, query_segments, key_segments = (ref[...] for ref in refs)
    near, far = near.astype(position.dtype), far.astype(position.dtype)
    by_distance = jnp.concatenate(
        [product(position, near, (1, 1)), product(position, far, (1, 1))], axis=1
    )
    block = content.shape[0]
    logits = product(content, key, (1, 1)) + shifted(by_distance, left=True)[:, :block]
    query = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) + i * block
    past = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + j * block <= query
    return jnp.where(past & (as_column(query_segments) == key_segments), logits, MASKED)


def _forward_kernel(*refs: Any) -> None:
    """One block of queries over its blocks of keys, the last grid axis."""
    *inputs, value, out, log_sum, most, total, mean = refs
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _() -> None:
        most[...] = jnp.full_like(most, MASKED)
        total[...] = jnp.zeros_like(total)
        mean[...] = jnp.zeros_like(mean)

    @pl.when(j <= i)
    def _() -> None:
        logits = _logits(inputs, i, j)
        before = most[...]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - now)
        kept = jnp.exp(before - now)
        total[...] = kept * total[...] + jnp.sum(weights, axis=1, keepdims=True)
        values = value[...]
        mean[...] = kept * mean[...] + product(weights.astype(values.dtype), values, (1, 0))
        most[...] = now

    @pl.when(j == i)
    def _() -> None:
        out[...] = (mean[...] / total[...]).astype(out.dtype)
        log_sum[...] = as_row(most[...] + jnp.log(total[...]))


def _backward_kernel(*refs: Any) -> None:
    """The gradients from one block of queries and one of keys, added to those that stay on the chip."""
    *inputs, value, cotangent, log_sum, inner = refs[:11]
    d_content, d_position, d_key, d_value, d_table = refs[11:]
    row, i, j = (pl.program_id(axis) for axis in (1, 2, 3))
    block, blocks = d_content.shape[0], pl.num_programs(2)

    @pl.when((row == 0) & (i == 0) & (j == 0))
    def _() -> None:
        d_table[...] = jnp.zeros_like(d_table)

    @pl.when((i == 0) & (j == 0))
    def _() -> None:
        d_key[...] = jnp.zeros_like(d_key)
        d_value[...] = jnp.zeros_like(d_value)

    @pl.when(j == 0)
    def _() -> None:
        d_content[...] = jnp.zeros_like(d_content)
        d_position[...] = jnp.zeros_like(d_position)

    @pl.when(j <= i)
    def _() -> None:
        content, position, key, near, far = (ref[...] for ref in inputs[:5])
        dtype, d_out = content.dtype, cotangent[...]
        near, far = near.astype(dtype), far.astype(dtype)
        weights = jnp.exp(_logits(inputs, i, j) - as_column(log_sum[...]))
        d_weights = product(d_out, value[...], (1, 1))
        d_logits = weights * (d_weights - as_column(inner[...]))
        keys = pl.ds(j * block, block)
        d_value[keys] += product(weights.astype(d_out.dtype), d_out, (0, 0))
        d_key[keys] += product(d_logits.astype(dtype), content, (0, 0))
        d_content[...] += product(d_logits.astype(dtype), key, (1, 0))
        wide = jnp.concatenate([d_logits, jnp.zeros_like(d_logits)], axis=1)
        by_distance = shifted(wide, left=False).astype(dtype)
        to_near, to_far = by_distance[:, :block], by_distance[:, block:]
        d_position[...] += product(to_near, near, (1, 0)) + product(to_far, far, (1, 0))
        place = (blocks - 1 - (i - j)) * block
        d_table[pl.ds(place, block)] += product(to_near, position, (0, 0))
        d_table[pl.ds(place + block, block)] += product(to_far, position, (0, 0))


def _specs(blocks: int, block: int, width: int, *, heads_first: bool) -> dict[str, pl.BlockSpec]:
    """Where each kind of array is read by a step (row, head, i, j) of the grid, or (head, row, i, j)."""

    def spec(shape: tuple[int | None, ...], place: Any) -> pl.BlockSpec:
        if heads_first:
            return pl.BlockSpec(shape, lambda h, b, i, j: place(b, h, i, j))
        return pl.BlockSpec(shape, place)

    def distance(i: Any, j: Any) -> Any:
        """The block of the table that a pair begins with; pairs in the future read the present's."""
        return blocks - 1 - jnp.maximum(i - j, 0)

    whole = blocks * block
    return {
        "query": spec((None, None, block, width), lambda b, h, i, j: (b, h, i, 0)),
        "key": spec((None, None, block, width), lambda b, h, i, j: (b, h, jnp.minimum(i, j), 0)),
        "near": spec((None, block, width), lambda b, h, i, j: (h, distance(i, j), 0)),
        "far": spec((None, block, width), lambda b, h, i, j: (h, distance(i, j) + 1, 0)),
        "query segments": spec((None, 1, block), lambda b, h, i, j: (b, 0, i)),
        "key segments": spec((None, 1, block), lambda b, h, i, j: (b, 0, jnp.minimum(i, j))),
        "query sums": spec((None, None, 1, block), lambda b, h, i, j: (b, h, 0, i)),
        "all keys": spec((None, None, whole, width), lambda b, h, i, j: (b, h, 0, 0)),
        "table": spec((None, whole + block, width), lambda b, h, i, j: (h, 0, 0)),
    }


_INPUTS = ("query", "query", "key", "near", "far", "query segments", "key segments", "key")


def _forward(
    content: Array,
    position: Array,
    key: Array,
    value: Array,
    table: Array,
    segments: Array,
    block: int,
    interpret: bool,
) -> tuple[Array, Any]:
    """The output, and what the backward pass reads."""
    batch, heads, length, width = content.shape
    blocks = length // block
    specs = _specs(blocks, block, width, heads_first=False)
    rows = segments.astype(jnp.float32)[:, None]
    out, log_sum = pl.pallas_call(
        _forward_kernel,
        grid=(batch, heads, blocks, blocks),
        in_specs=[specs[name] for name in _INPUTS],
        out_specs=[specs["query"], specs["query sums"]],
        out_shape=[
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((block, size), jnp.float32) for size in (1, 1, width)],
        compiler_params=parameters(("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="relative_attention",
    )(content, position, key, table, table, rows, rows, value)
    return out, (content, position, key, value, table, segments, out, log_sum)


def _backward(block: int, interpret: bool, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    """The gradients of the six arrays."""
    content, position, key, value, table, segments, out, log_sum = residuals
    batch, heads, length, width = content.shape
    blocks = length // block
    specs = _specs(blocks, block, width, heads_first=True)
    rows = segments.astype(jnp.float32)[:, None]
    inner = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    names = (*_INPUTS, "query", "query sums", "query sums")
    wide = jax.ShapeDtypeStruct(content.shape, jnp.float32)
    gradients = pl.pallas_call(
        _backward_kernel,
        grid=(heads, batch, blocks, blocks),
        in_specs=[specs[name] for name in names],
        out_specs=[specs[name] for name in ("query", "query", "all keys", "all keys", "table")],
        out_shape=[wide] * 4 + [jax.ShapeDtypeStruct(table.shape, jnp.float32)],
        compiler_params=parameters(("parallel", "arbitrary", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="relative_attention_gradients",
    )(content, position, key, table, table, rows, rows, value, cotangent, log_sum, inner)
    arrays = (content, position, key, value, table)
    return (
        *(gradient.astype(x.dtype) for gradient, x in zip(gradients, arrays, strict=True)),
        None,
    )


relative_attention.defvjp(_forward, _backward)
