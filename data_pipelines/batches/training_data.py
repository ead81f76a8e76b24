"""The data of a training run, opened in a prepared workdir or copied from a bucket.

data = open_training_data(W, BatchConfig(sequence_length=512, batch_size=8))
data.batches.rows(0)        the first global batch
data.parents                hashes of the artefacts, which a run records
data.held_out()             batches of the validation split
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from data_pipelines.artefacts import bucket_copy
from data_pipelines.artefacts.manifest import MANIFEST_FILE, PURGED_FILE, Manifest, Path
from data_pipelines.batches.batches import BatchConfig, Batches, check_neighbour_length
from data_pipelines.batches.materialised import RETRIEVED, MaterialisedBatches
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.questions.prepared import QuestionBatches
from data_pipelines.retriever import revisions
from data_pipelines.retriever.neighbour_table import SCORES, NeighbourTable
from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.storage import files

HELD_OUT = "validation"
_DATABASE = "database"  # in the lineage: a revision after the first


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The training split.

    Attributes:
      directory: what launch.prepare has filled. database: its chunks. batches: made of them.
      parents: hashes of the artefacts that were opened.
      source: where it was opened: the absolute path, or as in gs://B/W where the directory is a copy.
    """

    directory: pathlib.Path
    database: ChunkDatabase | MaterialisedBatches | QuestionBatches
    batches: Batches
    parents: dict[str, str]
    source: str

    @property
    def vocab_size(self) -> int:
        """V, of its tokens."""
        return self.database.vocab_size

    @property
    def pad_id(self) -> int:
        """The token of padding."""
        return self.database.pad_id

    def check_model(self, retro: RetroConfig) -> None:
        """Refuses a model that does not fit the tokens, chunks and neighbours.

        Raises:
          UserError: names the setting and the value that fits.
        """
        expected = {
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "chunk_length": CHUNK_LENGTH,
        }
        for field, value in expected.items():
            if getattr(retro, field) != value:
                raise UserError(
                    f"RetroConfig.{field} is {getattr(retro, field)}: expected {value}, that of "
                    f"{self.database.directory}"
                )
        if retro.has_retrieval:
            check_neighbour_length(self.batches.config, retro)
        if retro.has_retrieval and not self.batches.config.neighbours:
            raise UserError(
                "BatchConfig.neighbours is 0: expected at least 1, or a model without cca_layers "
                "(--baseline)"
            )

    def held_out(self) -> Batches:
        """The validation split, with the sequences and neighbours per chunk of training.

        Raises:
          UserError: an artefact is missing, damaged or of other parents, or the directory contains
            written batches only.
        """
        if isinstance(self.database, QuestionBatches):
            raise UserError(
                f"TrainConfig.evaluate_every is set and {self.database.directory} holds training"
                " questions only: expected 0, and launch.answer afterwards"
            )
        if not isinstance(self.database, ChunkDatabase):
            raise UserError(
                f"TrainConfig.evaluate_every is set and {self.directory} holds batches of the training "
                "split only: expected 0, or --data with what launch.prepare has filled"
            )
        config = dataclasses.replace(
            self.batches.config,
            mixture=None,
            prefetch=0,
            neighbour_noise=0.0,
            further_neighbours=0.0,
        )
        chunks = ChunkDatabase.open(self.directory / "chunks" / HELD_OUT)
        if not config.neighbours:
            return Batches(config, chunks)
        table = NeighbourTable.of(self.directory, HELD_OUT, chunks, self.database)
        return Batches(config, chunks, table, self.database)


def open_training_data(
    workdir: Path, config: BatchConfig, revision: int | None = None
) -> TrainingData:
    """Opens the training split.

    Args:
      workdir: what launch.prepare has filled, or its batches, W/materialised.
      config: which batches are made of it.
      revision: of the database; None for the newest.

    Raises:
      UserError: an artefact is missing, damaged or of other parents.
    """
    directory = pathlib.Path(workdir)
    source = str(directory.absolute())
    if (directory / MANIFEST_FILE).is_file():  # W/materialised, and not W
        written = MaterialisedBatches.read(directory, config)
        return TrainingData(directory, written, written, written.lineage, source)
    if config.questions:
        questions = QuestionBatches.read(directory, config)
        return TrainingData(directory, questions, questions, questions.lineage, source)
    chunks, table = revisions.open_database(directory, revision), None
    if config.neighbours:
        table = NeighbourTable.of(directory, "train", chunks, chunks)
    batches = Batches(config, chunks, table, None if table is None else chunks)
    return TrainingData(directory, chunks, batches, parents_of(directory, chunks, table), source)


