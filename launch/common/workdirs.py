"""Workdirs as --workdir and --data name them: directories, or places in buckets that are brought here."""

import pathlib

from absl import flags

from data_pipelines.artefacts.bucket_copy import stage_workdir
from launch.common import app
from launch.common.flags import data_directory
from retro_jax.storage import urls
from retro_jax.train.bucket_workdir import BucketWorkdir

# Of these, reading needs the manifests alone.
_LEFT_OUT = ("documents", "duplicates", "leakage", "states")


def open_to_read(data: flags.FlagHolder[str | None]) -> tuple[pathlib.Path, pathlib.Path]:
    """The workdir and its prepared data, here; what is added is copied back after the command.

    Where there are several processes, they have found each other before.

    Args:
      data: the flag --data of the command, which so has it.

    Raises:
      flags.Error: --workdir is missing. UserError: a bucket cannot be read, or has nothing.
    """
    place = app.WORKDIR.value or ""
    if not urls.is_url(place):
        workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
        return workdir, data_directory(data.value or workdir)
    remote = BucketWorkdir(place)
    workdir = remote.bring(must_exist=True)
    app.calls(workdir, place)
    if data.value is None:
        prepared = stage_workdir(place, remote.data, left_out=_LEFT_OUT)
        app.calls(prepared, place)
    else:
        prepared = data_directory(data.value)
    remote.note()
    app.after(remote.update)
    flags.FLAGS["workdir"].value, flags.FLAGS["data"].value = str(workdir), str(prepared)
    return workdir, prepared


def open_to_train(name: str) -> tuple[pathlib.Path, BucketWorkdir | None]:
    """The directory of the run of a name in --workdir; of one in a bucket, what was brought of it.

    Raises:
      flags.Error: --workdir is missing. UserError: the bucket cannot be read.
    """
    place = app.WORKDIR.value or ""
    if not urls.is_url(place):
        return pathlib.Path(app.required(app.WORKDIR, "the directory of the run")), None
    remote = BucketWorkdir(place, "train")
    app.calls(remote.folder, place)
    return remote.bring(), remote
