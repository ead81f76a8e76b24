"""Trains a RETRO, or the baseline transformer beside it, on prepared data.

    python -m launch.train --gin_file=experiments/quickstart.gin --workdir=W
    python -m launch.train --gin_file=experiments/quickstart.gin --workdir=W --baseline

The data is what launch.prepare left in W (or in --data). The run goes to W/retro or W/baseline:
checkpoints/, metrics.jsonl, TensorBoard's events.*, config.gin and versions.json. Ctrl-C or SIGTERM
saves and stops with status 75; the same command again goes on, and ends with the same bits as an
uninterrupted run.

On many hosts the same command is started on each of them: the processes find each other by Slurm,
GKE or the TPU's metadata (launch.cluster prepares that), or are told where they are:

    python -m launch.train ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

Each reads only the rows of its devices; process 0 writes the curves. W is a directory that all see.
--data may lie in a bucket (gs://B/W): each host copies what it reads of it to --stage_to. The run's
directory is kept in a bucket too by --mirror.

    python -m launch.train --replay=W --workdir=W2

makes the run of W once more from what it recorded, and says whether the losses are the same bits.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import optax
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from data_pipelines.batches.batches import BatchConfig, Batches
from data_pipelines.batches.training_data import TrainingData
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from launch.autopsy import Autopsy
from launch.common import app, configurables
from launch.common.flags import (
    COORDINATOR_ADDRESS,
    DATA,
    NUM_PROCESSES,
    PEER_TIMEOUT,
    PROCESS_ID,
    join_processes,
)
from launch.runs import mirror, replay
from launch.runs.training_data import find_data
from retro_jax.batch import RetroBatch
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.distributed import processes
from retro_jax.errors import SharedError, UserError
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro
from retro_jax.model.attention_kernels import check_attention
from retro_jax.model.copying_init import begin_with_copying
from retro_jax.model.flops import training_flops
from retro_jax.sharding import (
    MESH_SHARDINGS,
    MeshConfig,
    abstract_parameters,
    check_mesh,
    make_mesh,
)
from retro_jax.train import loop, record, step
from retro_jax.train.bad_batches import BadBatches
from retro_jax.train.checkpoint import CHECKPOINTS, Checkpoints, find_damage, latest_step
from retro_jax.train.curves import Observer, Watched
from retro_jax.train.global_batches import global_batches, local_rows
from retro_jax.train.held_out import Evaluate, held_out_evaluation
from retro_jax.train.loop import TrainConfig
from retro_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from retro_jax.train.utilisation import Machine, Profile, parse_steps, peak_flops
from retro_jax.train.warm_start import StartConfig, begin, trainable
from retro_jax.train.watchdog import Watchdog

BASELINE = flags.DEFINE_bool(
    "baseline", False, "Train the transformer of equal decoder, without retrieval, in W/baseline."
)
MIRROR = flags.DEFINE_string(
    "mirror", None, "Place in a bucket that the run's directory is copied to, as in gs://B/runs/W."
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
# What may differ when a run goes on: the numbers do not depend on it.
FREE = (
    "ExecutionConfig",
    "MeshConfig",
    "BatchConfig.prefetch",
    *(f"TrainConfig.{field}" for field in loop.FREE_SETTINGS),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every configuration of a run."""

    retro: RetroConfig
    execution: ExecutionConfig
    optimizer: OptimizerConfig
    training: TrainConfig
    start: StartConfig
    mesh: MeshConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that has been checked and not yet begun.

    Attributes:
      settings: its configurations. mesh: of its devices. optimizer: of all its steps.
      abstract: its state's shapes and shardings. step: the compiled train_step.
      evaluate: what is run now and then, if anything.
    """

    settings: Settings
    mesh: Mesh
    optimizer: optax.GradientTransformation
    abstract: step.TrainState
    step: step.TrainStep
    evaluate: Evaluate | None = None


def main() -> None:
    """Trains, or says that there is nothing left to train."""
    directory = pathlib.Path(app.required(app.WORKDIR, "the directory of the run"))
    join_processes(
        COORDINATOR_ADDRESS.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        peer_timeout=PEER_TIMEOUT.value,
    )
    begun = directory / (BASELINE_RUN if BASELINE.value else RETRO_RUN)
    if told := processes.from_first(lambda: mirror.fetch(begun, MIRROR.value)):
        _say(told)
    prepared = processes.together(lambda: prepare(directory))
    if prepared is None:
        return
    data, plan, run, recorded = prepared
    steps = plan.settings.training.steps
    if processes.from_first(lambda: _claim(run, data, plan.settings)):
        _say(f"{run}: trained already, {steps} steps")
    else:
        stop = loop.StopRequest()
        with stop.listening(), mirror.following(run, MIRROR.value):
            last = train(run, plan, data.batches, stop)
        if last < steps:
            message = f"{run}: stopped and saved at step {last} of {steps}; run it again to go on"
            _say(message, file=sys.stderr)
            sys.exit(app.SAVED)
        _say(f"{run}: trained {steps} steps")
    if recorded is not None:
        _say(processes.from_first(lambda: replay.compare(recorded, run)))


def prepare(
    directory: pathlib.Path,
) -> tuple[TrainingData, Plan, pathlib.Path, pathlib.Path | None] | None:
    """Reads the settings and opens the data; writes nothing. None after --print_config.

    Args:
      directory: W.

    Returns:
      The data, the plan, where the run goes, and the run that it replays.

    Raises:
      UserError: a setting or an artefact is wrong.
    """
    name = BASELINE_RUN if BASELINE.value else RETRO_RUN
    run, source, recorded = directory / name, DATA.value or str(directory), None
    if REPLAY.value is not None:
        given = configurables.GIN_FILE.value
        recorded = replay.find_run(REPLAY.value, name, workdir=str(directory), gin_file=given)
        configurables.load(str(recorded / record.CONFIG_FILE), configurables.GIN_BINDINGS.value)
        source, run = DATA.value or replay.data_place(recorded), directory / recorded.name
    else:
        configurables.load_from_flags()
    if BASELINE.value:
        configurables.override("RetroConfig.cca_layers", ())
        configurables.override("BatchConfig.neighbours", 0)
        configurables.override("TrainConfig.neighbour_dropout", 0.0)
    data = find_data(source, recorded or run, disk=STAGE_TO.value)
    settings = make_settings(data)
    if configurables.PRINT_CONFIG.value:
        _say(configurables.operative_config(), end="")
        return None
    if recorded is not None:
        settled = configurables.operative_config()
        replay.check(recorded, settled, parents=data.parents, free=FREE)
    if PROFILE_STEPS.value is not None:
        _check_profile(PROFILE_STEPS.value, run, settings.training.steps)
    return data, make_plan(settings, data), run, recorded


def _check_profile(steps: str, run: pathlib.Path, end: int) -> None:
    """Refuses to trace steps beyond the end; says so where they were made already, as on a restart."""
    first, last = parse_steps(steps)
    reached = latest_step(run / CHECKPOINTS) or 0
    if last > end:
        raise UserError(f"--profile_steps={steps}: expected steps up to {end}, the last of {run}")
    if first <= reached:
        _say(f"--profile_steps={steps}: no trace, {run} is at step {reached}", file=sys.stderr)


def _claim(run: pathlib.Path, data: TrainingData, settings: Settings) -> str:
    """Makes the run's directory this run's own; says "done" when it is trained to its end."""
    reached, batch = latest_step(run / CHECKPOINTS), data.batches.config
    configs = [*(getattr(settings, field.name) for field in dataclasses.fields(settings)), batch]
    record.claim(
        run,
        record.settings_text(configs),
        parents=data.parents,
        free=FREE,
        defaults=record.default_settings(configs),
        begun=reached is not None,
        data=data.source or str(data.directory.absolute()),
    )
    steps = settings.training.steps
    done = reached == steps and not find_damage(run / CHECKPOINTS / str(steps))
    return "done" if done else ""


def _say(text: str, **options: Any) -> None:
    """Prints a line, in the first process only."""
    if processes.is_first():
        print(text, **options)


def make_settings(data: TrainingData) -> Settings:
    """Builds the configurations, with the vocabulary of the data where gin leaves it open.

    Raises:
      UserError: a setting is wrong, or does not fit the data.
    """
    found = {"vocab_size": data.database.vocab_size, "pad_id": data.database.pad_id}
    retro = configurables.make(RetroConfig, **found)
    found |= {"chunk_length": CHUNK_LENGTH}
    if retro.has_retrieval:
        found |= {"neighbour_length": 2 * CHUNK_LENGTH}
    for field, value in found.items():
        if getattr(retro, field) != value:
            raise UserError(
                f"RetroConfig.{field} is {getattr(retro, field)}: expected {value}, that of "
                f"{data.database.directory}"
            )
    if retro.has_retrieval and not data.batches.config.neighbours:
        raise UserError("BatchConfig.neighbours is 0: expected at least 1, or --baseline")
    return Settings(
        retro=retro,
        execution=configurables.make(ExecutionConfig),
        optimizer=configurables.make(OptimizerConfig),
        training=configurables.make(TrainConfig),
        start=configurables.make(StartConfig),
        mesh=configurables.make(MeshConfig),
    )


def make_plan(settings: Settings, data: TrainingData) -> Plan:
    """Everything that can be known, and refused, before anything is written or allocated.

    Raises:
      UserError: the mesh, the model, the batch and the schedule do not fit together.
    """
    batches, mesh, parts = data.batches, make_mesh(settings.mesh), settings.training.accumulate
    if batches.config.batch_size % parts:
        raise UserError(
            f"TrainConfig.accumulate is {parts}: expected a divisor of the batch size "
            f"{batches.config.batch_size}"
        )
    check_mesh(settings.retro, mesh, batches.config.batch_size // parts)
    check_attention(
        settings.retro,
        settings.execution,
        platform=mesh.devices.flat[0].platform,
        length=batches.config.sequence_length,
    )
    make_model, training = _model_maker(settings), settings.training
    trained = trainable(settings.start, abstract_parameters(make_model)[1])
    optimizer = make_optimizer(settings.optimizer, training.steps, trained)
    config = step.StepConfig(
        pad_id=settings.retro.pad_id,
        num_corpora=len(batches.corpora),
        seed=training.seed,
        neighbour_dropout=training.neighbour_dropout,
        accumulate=training.accumulate,
        loss_jump=training.loss_jump,
        skip_bad_batches=training.skip_bad_batches,
        average_decay=training.average_decay,
    )
    graphdef, abstract = step.abstract_state(make_model, optimizer, mesh, config)
    compiled = step.compile_train_step(
        graphdef=graphdef, optimizer=optimizer, config=config, trainable=trained
    )
    plan = Plan(settings, mesh, optimizer, abstract, compiled)
    if not training.evaluate_every:
        return plan
    count, pad_id = training.evaluate_batches, settings.retro.pad_id
    evaluate = held_out_evaluation(graphdef, data.held_out(), mesh, count=count, pad_id=pad_id)
    return dataclasses.replace(plan, evaluate=evaluate)


def train(run: pathlib.Path, plan: Plan, batches: Batches, stop: loop.StopRequest) -> int:
    """Trains from the newest checkpoint of a run, or from its seed.

    Args:
      run: the run's directory. plan: of the run. batches: of the training split.
      stop: asks the loop to stop.

    Returns:
      The step that was reached and saved.
    """
    with processes.noticing_loss(), contextlib.ExitStack() as stack:
        processes.connect(plan.mesh)
        return _train(run, plan, batches, stop=stop, stack=stack)


def _train(
    run: pathlib.Path,
    plan: Plan,
    batches: Batches,
    *,
    stop: loop.StopRequest,
    stack: contextlib.ExitStack,
) -> int:
    """`train`, with what has to be closed on a stack."""
    training = plan.settings.training
    checkpoints = Checkpoints(run / CHECKPOINTS, keep=training.keep, keep_every=training.keep_every)

    def close(kind: type[BaseException] | None, *_: Any) -> None:
        # After an error of its own the others may be gone, and closing would wait for them.
        if kind is None or issubclass(kind, SharedError) or jax.process_count() == 1:
            checkpoints.close()

    stack.push(close)
    state = checkpoints.restore(plan.abstract)
    if state is None:
        state = step.initial_state(_model_maker(plan.settings), plan.optimizer, plan.abstract)
        if plan.settings.start.run:
            source = pathlib.Path(plan.settings.start.run)
            state = begin(plan.settings.start, state, source / CHECKPOINTS)
    start = int(state.step)
    if processes.is_first():
        _print_summary(plan, batches, start)
    observer = _observer(run, plan.settings, batches, start)
    stack.callback(observer.close)
    stack.enter_context(Watchdog(observer.phases, training.hang_seconds, _give_up))
    stack.enter_context(jax.set_mesh(plan.mesh))
    state = loop.train(
        state,
        stack.enter_context(_global_batches(batches, plan.mesh, start)),
        step=plan.step,
        config=training,
        checkpoints=checkpoints,
        observer=observer,
        stop=stop,
        evaluate=plan.evaluate,
    )
    return int(state.step)


def _observer(run: pathlib.Path, settings: Settings, batches: Batches, start: int) -> Observer:
    """The run's curves, from a step on."""
    training, steps = settings.training, PROFILE_STEPS.value
    return Observer(
        run,
        corpora=batches.corpora,
        learning_rate=learning_rate(settings.optimizer, training.steps),
        start_step=start,
        steps=training.steps,
        log_every=training.log_every,
        watched=Watched(
            BadBatches(training.skip_bad_batches, Autopsy(run, batches)),
            _machine(settings, batches.config),
            Profile(run / "profile", *parse_steps(steps)) if steps else None,
        ),
    )


