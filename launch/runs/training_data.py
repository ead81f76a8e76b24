"""What a run trains and is evaluated on: opened in a workdir, or copied from a bucket."""

import dataclasses
import pathlib

from absl import flags

from data_pipelines.artefacts import bucket_copy
from data_pipelines.artefacts.manifest import MANIFEST_FILE
from data_pipelines.batches.batches import BatchConfig, Batches
from data_pipelines.batches.materialised import MaterialisedBatches
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever import revisions
from data_pipelines.retriever.neighbours import SCORES, NeighbourTable
from data_pipelines.workdir.preparation import parents_of
from launch.common import app, configurables
from launch.runs import record, training_data
from retro_jax.errors import UserError
from retro_jax.storage import files, urls
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step
from retro_jax.train.loop import TrainConfig

HELD_OUT = "validation"
STAGE_TO = flags.DEFINE_string(
    "stage_to", None, "Directory on this host's own disk, for copies of --data in a bucket."
)


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
    chunks = ChunkDatabase.open(directory / "chunks" / HELD_OUT)
    if not config.neighbours:
        return Batches(config, chunks)
    table = NeighbourTable.of(directory, HELD_OUT, chunks, training)
    return Batches(config, chunks, table, training)


def local_databases(place: str) -> pathlib.Path:
    """Where data lies on this host: the directory itself, or the copy of a workdir in a bucket.

    Chunks of the retrieval database are copied, of all its revisions; of W/materialised only the
    manifest, as its files follow when they are read.

    Args:
      place: a directory, or a url.

    Raises:
      flags.Error: a url, and no --stage_to.
      UserError: something is missing or damaged there.
    """
    if not urls.is_url(place):
        return pathlib.Path(place)
    disk = app.required(STAGE_TO, f"a directory on this host's own disk, as {place} is in a bucket")
    bucket = bucket_copy.Bucket(place)
    with bucket_copy.alone(disk) as folder:
        if bucket_copy.exists(bucket, ""):
            bucket_copy.stage(bucket, "", folder, wanted=lambda name: False)
            return folder
        bucket_copy.stage(bucket, "chunks/train", folder)
        revision = 1
        while bucket_copy.exists(bucket, database := f"{_inside(revision)}{revisions.KIND}"):
            bucket_copy.stage(bucket, database, folder)
            if bucket_copy.exists(bucket, chunks := f"{_inside(revision)}chunks/train"):
                bucket_copy.stage(bucket, chunks, folder)
            revision += 1
    return folder


def stage_tables(
    place: str, folder: pathlib.Path, revision: int | None, config: BatchConfig, held_out: str
) -> None:
    """Copies what else a run reads: the tables of a revision, without their scores.

    Args:
      place, folder: as given to `local_databases`, and what it returned.
      revision: of the database; None for the newest.
      config: which batches the run makes.
      held_out: a split that it evaluates on; "" for none.
    """
    if not urls.is_url(place) or (folder / MANIFEST_FILE).is_file():
        return
    revision = revisions.latest(folder) if revision is None else revision
    bucket = bucket_copy.Bucket(place)
    with bucket_copy.alone(folder):
        for split in filter(None, ("train", held_out)):
            if split == held_out:
                bucket_copy.stage(bucket, f"chunks/{split}", folder)
            if config.neighbours:
                table = f"{_inside(revision)}neighbours/{split}"
                bucket_copy.stage(bucket, table, folder, wanted=lambda n: not n.startswith(SCORES))


def _inside(revision: int) -> str:
    """A revision's folder in a workdir, with a slash."""
    folder = revisions.folder_of("", revision).as_posix()
    return "" if folder == "." else f"{folder}/"


@dataclasses.dataclass(frozen=True)
class Data:
    """The training split.

    Attributes:
      directory: what launch.prepare has filled. database: its chunks. batches: made of them.
      parents: hashes of the artefacts that were opened.
      source: where the directory is a copy from, as in gs://B/W; "" where it is none.
    """

    directory: pathlib.Path
    database: ChunkDatabase | MaterialisedBatches
    batches: Batches
    parents: dict[str, str]
    source: str = ""

    def held_out(self) -> Batches:
        """The validation split, with sequences and neighbours as here."""
        return open_held_out(self.directory, self.batches.config, self.database)


def find_data(source: str, run: pathlib.Path) -> Data:
    """Opens the data of a run, or of the run that it makes again, staged where it is in a bucket."""
    prepared = training_data.local_databases(source)
    revision = recorded_revision(run, prepared)
    if not urls.is_url(source):
        return open_data(prepared, revision)
    held_out = HELD_OUT if configurables.make(TrainConfig).evaluate_every else ""
    training_data.stage_tables(
        source, prepared, revision, configurables.make(BatchConfig), held_out
    )
    return dataclasses.replace(open_data(prepared, revision), source=source)


def recorded_revision(run: pathlib.Path, prepared: pathlib.Path) -> int | None:
    """The revision of the database that a run began with; None where there is no such run yet."""
    path = run / record.PARENTS_FILE
    if latest_step(run / CHECKPOINTS) is None or not path.is_file():
        return None
    if (prepared / MANIFEST_FILE).is_file():  # batches that were written are of one revision
        return None
    digest = files.read_json(path).get("database")
    return 0 if digest is None else revisions.find(prepared, digest)


def open_data(directory: pathlib.Path, revision: int | None = None) -> Data:
    """Opens the training split as BatchConfig asks for it.

    Args:
      directory: what launch.prepare has filled, or its batches, W/materialised.
      revision: of the database; None for the newest.

    Raises:
      UserError: an artefact is missing, damaged or of other parents.
    """
    config = configurables.make(BatchConfig)
    if (directory / MANIFEST_FILE).is_file():  # W/materialised, and not W
        written = MaterialisedBatches.read(directory, config)
        return Data(directory, written, written, written.lineage)
    chunks = revisions.open_database(directory, revision)
    parents = parents_of(directory, chunks)
    if not config.neighbours:
        return Data(directory, chunks, Batches(config, chunks), parents)
    table = NeighbourTable.of(directory, "train", chunks, chunks)
    parents = parents_of(directory, chunks, table)
    return Data(directory, chunks, Batches(config, chunks, table, chunks), parents)
