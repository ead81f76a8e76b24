"""The data of a run as gin asks for it: opened in a workdir, or copied from a bucket."""

import pathlib

from absl import flags

from data_pipelines.batches.batches import BatchConfig
from data_pipelines.batches.training_data import (
    TrainingData,
    copy_training_data,
    open_training_data,
    revision_of,
)
from launch.common import configurables
from retro_jax.storage import urls
from retro_jax.train.loop import TrainConfig
from retro_jax.train.record import recorded_parents


def find_data(source: str, run: pathlib.Path, *, disk: str | None = None) -> TrainingData:
    """Opens the data of a run, or of the run that it replays.

    Args:
      source: a workdir, or the url of one in a bucket.
      run: the run's directory; where it has begun, its revision of the database is opened.
      disk: a directory of this host for copies from a bucket.

    Raises:
      flags.Error: a url, and no disk.
      UserError: an artefact is missing, damaged or has other parents.
    """
    config = configurables.make(BatchConfig)
    if not urls.is_url(source):
        parents = recorded_parents(run)
        revision = None if parents is None else revision_of(source, parents)
        return open_training_data(source, config, revision)
    if not disk:
        raise flags.Error(
            f"--stage_to is missing: expected a directory on this host's own disk, as {source} is "
            "in a bucket"
        )
    held_out = bool(configurables.make(TrainConfig).evaluate_every)
    return copy_training_data(
        source, config, disk, held_out=held_out, parents=recorded_parents(run)
    )