def _machine(settings: Settings, batches: BatchConfig) -> Machine:
    """What a step costs, and what the devices can do."""
    flops = training_flops(settings.retro, batches.sequence_length, batches.neighbours)
    devices = jax.devices()
    peak = peak_flops(devices[0].device_kind)
    return Machine(flops * batches.batch_size, len(devices), peak)


def _give_up(reason: str) -> None:
    """Ends a process that hangs, or waits for one that does."""
    app.tell(f"{reason}; start all processes again, and the run goes on")
    app.leave(app.LOST)


def _model_maker(settings: Settings) -> Callable[[], Retro]:
    """Builds the run's module on a mesh."""

    def make() -> Retro:
        model = Retro(
            settings.retro,
            settings.execution,
            shardings=MESH_SHARDINGS,
            rngs=nnx.Rngs(settings.training.seed),
        )
        if settings.training.initial_retrieval == "copying":
            begin_with_copying(model)
        return model

    return make


@contextlib.contextmanager
def _global_batches(batches: Batches, mesh: Mesh, start: int) -> Iterator[Iterator[RetroBatch]]:
    """The global batches from a step on, made ahead by a thread that ends with the context."""
    size = batches.config.batch_size
    rows = local_rows(mesh, size)
    hosts = batches.iterate(start, rows)
    assert isinstance(hosts, Generator)
    with contextlib.closing(hosts):
        yield global_batches(hosts, mesh, size, rows)


def _print_summary(plan: Plan, batches: Batches, start: int) -> None:
    """Says what is about to be trained."""
    retro, config = plan.settings.retro, batches.config
    kind = "RETRO" if retro.has_retrieval else "baseline"
    device = f"{plan.mesh.size} {jax.devices()[0].device_kind} devices"
    corpora = ", ".join(f"{name} {count:,}" for name, count in batches.sequences.items())
    print(f"{kind} of {retro.num_parameters():,} parameters on {device}")
    tokens = f"{config.batch_size} x {config.sequence_length} tokens a step"
    print(f"sequences an epoch: {corpora}; {tokens}; the first one compiles")
    if start:
        print(f"going on from step {start} of {plan.settings.training.steps}")


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
