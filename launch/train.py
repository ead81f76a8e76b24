"""Trains a RETRO, or the baseline transformer beside it, on prepared data.

    python -m launch.train --gin_file=experiments/quickstart.gin --workdir=W
    python -m launch.train --gin_file=experiments/quickstart.gin --workdir=W --baseline

The data comes from launch.prepare, in W (or in --data). The run goes to W/retro or W/baseline:
checkpoints/, metrics.jsonl, TensorBoard's events.*, config.gin and versions.json. Ctrl-C or SIGTERM
saves and stops with status 75; the same command again resumes, and ends with the same bits as an
uninterrupted run.

On many hosts the same command is started on each of them: the processes find each other by Slurm,
GKE or the TPU's metadata (launch.cluster prepares that), or by flags:

    python -m launch.train ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

Each reads only the rows of its devices; process 0 writes the curves. W is a directory that all see, or
a place in a bucket (gs://B/W, s3://B/W): nothing else is needed to resume on other hosts. --data may be
in a bucket too: each host copies the files that it reads (to --stage_to).

    python -m launch.train --replay=W --workdir=W2

repeats the run of W from its record, and says whether the losses are the same bits.
"""

import contextlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from data_pipelines.artefacts.bucket_copy import Bucket
from data_pipelines.batches.training_data import TrainingData
from launch.common import app, configurables, workdirs
from launch.common.flags import (
    COORDINATOR_ADDRESS,
    DATA,
    NUM_PROCESSES,
    PEER_TIMEOUT,
    PROCESS_ID,
    join_processes,
)
from launch.runs.replay import data_place, find_run
from launch.runs.settings import make_settings
from launch.runs.training_data import find_data
from retro_jax.compiler import be_deterministic
from retro_jax.distributed import processes
from retro_jax.errors import UserError
from retro_jax.host_memory import keep_freed_memory
from retro_jax.train import mirror, record, replay
from retro_jax.train.bucket_workdir import BucketWorkdir
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.loop import StopRequest
from retro_jax.train.plan import Settings, make_plan, run_parents
from retro_jax.train.run import FREE, Run
from retro_jax.train.utilisation import parse_steps

BASELINE = flags.DEFINE_bool(
    "baseline", False, "Train the transformer of equal decoder, without retrieval, in W/baseline."
)
MIRROR = flags.DEFINE_string(
    "mirror", None, "Place in a bucket that the run's directory is copied to, as in gs://B/runs/W."
)
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "On GPUs: kernels that give the same bits at every run."
)
REPLAY = flags.DEFINE_string(
    "replay", None, "A workdir, or a run in it, to make again from what it recorded."
)
STAGE_TO = flags.DEFINE_string(
    "stage_to", None, "Directory on this host's own disk, for copies of --data in a bucket."
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "Trace these steps, as in 100:102, into the run's folder `profile`."
)

RETRO_RUN, BASELINE_RUN = "retro", "baseline"


SettingsOf = Callable[[TrainingData], Settings]


def main() -> None:
    """Trains, or says that there is nothing left to train."""
    train(BASELINE_RUN if BASELINE.value else RETRO_RUN, settings_of_data)


def train(name: str, settings_of: SettingsOf, on_loaded: Callable[[], Any] = lambda: None) -> None:
    """Trains the run of a name in --workdir, as the flags ask.

    Args:
      name: RETRO_RUN or BASELINE_RUN.
      settings_of: gives the run's settings, once gin and the data are there.
      on_loaded: called once gin is there; may bind what it leaves open.
    """
    if DETERMINISTIC.value:
        be_deterministic()
    join_processes(
        COORDINATOR_ADDRESS.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        peer_timeout=PEER_TIMEOUT.value,
    )
    directory, remote = processes.together(lambda: workdirs.open_to_train(name))
    if remote is not None and MIRROR.value is not None:
        raise flags.Error("--mirror: expected none with a --workdir in a bucket")
    bucket = Bucket(MIRROR.value) if MIRROR.value is not None else None
    if line := processes.from_first(lambda: mirror.fetch(directory / name, bucket)):
        _say(line)
    prepared = processes.together(lambda: prepare(directory, name, settings_of, remote, on_loaded))
    if prepared is None:
        return
    run, recorded = prepared
    steps = run.plan.settings.training.steps
    place = f"{remote.url}/{name}" if remote else run.directory
    if run.claim():
        _say(f"{place}: trained already, {steps} steps")
    else:
        stop, follow = StopRequest(), remote.following if remote else contextlib.nullcontext
        with stop.listening(), mirror.following(run.directory, bucket), follow():
            last = run.train(stop)
        if last < steps:
            saved = f"stopped and saved at step {last} of {steps}; run it again to go on"
            _say(f"{place}: {saved}", file=sys.stderr)
            sys.exit(app.SAVED)
        _say(f"{place}: trained {steps} steps" if steps else f"{place}: saved as it begins")
    if recorded is not None:
        _say(processes.from_first(lambda: replay.compare(recorded, run.directory)))


