"""Batches written out: every sequence with its neighbours' tokens, for readers that cannot map files.

Record r of W/materialised is row r % batch_size of step r // batch_size, in integers as narrow as the
chunk database's, one part after the other:

    tokens [N] | targets [N] | documents [C] int32 | corpus int32 | neighbours [C, K, R]

so a record is read by its number alone, and contains the rows that `Batches.rows` would make, bit for bit.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts import bucket_copy
from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.stage import Stage
from data_pipelines.batches.batches import BatchConfig, Batches, neighbour_length
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.retriever.neighbour_table import NeighbourTable
from retro_jax.batch import RetroBatch
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "batches"
RETRIEVED = "neighbours/train"  # in the lineage: what a run without neighbours does not depend on
_SUFFIX = ".array_record"
# Settings that manifests lack where they have these values.
_LATER = {"neighbour_noise": 0.0, "further_neighbours": 0.0}
_BYTES = 256 << 20  # of a file, about


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of a record.

    Attributes:
      sequence_length, neighbours: N and K.
      dtype: of tokens. neighbour_length: R.
    """

    sequence_length: int
    neighbours: int
    dtype: str
    neighbour_length: int = 2 * CHUNK_LENGTH

    @property
    def parts(self) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]:
        """Shape and dtype of tokens, targets, documents, corpus, neighbours."""
        n, chunks = self.sequence_length, self.sequence_length // CHUNK_LENGTH
        token, integer = np.dtype(self.dtype), np.dtype(np.int32)
        retrieved = (chunks, self.neighbours, self.neighbour_length)
        shapes = [((n,), token), ((n,), token), ((chunks,), integer), ((), integer)]
        return (*shapes, (retrieved, token))

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts)

    def encode(self, batch: RetroBatch, row: int) -> bytes:
        """One row of a batch as a record."""
        arrays = [batch.tokens, batch.targets, batch.documents, batch.corpus]
        if batch.neighbours is not None:
            arrays.append(batch.neighbours)
        pairs = zip(arrays, self.parts)
        return b"".join(np.asarray(a[row]).astype(dtype).tobytes() for a, (_, dtype) in pairs)

    def decode(self, records: Sequence[bytes]) -> RetroBatch:
        """Records as the rows of a batch."""
        data = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), self.size)
        arrays, offset = [], 0
        for shape, dtype in self.parts:
            width = math.prod(shape) * dtype.itemsize
            part = np.ascontiguousarray(data[:, offset : offset + width])
            arrays.append(part.view(dtype).reshape(len(records), *shape).astype(np.int32))
            offset += width
        tokens, targets, documents, corpus, neighbours = arrays
        return RetroBatch(
            tokens, targets, documents, corpus, neighbours if self.neighbours else None
        )


def prepare_batches(
    directory: Path,
    config: BatchConfig,
    database: ChunkDatabase,
    table: NeighbourTable | None,
    *,
    steps: int,
    lineage: Mapping[str, str] | None = None,
    runner: Runner = InProcess(),
) -> Manifest:
    """Writes the batches of steps 0 .. steps - 1, or the files that are missing of them.

    Args:
      directory: where they go.
      config: which batches.
      database: the training split, which the table's ids point into too.
      table: its neighbours; None with config.neighbours 0.
      steps: how many batches.
      lineage: what a run that reads them records as the hashes of its data.
      runner: where files are written; the bytes do not depend on it.

    Returns:
      The manifest. Facts: rows, rows_per_file, corpora, sequences, bytes of a record.
    """
    work = WriteFile(files.absolute(directory), config, database, table, steps)
    batches = work.batches()
    parents = {"chunks": (database.manifest, database.directory)}
    if table is not None:
        parents["neighbours"] = (table.manifest, table.directory)
    token_settings = {name: database.manifest.settings[name] for name in ("vocab_size", "pad_id")}
    if config.questions:
        raise UserError(
            f"BatchConfig.questions is {config.questions!r}: expected '', as questions are written already"
        )
    # How far ahead batches are made does not show in them, nor does a setting that came later.
    free = ("prefetch", "questions")
    order = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    order = {k: v for k, v in order.items() if k not in _LATER or v != _LATER[k]}
    stage = Stage(directory, KIND, {"order": order, "steps": steps} | token_settings, parents)
    if stage.done:
        return stage.manifest()
    sizes = [len(rows) for rows in work.files]
    names = [shard_name(KIND, i, _SUFFIX) for i in range(len(sizes))]
    missing = [i for i, name in enumerate(names) if stage.missing([name])]
    run_counted(runner, work, missing, sizes, what="batches", unit="row")
    facts = {
        "rows": sum(sizes),
        "rows_per_file": sizes[0],
        "layout": work.layout,
        "corpora": batches.corpora,
        "sequences": batches.sequences,
        "lineage": dict(lineage or {}),
    }
    return stage.finish(facts, names)


