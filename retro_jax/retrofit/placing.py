"""A base model's tensors on a mesh, stacked over layers as a scanned decoder reads them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.retrofit.base_model import BaseModel
from retro_jax.retrofit.canonical import Shape, stacked_name, stacked_shapes

ShardingOf = Callable[[str, Shape], jax.sharding.Sharding]


def load_stacked(
    base: BaseModel, sharding_of: ShardingOf, dtype: np.typing.DTypeLike = np.float32
) -> dict[str, jax.Array]:
    """Reads all weights onto devices; the host has one layer's tensor at a time.

    Each process reads the files, and keeps the shards of its own devices.

    Args:
      base: the model.
      sharding_of: (stacked name, shape) -> sharding. The first axis of `layers.*` is that of layers,
        and is not sharded.
      dtype: of the arrays.

    Returns:
      Stacked canonical name -> array: "layers.query" [L, D, H, K], "embedding" [V, D], ...
    """
    shapes = stacked_shapes(base.config)
    placed: dict[str, jax.Array] = {}
    for name, array in base.stream(dtype):
        stacked, layer = stacked_name(name)
        sharding = sharding_of(stacked, shapes[stacked])
        if layer is None:
            placed[stacked] = _place(array, sharding)
            continue
        if stacked not in placed:
            placed[stacked] = _zeros(shapes[stacked], jnp.dtype(dtype), sharding)
        row = _place(array, _of_row(sharding))
        placed[stacked] = _set_row(placed[stacked], row, layer)
        placed[stacked].block_until_ready()  # else rows wait on the host for their transfers
    return placed


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host's array as a global one."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _of_row(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of one layer's tensor."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
        return jax.sharding.NamedSharding(sharding.mesh, spec)
    return sharding


def _zeros(shape: Shape, dtype: jnp.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of zeros, allocated on its devices."""
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(stacked: jax.Array, row: jax.Array, layer: int) -> jax.Array:
    """The array with one layer's row replaced, in its place."""
    return stacked.at[layer].set(row)
