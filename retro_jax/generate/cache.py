"""The decoder's memory of the tokens that it has read: keys, values and one chunk's activations.

Shape letters beside those of the model: S positions of the cache (`capacity`), W head width, and
Q = K * R positions of one chunk's neighbours; gated CCA reads 1 + R of each. G heads of keys and
values may be fewer than the H of queries. Every row is a text with a position of its own:

    keys, values              all positions so far, of every layer
    activations               of the chunk under way, as the encoder will read them (layer min(P));
                              none with gated CCA, which has no encoder
    cca_keys, cca_values      of the neighbours of the last complete chunk, of every CCA layer
    present                   which of the Q positions are not padding

Shapes are fixed, so that one program serves all positions. Values past a row's position are never
read. A program that is given a cache takes its memory (donation). Positions are the last axis, as
XLA's CPU backend multiplies a query with keys [W, S], and values [W, S] with weights, uncopied.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from retro_jax.config import RetroConfig
from retro_jax.sharding import Shardings

# Arrays of several layers: a list of them, or one array with a leading axis of layers (by scan).
PerLayer = tuple[jax.Array, ...] | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkCache:
    """The part of a cache that only retrieval needs.

    Attributes:
      activations: [B, D, M], or None with gated CCA. keys, values: of every CCA layer, [B, G, W, Q].
      present: [B, Q] bool.
    """

    activations: jax.Array | None
    keys: PerLayer
    values: PerLayer
    present: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of B texts.

    Attributes:
      keys, values: of every layer, [B, G, W, S], turned by their positions.
      chunk: None with retrieval off, and for the baseline.
    """

    keys: PerLayer
    values: PerLayer
    chunk: ChunkCache | None

    @property
    def capacity(self) -> int:
        """S: positions that there is room for."""
        return first_layer(self.keys).shape[-1]

    @property
    def rows(self) -> int:
        """B."""
        return first_layer(self.keys).shape[-4]


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The shapes of a cache, but for rows and positions.

    Attributes:
      config: the architecture. dtype: of the activations. shardings: of the model.
      stacked: one array for all layers instead of a list.
    """

    config: RetroConfig
    dtype: Any
    shardings: Shardings
    stacked: bool

    def empty(self, rows: int, capacity: int, neighbours: int) -> Cache:
        """A cache in which nothing has been read; `neighbours` K for every chunk, 0 for no retrieval."""
        config = self.config
        heads = (rows, config.form.num_kv_heads or config.num_heads)
        cca_heads = heads if config.form.gated_cca else (rows, config.num_heads)
        self_shape = (*heads, config.head_dim, capacity)
        keys, values = (self._layers(config.num_layers, self_shape) for _ in range(2))
        if not neighbours:
            return Cache(keys, values, None)
        positions = neighbours * encoded_length(config)
        cca_shape, count = (*cca_heads, config.head_dim, positions), len(config.cca_layers)
        activations = None
        if not config.form.gated_cca:
            shape = (rows, config.d_model, config.chunk_length)
            activations = self._zeros(shape, self.dtype, self.shardings.rows(3))
        present = self._zeros((rows, positions), bool, self.shardings.rows(2))
        cca_keys, cca_values = (self._layers(count, cca_shape) for _ in range(2))
        return Cache(keys, values, ChunkCache(activations, cca_keys, cca_values, present))

    def _layers(self, count: int, shape: tuple[int, ...]) -> PerLayer:
        """Zeros for keys or values of `count` layers."""
        spec = head_spec(self.shardings)
        if self.stacked:
            stacked = None if spec is None else P(None, *spec)
            return self._zeros((count, *shape), self.dtype, stacked)
        return tuple(self._zeros(shape, self.dtype, spec) for _ in range(count))

    @staticmethod
    def _zeros(shape: tuple[int, ...], dtype: Any, spec: P | None) -> jax.Array:
        """Zeros, laid out on the mesh where there is one."""
        return jnp.zeros(shape, dtype, out_sharding=spec)


def encoded_length(config: RetroConfig) -> int:
    """How many positions of one neighbour CCA reads."""
    return config.neighbour_length + int(config.form.gated_cca)


def head_spec(shardings: Shardings) -> P | None:
    """The sharding of [B, G, W, S]: batch and heads are split."""
    spec = shardings.heads(4)  # of [B, S, H, W]
    return None if spec is None else P(spec[0], spec[2], None, None)


def first_layer(layers: PerLayer) -> jax.Array:
    """The first of a list; of an array all."""
    return layers if isinstance(layers, jax.Array) else layers[0]


def take(layers: PerLayer, index: Any) -> jax.Array:
    """One layer's array; an index into a list is a Python int."""
    if isinstance(layers, tuple):
        return layers[index]
    return jax.lax.dynamic_index_in_dim(layers, index, keepdims=False)


