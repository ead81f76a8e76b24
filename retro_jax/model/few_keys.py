"""Attention over few keys, from the streams to its output: the encoder's two, and CCA.

On a TPU short_kernel.py computes it, where its sizes allow it; projections and output then have the heads
side by side, so that nothing is turned over between products and kernel. Elsewhere it is plain.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from retro_jax.model.attention import Attention
from retro_jax.model.positions import NoPositions, Relative, Rotary
from retro_jax.sharding import FSDP, TENSOR, lay_out, target_platform

_LANES = 128
_ROWS = 16  # a tile of bfloat16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FewKeys:
    """Who reads what, and where everything is.

    Attributes:
      readable: [*I, S] bool, whether a key is read. may_read: [*I, T] bool, whether a query reads; None
        for all.
      query_offset: the position of the first query; the first key's is 0.
      neighbours, texts: how many times the same positions come along the keys, and along the queries.
    """

    readable: jax.Array
    may_read: jax.Array | None = None
    query_offset: int = dataclasses.field(default=0, metadata={"static": True})
    neighbours: int = dataclasses.field(default=1, metadata={"static": True})
    texts: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def mask(self) -> jax.Array:
        """[*I, 1, T or 1, S] bool."""
        mask = self.readable[..., None, None, :]
        return mask if self.may_read is None else mask & self.may_read[..., None, :, None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The arguments of Attention.attend: [*I, T or S, H or G, W], [*I, 1, T or 1, S], distances or None."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    mask: jax.Array
    table: jax.Array | None


def attend_few(
    attention: Attention, x_IxTxD: jax.Array, context: jax.Array | None, few: FewKeys
) -> jax.Array:
    """The attention of queries over few keys, without the residual.

    Args:
      attention: without biases, norms of heads, or fewer heads of keys where the kernel is used.
      x_IxTxD: the queries' stream. context: [*I, S, E], or None for the same stream.
      few: masks and positions.

    Returns:
      [*I, T, D]; zero for queries that may read nothing.
    """
    if _has_kernel(attention, x_IxTxD, context):
        return _attend_by_kernel(attention, x_IxTxD, context, few)
    if few.texts == 1:
        given = prepare(attention, x_IxTxD, context, few)
        return attention.read_out(attend_prepared(attention, given, few))
    assert context is not None
    *leading, queries, width = x_IxTxD.shape
    x = x_IxTxD.reshape(*leading, few.texts, queries // few.texts, width)
    each = dataclasses.replace(few, readable=few.readable[..., None, :], texts=1)
    given = prepare(attention, x, context[..., None, :, :], each)
    whole = (*given.query.shape[:-3], *given.key.shape[-3:])
    key, value = (jnp.broadcast_to(part, whole) for part in (given.key, given.value))
    given = dataclasses.replace(given, key=key, value=value)
    return attention.read_out(attend_prepared(attention, given, each)).reshape(x_IxTxD.shape)


def prepare(
    attention: Attention, x_IxTxD: jax.Array, context: jax.Array | None, few: FewKeys
) -> Prepared:
    """Turned queries and keys, values, mask and distances of the plain form, of one text."""
    query, key, value = attention.project(x_IxTxD, context)
    queries, keys = query.shape[-3], key.shape[-3] // few.neighbours
    positions, offset = attention.positions, few.query_offset
    query = positions.turn(query, np.arange(queries) + offset)
    key = positions.turn(key, np.tile(np.arange(keys), few.neighbours))
    table = attention.distance_table(queries, keys, offset=offset)
    return Prepared(query, key, value, few.mask, table)


def attend_prepared(attention: Attention, given: Prepared, few: FewKeys) -> jax.Array:
    """The heads [*I, T, H, W] of the plain form."""
    return attention.attend(
        given.query, given.key, given.value, given.mask, given.table, repeats=few.neighbours
    )


def _has_kernel(attention: Attention, x_IxTxD: jax.Array, context: jax.Array | None) -> bool:
    """Whether the kernel computes this attention, in the traced program."""
    if attention.layout.execution.attention not in ("auto", "fused"):
        return False
    if target_platform() != "tpu" or attention.has_head_norms:
        return False
    plain = type(attention.positions) in (NoPositions, Relative, Rotary)
    heads, width = attention.output.shape[:2]
    whole = attention.fused if context is None else attention.key_value.shape[2] == heads
    rows = (x_IxTxD.shape[-2], x_IxTxD.shape[-2] if context is None else context.shape[-2])
    aligned = not ((heads * width) % _LANES or rows[0] % _ROWS or rows[1] % _ROWS)
    return plain and bool(whole) and aligned


def _attend_by_kernel(
    attention: Attention, x_IxTxD: jax.Array, context: jax.Array | None, few: FewKeys
) -> jax.Array:
    """`attend_few` by the kernel; on a mesh, each device has its rows and heads."""
    layout, shardings = attention.layout, attention.layout.shardings
    x_IxTxD = attention.norm(x_IxTxD)
    names = ("query_key_value",) if context is None else ("query", "key_value")
    streams = (x_IxTxD,) if context is None else (x_IxTxD, context)
    projected = [
        layout.product_of(
            _side_by_side(getattr(attention, name)[...]),
            stream,
            gathered=P(None, TENSOR),
            out_sharding=shardings.wide(stream.ndim),
        )
        for name, stream in zip(names, streams, strict=True)
    ]
    own, read = projected[0], (projected[1] if len(projected) > 1 else None)
    may_read = few.may_read
    if may_read is None:
        may_read = jnp.ones_like(x_IxTxD[..., 0], bool)
    arrays = (own, read, may_read, few.readable, _positions(attention, own, read, few))
    # Each device's own number of heads; the width is that of a head everywhere.
    width = attention.output.shape[1]

    def local(own: Any, read: Any, may_read: Any, readable: Any, positions: Any) -> jax.Array:
        from retro_jax.model.short_kernel import Short, short_attention  # Pallas takes a second

        heads = own.shape[-1] // (width * (3 if read is None else 1))
        out = short_attention(
            own.reshape(-1, *own.shape[-2:]),
            None if read is None else read.reshape(-1, *read.shape[-2:]),
            may_read.astype(jnp.float32).reshape(-1, may_read.shape[-1]),
            readable.astype(jnp.float32).reshape(-1, readable.shape[-1]),
            positions,
            Short(heads, few.neighbours, few.texts),
        )
        return out.reshape(*own.shape[:-1], -1)

    run: Any = local
    if shardings.active:
        relative = isinstance(attention.positions, Relative)
        by_head = P(None, shardings.tensor) if relative else P(None, None)
        wide, rows = shardings.wide, shardings.rows
        specs = (
            wide(own.ndim),
            None if read is None else wide(read.ndim),
            rows(may_read.ndim),
            rows(few.readable.ndim),
            jax.tree.map(lambda _: by_head, arrays[4]),
        )
        run = jax.shard_map(local, in_specs=specs, out_specs=wide(own.ndim), check_vma=False)
    out = run(*arrays)
    weight = attention.output[...]
    spec = P(TENSOR, FSDP) if shardings.active else None
    flat = jnp.reshape(weight, (-1, weight.shape[-1]), out_sharding=spec)
    gathered, to = P(TENSOR, None), shardings.rows(out.ndim)
    return layout.product_of(flat, out, gathered=gathered, out_sharding=to)


def _side_by_side(weight: jax.Array) -> jax.Array:
    """A projection [D, H, W] or [D, p, H, W] as [D, H * p * W]: of each head all its parts."""
    if weight.ndim == 4:
        weight = jnp.swapaxes(weight, 1, 2)
    spec = None if jax.typeof(weight).sharding.mesh.empty else P(FSDP, TENSOR)
    return jnp.reshape(weight, (weight.shape[0], -1), out_sharding=spec)


def _positions(attention: Attention, own: jax.Array, read: Any, few: FewKeys) -> Any:
    """What the kernel needs to know of positions."""
    from retro_jax.model.short_kernel import Distances, Turned

    queries, keys = own.shape[-2], (own if read is None else read).shape[-2]
    heads, width = attention.output.shape[:2]
    of_query = np.tile(np.arange(queries // few.texts) + few.query_offset, few.texts)
    if isinstance(attention.positions, Rotary):
        of_key = np.tile(np.arange(keys // few.neighbours), few.neighbours)
        angles = [attention.positions.angles(at, width) for at in (of_query, of_key)]
        return Turned(*(turn(angle) for angle in angles for turn in (jnp.cos, jnp.sin)))
    if not isinstance(attention.positions, Relative):
        return None
    layout = attention.layout
    counts = (queries // few.texts, keys // few.neighbours)
    table_QxHxW = attention.distance_table(*counts, offset=few.query_offset)
    assert table_QxHxW is not None
    spec = P(None, layout.shardings.tensor) if layout.shardings.active else None
    biases = (layout.vector(attention.content_bias), layout.vector(attention.position_bias))
    u, v, table = (
        lay_out(jnp.reshape(x, (-1, heads * width), out_sharding=spec), spec)
        for x in (*biases, table_QxHxW)
    )
    return Distances(u, v, table)
