"""Batches of the hosts' rows into global arrays on a mesh."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from retro_jax.batch import RetroBatch
from retro_jax.sharding import batch_sharding


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, ascending.

    Args:
      mesh: as the batch is laid out on. batch_size: B, a multiple of the mesh's data x fsdp.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    slices = [index[0] for index in indices if index is not None]
    return sorted({row for part in slices for row in range(*part.indices(batch_size))})


def global_batch(host: RetroBatch, mesh: Mesh, batch_size: int, rows: list[int]) -> RetroBatch:
    """Puts this process's rows into arrays that span all processes.

    Args:
      host: NumPy arrays of B' = len(rows) rows. mesh: where they go.
      batch_size: B of the whole batch. rows: which rows of it `host` holds, ascending.
    """
    sharding = batch_sharding(mesh)
    place = {row: i for i, row in enumerate(rows)}

    def spread(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            return array[place[first] : place[first] + last - first]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return jax.tree.map(spread, host)


def global_batches(
    hosts: Iterable[RetroBatch], mesh: Mesh, batch_size: int, rows: list[int]
) -> Iterator[RetroBatch]:
    """`global_batch` of every batch of an iterator."""
    for host in hosts:
        yield global_batch(host, mesh, batch_size, rows)
