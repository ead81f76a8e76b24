"""Search by comparing every key, on JAX's devices: the one exact search.

    keys --blocks of [devices, rows, d], the second axis in order--> one device sees its rows only
    queries [q, d] --one matrix product and top-k a block, the best so far kept--> [devices, q, count]
    --merged on the host, the best scored again by differences--> [q, k]

Blocks either stay on the devices, for many searches, or are read for each search and dropped. Products
round where differences do not, so that some more than k candidates are scored again.

A top-k over all keys of a block would take most of the time on a CPU. Keys are therefore dealt to groups
of neighbouring rows: the k nearest, of equal ones the first, are in the k groups whose nearest member is
nearest, of equal ones in the first.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.retriever.candidates import Found, nothing
from retro_jax.errors import UserError

_MOST = (1 << 31) - 1  # keys of a device: 3.3 TB of 384 dimensions
_ROWS = 1 << 16  # keys of a block: its products with 1,024 queries are 256 MB
_QUERIES = 1024  # queries at once
_MEMBERS = 32  # keys of a group
_SPARE = 8  # candidates beyond k that are scored again
_NOBODY = -2  # the document of no key


class KeyRows(Protocol):
    """Keys as the search reads them; places are numbers from 0 on, in the order of ids."""

    def __len__(self) -> int:
        """Keys."""
        ...

    def rows(self, places: np.ndarray) -> np.ndarray:
        """[n, d]: the keys at places [n]; a row that is not finite is never found."""
        ...

    def documents(self, places: np.ndarray) -> np.ndarray:
        """[n]: the document of each; a negative one is never found."""
        ...


class ArrayRows:
    """An array of keys [n, d], each of a document of its own."""

    def __init__(self, array: np.ndarray) -> None:
        """Takes the array as it is, a memory map too."""
        self._array = array

    def __len__(self) -> int:
        """Keys."""
        return len(self._array)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """As `KeyRows`."""
        return self._array[places]

    def documents(self, places: np.ndarray) -> np.ndarray:
        """As `KeyRows`."""
        return np.asarray(places)


class ExactSearcher:
    """Keys that queries are compared with, all of them.

    Ids of documents must be less than 2**31, as the devices compare 32 bits.
    """

    def __init__(
        self,
        keys: KeyRows | np.ndarray,
        *,
        on_devices: bool = True,
        recall_target: float = 1.0,
        rows: int = _ROWS,
    ) -> None:
        """Lays the keys over this process's devices.

        Args:
          keys: to search; an array is [n, d].
          on_devices: keep them there; otherwise each search reads them again.
          recall_target: share of the true neighbours that a block's top-k finds at least on TPUs
            (`jax.lax.approx_max_k`); 1 for all of them.
          rows: keys of a block on a device, at most.
        """
        self._keys: KeyRows = ArrayRows(keys) if isinstance(keys, np.ndarray) else keys
        devices = np.array(jax.local_devices())
        needed = -(-len(self._keys) // len(devices))
        if needed > _MOST:
            raise UserError(
                f"{needed:,} keys a device: expected at most {_MOST:,}; IndexConfig.shard_keys cuts"
                " the index into several"
            )
        self._rows = min(_power_of_two(rows), _power_of_two(max(needed, _MEMBERS)))
        self._recall_target = recall_target
        mesh = Mesh(devices, ("keys",))
        self._over, self._whole = (
            NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("keys",), ())
        )
        self._blocks = list(self._read()) if on_devices else None

    def __len__(self) -> int:
        """Keys."""
        return len(self._keys)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> Found:
        """Finds the nearest keys.

        Args:
          queries: [q, d] float32; a row that is not finite finds nothing.
          k: how many.
          exclude: [q] documents whose keys each query must not be given; a negative one is none.

        Returns:
          Places [q, k] int64 of the keys, unique in each row, and squared L2 distances [q, k] float32,
          ascending, equal ones by place; -1 and infinity where there are no more. Never NaN.
        """
        results = nothing(len(queries), k)
        valid = np.flatnonzero(np.isfinite(queries).all(1))
        if not (len(valid) and len(self)):
            return results
        excluded = np.full(len(queries), _NOBODY) if exclude is None else np.asarray(exclude)
        parts = [valid[at : at + _QUERIES] for at in range(0, len(valid), _QUERIES)]
        states = [self._start(queries[part], excluded[part], k + _SPARE) for part in parts]
        for block in self._read() if self._blocks is None else self._blocks:
            for state in states:
                state.add(block, self._recall_target)
            # Reading can be faster than comparing: one block is in memory, not all that were read.
            jax.block_until_ready([state.scores for state in states])
        for part, state in zip(parts, states):
            places = state.places()[: len(part)]
            results[0][part], results[1][part] = self._nearest(queries[part], places, k)
        return results

    def _start(self, queries: np.ndarray, exclude: np.ndarray, count: int) -> "_Best":
        """Some queries, padded to one of few compiled shapes, with nothing found."""
        size = _power_of_two(len(queries))
        padded = np.zeros((size, queries.shape[1]), np.float32)
        padded[: len(queries)] = queries
        documents = np.full(size, _NOBODY, np.int32)
        documents[: len(queries)] = np.where(exclude < 0, _NOBODY, exclude)
        shape = (self._over.mesh.size, size, _power_of_two(count))
        scores = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
        return _Best(
            *(jax.device_put(array, self._whole) for array in (padded, documents)),
            *(jax.device_put(array, self._over) for array in scores),
        )

    def _read(self) -> Iterator["_Block"]:
        """The keys in blocks, as they are on the devices."""
        devices, count = self._over.mesh.size, len(self._keys)
        for start in range(0, count, devices * self._rows):
            places = np.arange(start, min(start + devices * self._rows, count))
            keys = np.asarray(self._keys.rows(places), np.float32)
            documents = np.asarray(self._keys.documents(places))
            norms = np.einsum("nd,nd->n", keys, keys)
            there = np.isfinite(norms) & (documents >= 0)
            rows = np.zeros((devices * self._rows, keys.shape[1]), np.float32)
            rows[: len(keys)] = keys if there.all() else np.where(there[:, None], keys, 0)
            owners = np.full(len(rows), -1, np.int32)
            owners[: len(keys)] = np.where(there, documents, -1)
            shape = (devices, self._rows)
            yield _Block(
                jax.device_put(rows.reshape(*shape, -1), self._over),
                jax.device_put(owners.reshape(shape), self._over),
                start,
            )

    def _nearest(self, queries: np.ndarray, places: np.ndarray, k: int) -> Found:
        """The k nearest of candidates [n, m], -1 for none, by their differences from the queries."""
        scores = squared_distances(self._keys.rows, queries, places)
        order = np.lexsort((places, places < 0, scores), axis=-1)[:, :k]
        places, scores = (np.take_along_axis(part, order, axis=1) for part in (places, scores))
        missing = ((0, 0), (0, k - places.shape[1]))
        places = np.pad(places, missing, constant_values=-1)
        return places, np.pad(scores, missing, constant_values=np.inf)


def squared_distances(
    keys_at: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """[n, k] float32: of queries [n, d] from the keys at places [n, k]; infinity for place -1.

    Sums of squared differences: the same bits for a query alone and among others.
    """
    scores = np.full(places.shape, np.inf, np.float32)
    for slot in range(places.shape[1]):
        rows = np.flatnonzero(places[:, slot] >= 0)
        difference = np.asarray(keys_at(places[rows, slot]), np.float32) - queries[rows]
        scores[rows, slot] = np.einsum("nd,nd->n", difference, difference)
    return scores


class _Block:
    """Keys [devices, rows, d] and their documents, of which the first one's place is known."""

    def __init__(self, keys: jax.Array, documents: jax.Array, start: int) -> None:
        self.keys, self.documents, self.start = keys, documents, start


