"""The batches that training asks for, and their rows as global arrays on a mesh."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from retro_jax.batch import RetroBatch
from retro_jax.sharding import batch_sharding


class BatchSizes(Protocol):
    """The sizes that a source of batches is configured with."""

    @property
    def batch_size(self) -> int:
        """B, rows of a global batch."""

    @property
    def sequence_length(self) -> int:
        """N, tokens per sequence."""

    @property
    def neighbours(self) -> int:
        """K, neighbours per chunk; 0 for batches without any."""


class BatchSource(Protocol):
    """Global batches by their number, as data_pipelines' Batches gives them."""

    @property
    def config(self) -> Any:
        """A frozen dataclass with the fields of BatchSizes; a run records all of its fields."""

    @property
    def corpora(self) -> Sequence[str]:
        """Names of the corpora, in the order that RetroBatch.corpus counts them."""

    @property
    def sequences(self) -> Mapping[str, int]:
        """Sequences per epoch of each corpus."""

    @property
    def noise(self) -> bool:
        """Whether batches have RetroBatch.noise."""

    def rows(self, step: int, rows: Sequence[int] | None = None) -> RetroBatch:
        """Rows of global batch number `step`, NumPy arrays; None for all."""

    def iterate(
        self, start_step: int = 0, rows: Sequence[int] | None = None
    ) -> Generator[RetroBatch, None, None]:
        """rows(start_step), rows(start_step + 1), ... without end."""

    def document_ids(self, step: int) -> list[str]:
        """Ids of the documents that a global batch has chunks of."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The part of a source of batches that a program is compiled for.

    Attributes:
      batch_size: B, rows of a global batch. sequence_length: N. neighbours: K; 0 for none.
      num_corpora: G, in the mixture. noise: whether batches have RetroBatch.noise.
    """

    batch_size: int = 256
    sequence_length: int = 2048
    neighbours: int = 2
    num_corpora: int = 1
    noise: bool = False

    @classmethod
    def of(cls, batches: BatchSource) -> "BatchShape":
        """That of a source of batches."""
        sizes: BatchSizes = batches.config
        corpora = len(batches.corpora)
        length, k = sizes.sequence_length, sizes.neighbours
        return cls(sizes.batch_size, length, k, corpora, batches.noise)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch on this process's devices, ascending.

    Args:
      mesh: as the batch is laid out on. batch_size: B, a multiple of the mesh's data x fsdp.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    slices = [index[0] for index in indices if index is not None]
    return sorted({row for part in slices for row in range(*part.indices(batch_size))})


def global_batch(host: RetroBatch, mesh: Mesh, batch_size: int, rows: list[int]) -> RetroBatch:
    """Puts this process's rows into arrays that span all processes.

    Args:
      host: NumPy arrays of B' = len(rows) rows. mesh: of the devices.
      batch_size: B of the whole batch. rows: which rows of it `host` has, ascending.
    """
    sharding = batch_sharding(mesh)
    position = {row: i for i, row in enumerate(rows)}

    def spread(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            return array[position[first] : position[first] + last - first]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return jax.tree.map(spread, host)


def global_batches(
    hosts: Iterable[RetroBatch], mesh: Mesh, batch_size: int, rows: list[int]
) -> Iterator[RetroBatch]:
    """`global_batch` of every batch of an iterator."""
    for host in hosts:
        yield global_batch(host, mesh, batch_size, rows)


@contextlib.contextmanager
def batches_from(batches: BatchSource, mesh: Mesh, start: int) -> Iterator[Iterator[RetroBatch]]:
    """The global batches from number `start` on, built ahead by a thread that ends with the context."""
    size = batches.config.batch_size
    rows = local_rows(mesh, size)
    with contextlib.closing(batches.iterate(start, rows)) as hosts:
        yield global_batches(hosts, mesh, size, rows)
