"""A model's weights as decoding reads them, prepared once.

Layers are taken out of their stack, in the activations' dtype; the read-out is transposed. Tables of
distances, which depend on weights only, are computed. On a CPU each weight is there as tiles of columns
too, which blocks of a few rows read (retro_jax/model/backend.py).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.generate import cache as caches
from retro_jax.generate.cache import PerLayer
from retro_jax.generate.operators import DistanceTables, cca_queries
from retro_jax.model.attention import Attention
from retro_jax.model.backend import column_tiles
from retro_jax.model.layer_stack import take_layer, unstack_layers
from retro_jax.model.layers import TILES, FeedForward, Layout
from retro_jax.model.retro import Retro


def prepare(
    model: Retro, *, chunks: int, scan: bool, tiled: bool = False
) -> tuple[Retro, DistanceTables, "ReadOut"]:
    """A model for decoding, its tables of distances, and the read-out; weights are tiled too, or not.

    Layers are a list unless by scan; weights are in the activations' dtype, those of norms float32.
    """
    graphdef, params = nnx.split(model)

    def to_dtype(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(model.layout.dtype)

    config = model.config
    ready: Retro = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(to_dtype, params))
    execution = dataclasses.replace(ready.layout.execution, scan_layers=scan, remat="none")
    ready.layout = Layout(execution, ready.layout.shardings)
    read_out_DxV = ready.layout.weight(ready.read_out_table()).T
    if not scan:
        cast(Any, ready).layers = unstack_layers(ready.layers, config.num_layers)
        if config.has_retrieval:
            cast(Any, ready).cca = unstack_layers(ready.cca, len(config.cca_layers))
    read_out = ReadOut(read_out_DxV, column_tiles(read_out_DxV) if tiled else None)
    if tiled:
        for part in (ready.layers, ready.cca) if config.has_retrieval else (ready.layers,):
            add_tiles(part)
    return ready, distance_tables(ready, chunks, stacked=scan), read_out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadOut:
    """The read-out [D, V], and its tiles of columns or None."""

    weight: jax.Array
    tiles: jax.Array | None


# The weights of products in a layer, and over how many axes these sum.
_CONTRACTED = {
    "query_key_value": 1,
    "query": 1,
    "key_value": 1,
    "output": 2,
    "widen": 1,
    "gate": 1,
    "narrow": 1,
}


def add_tiles(modules: nnx.Module) -> None:
    """Gives each weight of products in some layers its tiles of columns."""
    for _, module in list(nnx.iter_modules(modules)):
        for name, contracted in _CONTRACTED.items():
            weight = getattr(module, name, None)
            if isinstance(module, Attention | FeedForward) and weight is not None:
                tiles = nnx.Param(column_tiles(weight[...], contracted))
                setattr(module, f"{name}{TILES}", tiles)


def distance_tables(model: Retro, chunks: int, *, stacked: bool) -> DistanceTables:
    """The tables of all layers for windows of `chunks` chunks."""
    config = model.config

    def of(modules: Any, count: int, make: Callable[[Attention], Any]) -> PerLayer | None:
        tables = [make(take_layer(modules, index).attention) for index in range(count)]
        if tables[0] is None:
            return None
        return jnp.stack(tables) if stacked else tuple(tables)

    length = chunks * config.chunk_length
    attention = of(
        model.layers,
        config.num_layers,
        lambda module: module.distance_table(1, length, offset=length - 1),
    )
    if not config.has_retrieval:
        return DistanceTables(attention, None)
    queries, keys = cca_queries(config), caches.encoded_length(config)
    cca = of(
        model.cca,
        len(config.cca_layers),
        lambda module: module.distance_table(len(queries), keys, offset=queries.start),
    )
    return DistanceTables(attention, cca)
