"""Tokens per second of evaluation, and of the forward pass alone, which should be its limit.

    python -m benchmarks.evaluation --preset=peer
    python -m benchmarks.evaluation --preset=172m --rows=8 --output=evaluation.json

Evaluation is the path of launch.evaluate, which reads a chunk database and a neighbour table from
disk. Windows of any documents, half of each context only, form batches, and losses of tokens are put
where they belong. The forward pass is the same compiled program on a batch that is on the devices
already. Both count computed tokens, context included, and take turns; the best turn of each counts.

The tables contain random tokens and neighbours, the worst case for reading. Needs no TensorFlow, ScaNN
or gin.
"""

import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from benchmarks.tables import write_database, write_table
from benchmarks.timing import Turn, best, machine, table, timed, write_json
from benchmarks.training import (
    DTYPE,
    LENGTH,
    NEIGHBOURS,
    OUTPUT,
    POSITIONS,
    PRESET,
    ROWS,
    TURNS,
    Work,
    baseline_of,
    work_from_flags,
)
from launch.common import app
from retro_jax.batch import ChunkText
from retro_jax.evaluate.score import (
    TokenLosses,
    WindowConfig,
    compiled_token_losses,
    score_chunks,
    window_batch,
    windows,
)
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro
from retro_jax.sharding import (
    MESH_SHARDINGS,
    MeshConfig,
    abstract_parameters,
    batch_sharding,
    make_mesh,
    parameter_shardings,
)

BATCHES = flags.DEFINE_integer("batches", 8, "Batches of windows a turn.", lower_bound=1)

__all__ = [
    "DTYPE",
    "LENGTH",
    "NEIGHBOURS",
    "OUTPUT",
    "POSITIONS",
    "PRESET",
    "ROWS",
    "TURNS",
    "main",
]


class Side:
    """A model with its program and the text that it scores.

    Attributes:
      tokens: computed in a turn.
    """

    def __init__(self, work: Work, text: ChunkText):
        self._mesh = make_mesh(MeshConfig())
        self._losses = _program(work, self._mesh)
        chunks = work.sequence_length // work.retro.chunk_length
        self._cut = WindowConfig(chunks, chunks // 2, work.batch_size)
        self._text = text
        plan = windows(len(text.ids), chunks, self._cut.stride)
        self._batches = -(-len(plan) // work.batch_size)
        self.tokens = self._batches * work.batch_size * work.sequence_length
        starts = plan[: work.batch_size, 0]
        batch = window_batch(text, np.resize(starts, work.batch_size), chunks)
        self._batch = jax.device_put(batch, batch_sharding(self._mesh))
        self.forward()  # compiles

    def forward(self) -> Turn:
        """The program alone."""
        with jax.set_mesh(self._mesh):
            return timed(lambda: [self._losses(self._batch) for _ in range(self._batches)])

    def evaluation(self) -> Turn:
        """The whole path."""
        with jax.set_mesh(self._mesh):
            return timed(lambda: score_chunks(self._losses, self._text, self._cut))


def _program(work: Work, mesh: jax.sharding.Mesh) -> TokenLosses:
    """The losses of a model with random parameters."""

    def make() -> Retro:
        return Retro(work.retro, work.execution, shardings=MESH_SHARDINGS, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        graphdef, shapes = abstract_parameters(make)
        draw = np.random.default_rng(1)

        def leaf(shape: Any, sharding: Any) -> jax.Array:
            values = 0.02 * draw.standard_normal(shape.shape, np.float32)
            return jax.device_put(values.astype(shape.dtype), sharding)

        params = jax.tree.map(leaf, shapes, parameter_shardings(shapes, mesh))
        rows = batch_sharding(mesh)
        return compiled_token_losses(
            graphdef, params, place=lambda batch: jax.device_put(batch, rows)
        )


def _text(folder: pathlib.Path, work: Work) -> ChunkText:
    """A text of so many batches, with neighbours from itself, on disk."""
    chunks = work.sequence_length // work.retro.chunk_length
    count = chunks + (chunks // 2) * (BATCHES.value * work.batch_size - 1)
    database = write_database(folder / "chunks", count, 2, work.retro.vocab_size)
    ids_table = write_table(folder / "neighbours", database, work.neighbours)

    def neighbours(ids: np.ndarray) -> np.ndarray:
        near = ids_table.ids(np.maximum(ids, 0), work.neighbours)
        return database.values(np.where(ids[:, None] >= 0, near, -1))

    ids = np.arange(count)
    return ChunkText(ids, database.documents(ids), database.chunks, neighbours, database.pad_id)


def main() -> None:
    """Times, and prints the table."""
    work = work_from_flags()
    with tempfile.TemporaryDirectory() as folder:
        text = _text(pathlib.Path(folder), work)
        without = ChunkText(text.ids, text.documents, text.chunks, None, text.pad_id)
        sides = {"RETRO": Side(work, text), "baseline": Side(baseline_of(work), without)}
        turns: dict[tuple[str, str], list[Turn]] = {}
        for _ in range(TURNS.value):
            for name, side in sides.items():
                turns.setdefault((name, "forward"), []).append(side.forward())
                turns.setdefault((name, "evaluation"), []).append(side.evaluation())
    rows = []
    for name, side in sides.items():
        forward, whole = (best(turns[name, what]) for what in ("forward", "evaluation"))
        rows.append(
            {
                "what": name,
                "forward tokens/s": side.tokens / forward.wall,
                "evaluation tokens/s": side.tokens / whole.wall,
                "share": forward.wall / whole.wall,
                "share by processor": forward.processor / whole.processor,
            }
        )
    settings = {
        "preset": PRESET.value,
        "dtype": work.execution.activation_dtype,
        "rows": work.batch_size,
        "length": work.sequence_length,
        "neighbours": work.neighbours,
        "batches": BATCHES.value,
    }
    print(f"{settings}: {machine()}\n\n{table(rows)}")
    if OUTPUT.value:
        write_json(pathlib.Path(OUTPUT.value), {"machine": machine(), **settings, "table": rows})


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