class _Best:
    """What some queries have found: for each device scores and places within it, [devices, q, count].

    Attributes:
      scores: of the blocks so far; their computation may not have ended.
    """

    def __init__(
        self,
        queries: jax.Array,
        exclude: jax.Array,
        scores: jax.Array,
        within: jax.Array,
    ) -> None:
        self._queries, self._exclude = queries, exclude
        self.scores, self._within = scores, within
        self._starts: list[int] = []
        self._rows = 1

    def add(self, block: _Block, recall_target: float) -> None:
        """Compares them with a block's keys."""
        self._rows = block.keys.shape[1]
        self.scores, self._within = _compare(
            self._queries,
            self._exclude,
            block.keys,
            block.documents,
            len(self._starts) * self._rows,
            self.scores,
            self._within,
            recall_target=recall_target,
        )
        self._starts.append(block.start)

    def places(self) -> np.ndarray:
        """[q, count] int64: the best of all devices, equal ones by place; -1 where there are no more."""
        scores, within = np.asarray(self.scores), np.asarray(self._within, np.int64)
        number, row = np.divmod(np.maximum(within, 0), self._rows)
        firsts = np.asarray(self._starts)[number]
        firsts += np.arange(len(within))[:, None, None] * self._rows  # of the device
        places = np.where(within < 0, -1, firsts + row)
        count = places.shape[2]
        scores, places = (np.moveaxis(a, 0, 1).reshape(a.shape[1], -1) for a in (scores, places))
        order = np.lexsort((places, -scores), axis=-1)[:, :count]
        return np.take_along_axis(places, order, axis=1)