def parents_of(
    directory: pathlib.Path, database: ChunkDatabase, table: NeighbourTable | None = None
) -> dict[str, str]:
    """The hashes that a training run records of the data it reads.

    Of a compaction those of the revision that was compacted, as both give the same batches.
    """
    same_as = revisions.compacted(database.manifest)
    parents = {"chunks/train": Manifest.read(directory / "chunks" / "train").hash}
    if database.manifest.revision:
        manifest = database.manifest
        parents[_DATABASE] = manifest.parents["previous"] if same_as else manifest.hash
    if table is not None:
        manifest = table.manifest
        parents[RETRIEVED] = manifest.parents["base"] if same_as else manifest.hash
    return parents


def revision_of(workdir: Path, parents: Mapping[str, str]) -> int | None:
    """The revision of the database that a run recorded; None where it read written batches.

    Args:
      workdir: as for `open_training_data`. parents: as the run recorded them.

    Raises:
      UserError: the workdir does not contain that revision.
    """
    directory = pathlib.Path(workdir)
    if (directory / MANIFEST_FILE).is_file():  # written batches belong to one revision
        return None
    digest = parents.get(_DATABASE)
    return revisions.readable(directory, 0 if digest is None else revisions.find(directory, digest))


def copy_databases(place: str, disk: Path) -> pathlib.Path:
    """Copies the chunks of a workdir in a bucket, of all revisions of its database.

    Of W/materialised only the manifest is copied, as its files follow when they are read.

    Args:
      place: url of the workdir. disk: a directory on this host's own disk.

    Returns:
      The copy.

    Raises:
      UserError: something is missing or damaged there.
    """
    bucket = bucket_copy.Bucket(place)
    with bucket_copy.alone(str(disk)) as folder:
        if bucket_copy.exists(bucket, ""):
            bucket_copy.stage(bucket, "", folder, wanted=lambda name: False)
            return folder
        _copy_chunks(bucket, "chunks/train", folder)
        revision = 1
        while bucket_copy.exists(bucket, database := f"{_inside(revision)}{revisions.KIND}"):
            bucket_copy.stage(bucket, database, folder)
            if bucket_copy.exists(bucket, chunks := f"{_inside(revision)}chunks/train"):
                _copy_chunks(bucket, chunks, folder)
            revision += 1
    return folder


def _copy_chunks(bucket: bucket_copy.Bucket, place: str, folder: pathlib.Path) -> None:
    """Copies a chunk database; of a purged one the manifest and the mark."""
    mark = bucket.read(f"{place}/{PURGED_FILE}")
    bucket_copy.stage(bucket, place, folder, wanted=lambda name: mark is None)
    if mark is not None:
        files.write_atomically(folder / place / PURGED_FILE, mark)


def copy_tables(
    place: str,
    folder: pathlib.Path,
    revision: int | None,
    config: BatchConfig,
    *,
    held_out: bool = False,
) -> None:
    """Copies what else a run reads: the tables of a revision, without their scores.

    Args:
      place, folder: as given to `copy_databases`, and what it returned.
      revision: of the database; None for the newest.
      config: which batches the run makes.
      held_out: whether the run evaluates on the validation split.
    """
    if (folder / MANIFEST_FILE).is_file():
        return
    revision = revisions.latest(folder) if revision is None else revision
    bucket = bucket_copy.Bucket(place)
    with bucket_copy.alone(str(folder)):
        if held_out:
            bucket_copy.stage(bucket, f"chunks/{HELD_OUT}", folder)
        for split in ("train", HELD_OUT) if held_out else ("train",):
            if config.neighbours:
                table = f"{_inside(revision)}neighbours/{split}"
                bucket_copy.stage(bucket, table, folder, wanted=lambda n: not n.startswith(SCORES))


def copy_training_data(
    url: str, config: BatchConfig, disk: Path, *, held_out: bool, parents: Mapping[str, str] | None
) -> TrainingData:
    """Copies what a run reads from a bucket to this host's disk, and opens it.

    Args:
      url: of a workdir, or of its batches. config: which batches the run makes.
      disk: a directory on this host's own disk.
      held_out: whether the run evaluates on the validation split.
      parents: as an earlier start of the run recorded them; None for the newest revision.

    Raises:
      UserError: something is missing or damaged there.
    """
    if config.questions:
        raise UserError(
            f"BatchConfig.questions is {config.questions!r}: expected '' with data in a bucket ({url})"
        )
    folder = copy_databases(url, disk)
    revision = None if parents is None else revision_of(folder, parents)
    copy_tables(url, folder, revision, config, held_out=held_out)
    return dataclasses.replace(open_training_data(folder, config, revision), source=url)


def _inside(revision: int) -> str:
    """A revision's folder in a workdir, with a slash."""
    folder = revisions.folder_of("", revision).as_posix()
    return "" if folder == "." else f"{folder}/"
