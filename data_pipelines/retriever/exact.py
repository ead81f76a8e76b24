"""Search by comparing every key, on whatever devices JAX has.

    keys [n, d] --cut--> [devices, blocks, rows, d], the first axis over the devices
    queries [q, d] --one matrix product and top-k a block, the best kept--> [devices, q, count]
    --merged on the host--> [q, count]

No device sees another's keys, and none but a block's products stand in memory at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retro_jax.errors import UserError

_MOST = (1 << 31) - 1  # keys of a device: 3.3 TB of 384 dimensions
_ROWS = 1 << 16  # keys of a block: its products with 1,024 queries are 256 MB
_QUERIES = 1024  # queries at once


class ExactSearcher:
    """Keys on devices, ready to be compared."""

    def __init__(self, keys: np.ndarray, *, recall_target: float = 1.0, rows: int = _ROWS) -> None:
        """Lays the keys over all devices.

        Args:
          keys: [n, d] float32, without NaN.
          recall_target: share of the true neighbours that a block's top-k finds at least on TPUs
            (`jax.lax.approx_max_k`); 1 for all of them.
          rows: keys of a block.
        """
        devices = np.array(jax.devices())
        count, dimension = keys.shape
        rows = min(rows, max(1, -(-count // len(devices))))
        blocks = max(1, -(-count // (rows * len(devices))))
        shape = (len(devices), blocks, rows)
        self._count, self._recall_target, self._held = count, recall_target, blocks * rows
        if self._held > _MOST:
            raise UserError(
                f"{self._held:,} keys a device: expected at most {_MOST:,}; IndexConfig.shard_keys cuts"
                " the index into several"
            )

        def part(index: Any) -> np.ndarray:
            """One device's keys: only these are copied, and padded where they end."""
            device = index[0].start or 0
            start = device * blocks * rows
            held = keys[start : start + blocks * rows]
            padded = np.zeros((blocks * rows, dimension), np.float32)
            padded[: len(held)] = held
            return padded.reshape(1, blocks, rows, dimension)

        mesh = Mesh(devices, ("keys",))
        over, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("keys",), ()))
        self._everywhere = whole
        self._keys = jax.make_array_from_callback((*shape, dimension), over, part)
        # Rows within a device, which 32 bits hold; the host adds where the device's rows begin.
        places = np.broadcast_to(np.arange(self._held, dtype=np.int32).reshape(shape[1:]), shape)
        self._firsts = np.arange(len(devices)) * self._held
        filled = np.clip(count - self._firsts, 0, self._held).astype(np.int32)
        self._places, self._filled = (jax.device_put(a, over) for a in (places, filled))

    def __len__(self) -> int:
        """Keys."""
        return self._count

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the nearest keys.

        Args:
          queries: [q, d] float32, without NaN.
          count: how many, at most the number of keys.

        Returns:
          Rows [q, count] int64 of the keys and squared L2 distances [q, count] float32, ascending,
          equal ones by row.
        """
        rows = np.empty((len(queries), count), np.int64)
        distances = np.empty(rows.shape, np.float32)
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            rows[part], distances[part] = self._search(queries[part], count)
        return rows, distances

    def _search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for few queries, padded to one of few compiled shapes."""
        size, wanted = _power_of_two(len(queries)), min(_power_of_two(count), self._count)
        padded = np.zeros((size, queries.shape[1]), np.float32)
        padded[: len(queries)] = queries
        rows, scores = _nearest(
            jax.device_put(padded, self._everywhere),
            self._keys,
            self._places,
            self._filled,
            count=wanted,
            recall_target=self._recall_target,
        )
        every = np.asarray(rows, np.int64) + self._firsts[:, None, None]
        # [devices, q, count] -> [q, devices * count]
        rows, scores = (
            np.moveaxis(values, 0, 1).reshape(size, -1)[: len(queries)]
            for values in (every, np.asarray(scores))
        )
        order = np.lexsort((rows, -scores), axis=-1)[:, :count]
        rows, scores = (np.take_along_axis(values, order, axis=1) for values in (rows, scores))
        squares = np.einsum("qd,qd->q", queries, queries)
        return rows, np.maximum(squares[:, None] - scores, 0)


@functools.partial(jax.jit, static_argnames=("count", "recall_target"))
def _nearest(
    queries: jax.Array,
    keys: jax.Array,
    places: jax.Array,
    filled: jax.Array,
    *,
    count: int,
    recall_target: float,
) -> tuple[jax.Array, jax.Array]:
    """Places within it and scores 2 q.k - |k|^2, [devices, q, count] each, of the best of each device."""

    def best_of(scores: jax.Array, at: jax.Array, keep: int) -> tuple[jax.Array, jax.Array]:
        if recall_target < 1:
            top, chosen = jax.lax.approx_max_k(scores, keep, recall_target=recall_target)
        else:
            top, chosen = jax.lax.top_k(scores, keep)
        return top, jnp.take_along_axis(at, chosen, axis=1)

    def of_device(
        blocks: jax.Array, at: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def step(
            best: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            rows, place = block
            products = jnp.einsum("qd,nd->qn", queries, rows, precision=jax.lax.Precision.HIGHEST)
            scores = 2 * products - jnp.sum(rows * rows, axis=1)
            scores = jnp.where(place < total, scores, -jnp.inf)
            where = jnp.broadcast_to(place, scores.shape)
            top, found = best_of(scores, where, min(count, scores.shape[1]))
            every = jnp.concatenate([best[0], top], axis=1)
            every_place = jnp.concatenate([best[1], found], axis=1)
            kept, chosen = jax.lax.top_k(every, count)
            return (kept, jnp.take_along_axis(every_place, chosen, axis=1)), None

        shape = (queries.shape[0], count)
        nothing = jnp.full(shape, -jnp.inf), jnp.full(shape, total)
        best, _ = jax.lax.scan(step, nothing, (blocks, at))
        return best

    scores, found = jax.vmap(of_device)(keys, places, filled)
    return found, scores


def _power_of_two(number: int) -> int:
    """The power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()
