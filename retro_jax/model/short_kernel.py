"""Attention over few keys as one Pallas kernel for TPUs: the encoder's, and CCA.

A neighbour reads itself (128 keys) and its chunk (64), a chunk its neighbours (256). One step of the
kernel has all queries and keys of such an item, and goes through the heads:

    HBM      what the projections make, the heads side by side, and the output: [T, H * W]
    chip     rotations or biases of queries and keys, a head's logits [T, S], its weights, their gradients

In HBM logits are as many numbers as a query has keys, 128 or 256, against its 64 of each head. Written and
read several times, in float32, they were most of what these attentions moved. Rotated queries and keys,
and arrays [T, H, W], whose tiles on the chip are others than those of [T, H * W], were most of the rest.

    self     own [T, H * 3 * W]: of each head its query, key and value
    cross    own [T, H * W], its queries; read [S, H * 2 * W], of each head its key and value

Rotary positions turn a pair of a head's numbers, x and y, to x cos - y sin, y cos + x sin. The product with
a matrix of ones and minus ones gives each number its partner. Transformer-XL's terms are as in
relative_kernel.py. The same positions serve every neighbour that a chunk reads, side by side along the
keys, and every neighbour that reads the same chunk, side by side along the queries.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from retro_jax.model.kernel_parts import MASKED, as_column, parameters, product, shifted

_LANES = 128

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Short:
    """Sizes of an attention that its arrays do not show; static.

    Attributes:
      heads: H. neighbours: how many times the same positions come along the keys, texts: along the
        queries. interpret: compute the same anywhere, slowly.
    """

    heads: int
    neighbours: int = 1
    texts: int = 1
    interpret: bool = False


class Turned(NamedTuple):
    """Rotary positions: cosines and sines [T, W] of queries and [S, W] of keys, float32."""

    query_cosine: Array
    query_sine: Array
    key_cosine: Array
    key_sine: Array


class Distances(NamedTuple):
    """Transformer-XL's terms: u and v as [1, H * W], and R [Q, H * W] of the distances from the last query
    and first key down, Q = T / texts + S / neighbours - 1."""

    content_bias: Array
    position_bias: Array
    table: Array


Positions = Turned | Distances | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def short_attention(
    own: Array,
    read: Array | None,
    may_read_IxT: Array,
    readable_IxS: Array,
    positions: Positions,
    short: Short,
) -> Array:
    """softmax(logits / sqrt(W)) v for every head; zero for queries that may read nothing.

    Args:
      own: [I, T, H * 3 * W], or [I, T, H * W] beside `read`, [I, S, H * 2 * W] (see the file's head).
      may_read_IxT: float32, 1 where a query reads at all. readable_IxS: 1 where a key is read.
      positions: of both, or None. short: heads and repeats.

    Returns:
      [I, T, H * W] in the dtype of `own`.
    """
    return _forward(own, read, may_read_IxT, readable_IxS, positions, short)[0]


class _Item:
    """One item in the kernel: its heads' queries, keys, values and weights."""

    def __init__(self, refs: Any, like: Any, short: Short):
        """Args: refs: of the inputs. like: the tree that they are of."""
        self.own, self.read, may_read, readable, self.positions = jax.tree.unflatten(like, refs)
        self.short = short
        self.allowed = (as_column(may_read[...]) * readable[...]) > 0
        parts = 3 if self.read is None else 1
        self.width = self.own.shape[1] // (short.heads * parts)
        self.dtype = self.own.dtype
        if isinstance(self.positions, Turned):
            rows = jax.lax.broadcasted_iota(jnp.int32, (self.width, self.width), 0)
            columns = jax.lax.broadcasted_iota(jnp.int32, (self.width, self.width), 1)
            half = self.width // 2
            minus = (rows == columns + half).astype(jnp.float32)
            self.partner = ((rows + half == columns).astype(jnp.float32) - minus).astype(self.dtype)

    def cut(self, head: int) -> slice:
        """The columns of a head among [H * W]."""
        return slice(head * self.width, (head + 1) * self.width)

    def places(self, head: int) -> tuple[tuple[str, slice], ...]:
        """Where a head's query, key and value are: in `own` or `read`, and in which columns."""
        start, width = head * self.width, self.width
        if self.read is None:
            return tuple(
                ("own", slice(3 * start + part * width, 3 * start + (part + 1) * width))
                for part in range(3)
            )
        keys = slice(2 * start, 2 * start + width)
        values = slice(2 * start + width, 2 * start + 2 * width)
        return ("own", self.cut(head)), ("read", keys), ("read", values)

    def head(self, head: int) -> tuple[Array, Array, Array]:
        """A head's query and key, turned, and its value."""
        query, key, value = (getattr(self, name)[:, cut] for name, cut in self.places(head))
        if isinstance(self.positions, Turned):
            at = [ref[...] for ref in self.positions]
            query, key = self.turned(query, *at[:2]), self.turned(key, *at[2:])
        return query, key, value

    def turned(self, x: Array, cosine: Array, sine: Array) -> Array:
        """Queries or keys [T, W] with their positions; with -sine the gradient of that."""
        return (x.astype(jnp.float32) * cosine + product(x, self.partner, (1, 0)) * sine).astype(
            self.dtype
        )

    def biased(self, query: Array, head: int) -> tuple[Array, Array]:
        """q + u and q + v of a head."""
        biases = (self.positions.content_bias, self.positions.position_bias)
        content, position = ((query + ref[:, self.cut(head)]).astype(self.dtype) for ref in biases)
        return content, position

    def table(self, head: int) -> Array:
        """R of a head, [Q, W]; it may be stored in float32, for its gradient's sake."""
        return self.positions.table[:, self.cut(head)].astype(self.dtype)

    def weights(self, query: Array, key: Array, head: int) -> Array:
        """The softmax [T, S] of one head, float32; rows of zeros for queries that read nothing."""
        short, content = self.short, query
        if isinstance(self.positions, Distances):
            content, position = self.biased(query, head)
            by_distance = product(position, self.table(head), (1, 1))
            period, keys = len(query) // short.texts, len(key) // short.neighbours
            by_key = shifted(by_distance, left=True, period=period)[:, :keys]
            logits = product(content, key, (1, 1))
            logits += jnp.concatenate([by_key] * short.neighbours, axis=1)
        else:
            logits = product(content, key, (1, 1))
        logits = jnp.where(self.allowed, logits / math.sqrt(self.width), MASKED)
        most = jnp.max(logits, axis=1, keepdims=True)
        weights = jnp.where(self.allowed, jnp.exp(logits - most), 0.0)
        total = jnp.sum(weights, axis=1, keepdims=True)
        return weights / jnp.where(total == 0.0, 1.0, total)


def _forward_kernel(*refs: Any, like: Any, short: Short) -> None:
    """One item."""
    *inputs, out = refs
    item = _Item(inputs, like, short)
    for head in range(short.heads):
        query, key, value = item.head(head)
        weights = item.weights(query, key, head).astype(value.dtype)
        out[:, item.cut(head)] = product(weights, value, (1, 0)).astype(out.dtype)


def _backward_kernel(*refs: Any, like: Any, short: Short) -> None:
    """The gradients of one item; those of positions' parameters are added up over all of them."""
    count = like.num_leaves
    item, cotangent = _Item(refs[:count], like, short), refs[count]
    results = list(refs[count + 1 :])
    gradients = {"own": results.pop(0)}
    if item.read is not None:
        gradients["read"] = results.pop(0)
    relative = isinstance(item.positions, Distances)
    if relative:

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            for ref in results:
                ref[...] = jnp.zeros_like(ref)

    for head in range(short.heads):
        query, key, value = item.head(head)
        weights, d_out = item.weights(query, key, head), cotangent[:, item.cut(head)]
        d_weights = product(d_out, value, (1, 1))
        inner = jnp.sum(weights * d_weights, axis=1, keepdims=True)
        d_logits = weights * (d_weights - inner) / math.sqrt(item.width)
        rounded = d_logits.astype(item.dtype)
        content = item.biased(query, head)[0] if relative else query
        d_value = product(weights.astype(item.dtype), d_out, (0, 0))
        d_key, d_query = product(rounded, content, (0, 0)), product(rounded, key, (1, 0))
        if relative:
            d_query += _relative_gradients(item, results, d_query, (query, d_logits), head)
        if isinstance(item.positions, Turned):
            at = [ref[...] for ref in item.positions]
            d_query = item.turned(d_query.astype(item.dtype), at[0], -at[1])
            d_key = item.turned(d_key.astype(item.dtype), at[2], -at[3])
        parts = zip(item.places(head), (d_query, d_key, d_value), strict=True)
        for (name, cut), gradient in parts:
            gradients[name][:, cut] = gradient.astype(item.dtype)


def _relative_gradients(
    item: _Item, results: Any, d_content: Array, made: tuple[Array, Array], head: int
) -> Array:
    """Adds a head's gradients of u, v and R; returns that of the queries for the table."""
    query, d_logits = made
    cut, short = item.cut(head), item.short
    size = d_logits.shape[1] // short.neighbours
    by_key = sum(d_logits[:, i * size : (i + 1) * size] for i in range(short.neighbours))
    wide = jnp.pad(by_key, ((0, 0), (0, item.positions.table.shape[0] - size)))
    period = len(query) // short.texts
    by_distance = shifted(wide, left=False, period=period).astype(item.dtype)
    d_position = product(by_distance, item.table(head), (1, 0))
    results[0][:, cut] += jnp.sum(d_content, axis=0, keepdims=True)
    results[1][:, cut] += jnp.sum(d_position, axis=0, keepdims=True)
    results[2][:, cut] += product(by_distance, item.biased(query, head)[1], (0, 0))
    return d_position


def _forward(
    own: Array,
    read: Array | None,
    may_read: Array,
    readable: Array,
    positions: Positions,
    short: Short,
) -> tuple[Array, Any]:
    """The output, and what the backward pass reads."""
    inputs = (own, read, may_read[:, None], readable[:, None], _padded(positions))
    leaves, like = jax.tree.flatten(inputs)
    width = own.shape[2] // (3 if read is None else 1)
    out = jax.ShapeDtypeStruct((*own.shape[:2], width), own.dtype)
    result = pl.pallas_call(
        functools.partial(_forward_kernel, like=like, short=short),
        grid=(len(own),),
        in_specs=list(map(_spec, leaves)),
        out_specs=_spec(out),
        out_shape=out,
        compiler_params=parameters(("parallel",)),
        interpret=short.interpret,
        name="short_attention",
    )(*leaves)
    return result, (own, read, may_read, readable, positions)


def _backward(short: Short, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    """The gradients of the arrays."""
    own, read, may_read, readable, positions = residuals
    padded = _padded(positions)
    leaves, like = jax.tree.flatten((own, read, may_read[:, None], readable[:, None], padded))
    results = [own, *([] if read is None else [read])]
    if isinstance(padded, Distances):
        results += [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in padded]
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, like=like, short=short),
        grid=(len(own),),
        in_specs=[*map(_spec, leaves), _spec(cotangent)],
        out_specs=list(map(_spec, results)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=parameters(("arbitrary",)),
        interpret=short.interpret,
        name="short_attention_gradients",
    )(*leaves, cotangent)
    d_own, *rest = gradients
    d_read = None if read is None else rest.pop(0)
    d_positions: Any = None
    if isinstance(positions, Distances):
        d_positions = Distances(
            *(d[: len(x)].astype(x.dtype) for d, x in zip(rest, positions, strict=True))
        )
    elif positions is not None:
        d_positions = Turned(*map(jnp.zeros_like, positions))
    return d_own, d_read, jnp.zeros_like(may_read), jnp.zeros_like(readable), d_positions


def _padded(positions: Positions) -> Positions:
    """Positions with a table whose length is one of the chip's."""
    if not isinstance(positions, Distances):
        return positions
    rows = len(positions.table)
    padded = -(-rows // _LANES) * _LANES
    return positions._replace(table=jnp.pad(positions.table, ((0, padded - rows), (0, 0))))


def _spec(x: Any) -> pl.BlockSpec:
    """One item of an array [I, rows, columns], or all of one of two axes."""
    if len(x.shape) == 2:
        return pl.BlockSpec(x.shape, lambda i: (0, 0))
    return pl.BlockSpec((None, *x.shape[1:]), lambda i: (i, 0, 0))


short_attention.defvjp(_forward, _backward)
