"""Prepared data in a bucket: what a training run reads of it, copied to this host's disk."""

import pathlib

from absl import flags

from data_pipelines import revisions, staging, urls
from data_pipelines.batches import BatchConfig
from data_pipelines.manifest import MANIFEST_FILE
from data_pipelines.neighbours import SCORES
from launch import app

STAGE_TO = flags.DEFINE_string(
    "stage_to", None, "Directory on this host's own disk, for copies of --data in a bucket."
)


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
    bucket = staging.Bucket(place)
    with staging.alone(disk) as folder:
        if staging.exists(bucket, ""):
            staging.stage(bucket, "", folder, wanted=lambda name: False)
            return folder
        staging.stage(bucket, "chunks/train", folder)
        revision = 1
        while staging.exists(bucket, database := f"{_inside(revision)}{revisions.KIND}"):
            staging.stage(bucket, database, folder)
            if staging.exists(bucket, chunks := f"{_inside(revision)}chunks/train"):
                staging.stage(bucket, chunks, folder)
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
    bucket = staging.Bucket(place)
    with staging.alone(folder):
        for split in filter(None, ("train", held_out)):
            if split == held_out:
                staging.stage(bucket, f"chunks/{split}", folder)
            if config.neighbours:
                table = f"{_inside(revision)}neighbours/{split}"
                staging.stage(bucket, table, folder, wanted=lambda n: not n.startswith(SCORES))


def _inside(revision: int) -> str:
    """A revision's folder in a workdir, with a slash."""
    folder = revisions.folder_of("", revision).as_posix()
    return "" if folder == "." else f"{folder}/"
