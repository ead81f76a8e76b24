"""The validation split as batches, for evaluation while a run trains."""

import dataclasses
import pathlib
from collections.abc import Iterator

from flax import nnx
from jax.sharding import Mesh

from data_pipelines.batches import BatchConfig, Batches
from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.neighbours import NeighbourTable
from retro_jax.batch import RetroBatch
from retro_jax.errors import UserError
from retro_jax.train.evaluation import Evaluate, make_evaluation
from retro_jax.train.inputs import global_batch, local_rows

SPLIT = "validation"


def open_held_out(
    directory: pathlib.Path, config: BatchConfig, training: ChunkDatabase | Batches
) -> Batches:
    """Opens the validation split with the sequences and neighbours a chunk of training.

    Args:
      directory: what launch.prepare has filled. config: of training. training: its chunks, which
        the neighbours are of; written batches do not do.

    Raises:
      UserError: an artefact is missing, damaged or of other parents.
    """
    if not isinstance(training, ChunkDatabase):
        raise UserError(
            f"TrainConfig.evaluate_every is set and {directory} holds batches of the training split "
            "only: expected 0, or --data with what launch.prepare has filled"
        )
    config = dataclasses.replace(config, mixture=None, prefetch=0)
    chunks = ChunkDatabase.open(directory / "chunks" / SPLIT)
    if not config.neighbours:
        return Batches(config, chunks)
    table = NeighbourTable.of(directory, SPLIT, chunks, training)
    return Batches(config, chunks, table, training)


def held_out_evaluation(
    graphdef: nnx.GraphDef, batches: Batches, mesh: Mesh, *, count: int, pad_id: int
) -> Evaluate:
    """Evaluation on the first `count` batches of a split; each process makes its own rows."""
    size = batches.config.batch_size
    rows = local_rows(mesh, size)

    def made() -> Iterator[RetroBatch]:
        for number in range(count):
            yield global_batch(batches.rows(number, rows), mesh, size, rows)

    return make_evaluation(graphdef, made, pad_id)