def put(layers: PerLayer, index: Any, value: jax.Array) -> PerLayer:
    """The same layers with another array for one of them."""
    if isinstance(layers, tuple):
        return (*layers[:index], value, *layers[index + 1 :])
    return jax.lax.dynamic_update_index_in_dim(layers, value, index, axis=0)


def write_block(
    cache_BxHxWxS: jax.Array, block_BxTxHxW: jax.Array, starts_B: jax.Array, shardings: Shardings
) -> jax.Array:
    """Writes each row's T positions from its own start on, in place."""

    def write(cache: jax.Array, block: jax.Array, starts: jax.Array) -> jax.Array:
        block_BxHxWxT = block.transpose(0, 2, 3, 1)
        if cache.shape[0] == 1:
            return jax.lax.dynamic_update_slice_in_dim(cache, block_BxHxWxT, starts[0], axis=3)
        one = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
        return jax.vmap(one)(cache, block_BxHxWxT, starts)

    heads, rows = head_spec(shardings), shardings.rows(1)
    specs = (heads, shardings.heads(4), rows)
    return on_devices(write, shardings, specs, heads)(cache_BxHxWxS, block_BxTxHxW, starts_B)


def cut_rows(
    x_BxTxHxQ: jax.Array, starts_BxT: jax.Array, length: int, shardings: Shardings
) -> jax.Array:
    """Of every query's Q columns `length` from its own start on: [B, H, T, length]."""

    def cut(x: jax.Array, starts: jax.Array) -> jax.Array:
        one = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=length, axis=-1)
        return jnp.swapaxes(jax.vmap(jax.vmap(one))(x, starts), 1, 2)

    by_head = shardings.heads(4)
    source = None if by_head is None else P(by_head[0], None, by_head[2], None)
    specs = (source, shardings.rows(2))
    return on_devices(cut, shardings, specs, head_spec(shardings))(x_BxTxHxQ, starts_BxT)


def on_devices(
    function: Callable[..., jax.Array], shardings: Shardings, in_specs: Any, out_specs: Any
) -> Callable[..., jax.Array]:
    """Runs a function on every device's part by itself, where there is a mesh."""
    if not shardings.active:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def take_rows(x: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
    """Rows of an array along an axis, in any order, laid out as before."""
    sharding = jax.typeof(x).sharding
    spec = None if sharding.mesh.empty else sharding.spec
    index = (slice(None),) * axis + (rows,)
    return x.at[index].get(mode="promise_in_bounds", out_sharding=spec)


def map_rows(function: Callable[..., jax.Array], *caches: Cache) -> Cache:
    """Applies a function of (axis of rows, arrays) to all arrays of caches of one kind."""
    stacked = isinstance(caches[0].keys, jax.Array)

    def layered(*layers: PerLayer) -> PerLayer:
        if stacked:
            return function(1, *layers)
        return tuple(function(0, *arrays) for arrays in zip(*layers, strict=True))

    chunks = [cache.chunk for cache in caches if cache.chunk is not None]
    chunk = None
    if chunks:
        activations = [c.activations for c in chunks if c.activations is not None]
        chunk = ChunkCache(
            activations=function(0, *activations) if activations else None,
            keys=layered(*(c.keys for c in chunks)),
            values=layered(*(c.values for c in chunks)),
            present=function(0, *(c.present for c in chunks)),
        )
    keys, values = layered(*(c.keys for c in caches)), layered(*(c.values for c in caches))
    return Cache(keys, values, chunk)


def choose_rows(cache: Cache, rows: jax.Array) -> Cache:
    """A cache whose row i is row `rows[i]`: repeats a prompt for its samples, drops finished texts."""
    return map_rows(lambda axis, x: take_rows(x, rows, axis), cache)


def replace_rows(cache: Cache, new: Cache, rows: jax.Array, replaced: jax.Array) -> Cache:
    """Row i is row `rows[i]` of `new` where `replaced[i]`, else as it was."""

    def choose(axis: int, old: jax.Array, fresh: jax.Array) -> jax.Array:
        mask = replaced.reshape((1,) * axis + (-1,) + (1,) * (old.ndim - axis - 1))
        return jnp.where(mask, take_rows(fresh, rows, axis), old)

    return map_rows(choose, cache, new)


def grow(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for more positions."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, capacity - x.shape[-1])])

    keys, values = (jax.tree.map(pad, layers) for layers in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values)