def settings_of_data(data: TrainingData) -> Settings:
    """The settings of gin, with those that the data decides."""
    return make_settings(vocab_size=data.vocab_size, pad_id=data.pad_id)


def prepare(
    directory: pathlib.Path,
    name: str,
    settings_of: SettingsOf,
    remote: BucketWorkdir | None = None,
    on_loaded: Callable[[], Any] = lambda: None,
) -> tuple[Run, pathlib.Path | None] | None:
    """Reads the settings and opens the data; writes nothing. None after --print_config.

    Args:
      directory: W. name: of the run in it. settings_of: as in `train`. remote: W in a bucket.
      on_loaded: as in `train`.

    Returns:
      The run, and the directory of the run that it replays.

    Raises:
      UserError: a setting or an artefact is wrong.
    """
    source, recorded = DATA.value or (remote.url if remote else str(directory)), None
    disk = STAGE_TO.value or (str(remote.data) if remote else None)
    if REPLAY.value is not None:
        given = configurables.GIN_FILE.value
        recorded = find_run(REPLAY.value, name, workdir=str(directory), gin_file=given)
        configurables.load(str(recorded / record.CONFIG_FILE), configurables.GIN_BINDINGS.value)
        source, name = DATA.value or data_place(recorded), recorded.name
    else:
        configurables.load_from_flags()
    on_loaded()
    if BASELINE.value:
        configurables.override("RetroConfig.cca_layers", ())
        configurables.override("BatchConfig.neighbours", 0)
        configurables.override("TrainConfig.neighbour_dropout", 0.0)
        configurables.override("TrainConfig.noise_target", "text")
        configurables.override("TrainConfig.noise_weight", 1.0)
        configurables.override("TrainConfig.noise_unlearning", 0.0)
    data = find_data(source, recorded or directory / name, disk=disk)
    settings = settings_of(data)
    data.check_model(settings.retro)
    if configurables.PRINT_CONFIG.value:
        _say(configurables.operative_config(), end="")
        return None
    if recorded is not None:
        text = configurables.operative_config()
        replay.check(recorded, text, parents=run_parents(settings, data.parents), free=FREE)
    profile = _profiled_steps(directory / name, settings.training.steps)
    plan = make_plan(settings, BatchShape.of(data.batches))
    more = {"open_checkpoints": remote.checkpoints(name)} if remote else {}
    return Run(directory / name, plan, data, profile=profile, on_hang=_give_up, **more), recorded


def _profiled_steps(run: pathlib.Path, end: int) -> tuple[int, int] | None:
    """The steps to trace; refuses steps past the end, and says so where they were made already."""
    if PROFILE_STEPS.value is None:
        return None
    first, last = parse_steps(PROFILE_STEPS.name, PROFILE_STEPS.value)
    reached = latest_step(run / CHECKPOINTS) or 0
    flag = f"--{PROFILE_STEPS.name}={PROFILE_STEPS.value}"
    if last > end:
        raise UserError(f"{flag}: expected steps up to {end}, the last of {run}")
    if first <= reached:
        _say(f"{flag}: no trace, {run} is at step {reached}", file=sys.stderr)
    return first, last


def _say(text: str, **options: Any) -> None:
    """Prints a line, in the first process only."""
    if processes.is_first():
        print(text, **options)


def _give_up(reason: str) -> None:
    """Ends a process that hangs, or waits for one that does."""
    app.tell(f"{reason}; start all processes again, and the run goes on")
    app.leave(app.LOST)


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