@dataclasses.dataclass(frozen=True)
class WriteFile:
    """Writes one file of records; the fields are those of `prepare_batches`."""

    directory: str
    config: BatchConfig
    database: ChunkDatabase
    table: NeighbourTable | None
    steps: int

    @property
    def layout(self) -> Layout:
        """Of the records."""
        dtype = str(self.database.manifest.settings.get("dtype", "uint32"))
        length = neighbour_length(self.config.neighbour_part)
        return Layout(self.config.sequence_length, self.config.neighbours, dtype, length)

    @property
    def files(self) -> list[range]:
        """The rows of each file."""
        size = self.config.batch_size
        steps = max(1, _BYTES // (self.layout.size * size))
        return [
            range(start * size, min(start + steps, self.steps) * size)
            for start in range(0, self.steps, steps)
        ]

    def batches(self) -> Batches:
        """What is written."""
        return Batches(self.config, self.database, self.table, self.database)

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes file `index`; returns its number of rows."""
        from array_record.python import array_record_module

        stage, rows, size = Stage.attach(self.directory), self.files[index], self.config.batch_size
        batches, name = self.batches(), shard_name(KIND, index, _SUFFIX)

        def write(folder: pathlib.Path) -> None:
            writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1")
            for step in range(rows.start // size, rows.stop // size):
                batch = batches.rows(step)
                for row in range(size):
                    writer.write(self.layout.encode(batch, row))
                report(size)
            writer.close()

        stage.write_files(write)
        return len(rows)


class MaterialisedBatches(Batches):
    """Batches read from their records; `rows` and `iterate` as those of `Batches`.

    Attributes:
      directory, manifest: where they are from.
      vocab_size, pad_id: of their tokens.
      lineage: hashes of the artefacts that a run of them depends on.
    """

    def __init__(self, directory: Path, manifest: Manifest, config: BatchConfig) -> None:
        """Use `read`."""
        self.directory, self.manifest, self.config = pathlib.Path(directory), manifest, config
        self.vocab_size: int = manifest.settings["vocab_size"]
        self.pad_id: int = manifest.settings["pad_id"]
        self.corpora = list(manifest.fact("corpora"))
        self.sequences = dict(manifest.fact("sequences"))
        self.lineage = dict(manifest.fact("lineage"))
        if not config.neighbours:
            self.lineage.pop(RETRIEVED, None)
        self._layout = Layout(**manifest.fact("layout"))
        self._readers: dict[int, Any] = {}

    @classmethod
    def read(
        cls, directory: Path, config: BatchConfig, *, verify: bool = False
    ) -> "MaterialisedBatches":
        """Opens them.

        Raises:
          UserError: none there, damaged, or batches of other settings; it names them.
        """
        manifest = Manifest.open(directory, KIND, verify=verify)
        order = _LATER | manifest.settings["order"]
        for name, value in files.plain(config).items():
            # The first of them are read, or none; of further ones the first would be others.
            most = 0 if order["further_neighbours"] else order["neighbours"]
            fewer = name == "neighbours" and value <= most
            if name in order and order[name] != value and not fewer:
                raise UserError(
                    f"BatchConfig.{name} is {value!r}: expected {order[name]!r}, with which {directory}"
                    " was made"
                )
        return cls(directory, manifest, config)

    def rows(self, step: int, rows: Sequence[int] | None = None) -> RetroBatch:
        """As `Batches.rows`; a UserError past the last step that was written."""
        size, steps = self.config.batch_size, self.manifest.settings["steps"]
        if not 0 <= step < steps:
            raise UserError(
                f"step {step} of {self.directory}: expected one of the {steps} it holds"
            )
        records = [step * size + int(row) for row in (range(size) if rows is None else rows)]
        per_file = self.manifest.fact("rows_per_file")
        batch = self._layout.decode(
            [self._reader(r // per_file).read([r % per_file])[0] for r in records]
        )
        k = self.config.neighbours
        if not k or batch.neighbours is None:
            return batch.without_neighbours()
        return dataclasses.replace(batch, neighbours=batch.neighbours[:, :, :k])

    def _document_id(self, number: int) -> str:
        """Records contain numbers only."""
        return f"number {number} of the chunk database"

    def _reader(self, index: int) -> Any:
        """The open file of some records."""
        if index not in self._readers:
            from array_record.python import array_record_module

            path = bucket_copy.fetch(self.directory, shard_name(KIND, index, _SUFFIX))
            if index + 1 < len(self.manifest.shards):
                bucket_copy.fetch_ahead(self.directory, shard_name(KIND, index + 1, _SUFFIX))
            self._readers[index] = array_record_module.ArrayRecordReader(str(path))
        return self._readers[index]