@functools.partial(jax.jit, static_argnames="recall_target")
def _compare(
    queries: jax.Array,
    exclude: jax.Array,
    keys: jax.Array,
    documents: jax.Array,
    first: jax.Array | int,
    scores: jax.Array,
    within: jax.Array,
    *,
    recall_target: float,
) -> tuple[jax.Array, jax.Array]:
    """The best so far and those of a block; `first` is the place of its rows within their device."""

    def of_device(keys: jax.Array, owners: jax.Array, best: jax.Array, at: jax.Array) -> Any:
        products = jnp.einsum("qd,nd->qn", queries, keys, precision=jax.lax.Precision.HIGHEST)
        nearness = 2 * products - jnp.sum(keys * keys, axis=1)
        allowed = (owners >= 0) & (owners != exclude[:, None]) & ~jnp.isnan(nearness)
        top, rows = _few(jnp.where(allowed, nearness, -jnp.inf), best.shape[1], recall_target)
        every = jnp.concatenate([best, top], axis=1)
        every_at = jnp.concatenate([at, jnp.where(jnp.isneginf(top), -1, first + rows)], axis=1)
        values, columns = jax.lax.top_k(every, best.shape[1])
        return values, jnp.take_along_axis(every_at, columns, axis=1)

    return jax.vmap(of_device)(keys, documents, scores, within)


def _few(scores: jax.Array, count: int, recall_target: float) -> tuple[jax.Array, jax.Array]:
    """Scores [q, m] and rows [q, m] among which the `count` best are, in the order of rows."""
    rows = scores.shape[1]
    if recall_target < 1:
        values, at = jax.lax.approx_max_k(scores, min(count, rows), recall_target=recall_target)
        order = jnp.argsort(at, axis=1)
        return jnp.take_along_axis(values, order, axis=1), jnp.take_along_axis(at, order, axis=1)
    groups = rows // _MEMBERS
    if 2 * count > groups:
        return scores, jnp.broadcast_to(jnp.arange(rows), scores.shape)
    members = scores.reshape(len(scores), groups, _MEMBERS)
    _, group_ids = jax.lax.top_k(members.max(axis=2), count)
    group_ids = jnp.sort(group_ids, axis=1)
    values = jnp.take_along_axis(members, group_ids[:, :, None], axis=1)
    at = group_ids[:, :, None] * _MEMBERS + jnp.arange(_MEMBERS)
    return values.reshape(len(scores), -1), at.reshape(len(scores), -1)


def _power_of_two(number: int) -> int:
    """The power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()
