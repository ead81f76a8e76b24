"""Training from Python: settings in, a plan that is checked, a run that trains and resumes.

    settings = Settings(retro=RetroConfig(...), training=TrainConfig(steps=1000))
    run = Run("W/retro", make_plan(settings, BatchShape.of(data.batches)), data)
    run.on_metrics(lambda step, metrics: print(step, metrics["loss"]))
    run.every(100, lambda step, state: ...)
    run.train()

`make_plan` and `Run` refuse unfit settings and data before anything is written or allocated. The run's
directory is that of launch.train: checkpoints/, metrics.jsonl, TensorBoard's events.*, config.gin,
parents.json and versions.json. `train` resumes from the newest checkpoint, and ends with the same bits
as an uninterrupted run; loop.py describes the order.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.distributed import processes
from retro_jax.errors import LOST, SharedError, UserError
from retro_jax.model import Retro
from retro_jax.model.flops import training_flops
from retro_jax.retrofit import context_length
from retro_jax.retrofit.kept_states import KeptBatches, kept_of
from retro_jax.train import loop, record, step, trained_model
from retro_jax.train.bad_batches import BadBatches, describe_documents
from retro_jax.train.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    check_path,
    find_damage,
    latest_step,
)
from retro_jax.train.continuation import longer
from retro_jax.train.curves import Observer, Watched
from retro_jax.train.global_batches import BatchShape, BatchSource, batches_from
from retro_jax.train.held_out import evaluation_hook, held_out_evaluation
from retro_jax.train.loop import Hook, StopRequest
from retro_jax.train.optimizer import learning_rate
from retro_jax.train.plan import Plan, Settings, make_plan, run_parents
from retro_jax.train.trackers import check_trackers
from retro_jax.train.utilisation import Machine, Profile, peak_flops
from retro_jax.train.warm_start import (
    begin,
    begin_with_base,
    complete_with_base,
)
from retro_jax.train.watchdog import Watchdog

__all__ = ["FREE", "Plan", "Run", "RunData", "Settings", "make_plan"]

# Settings that may differ when a run resumes: the numbers do not depend on them.
FREE = (
    "ExecutionConfig",
    "MeshConfig",
    "BatchConfig.prefetch",
    "StartConfig.base",  # parents.json has the hashes of both
    "StartConfig.adapter",
    *(f"TrainConfig.{field}" for field in loop.FREE_SETTINGS),
)


class RunData(Protocol):
    """The data of a run, as data_pipelines' TrainingData gives it."""

    @property
    def batches(self) -> BatchSource:
        """Of the training split."""

    @property
    def parents(self) -> Mapping[str, str]:
        """Hashes of the artefacts that the batches depend on, by name; the run records them."""

    @property
    def source(self) -> str:
        """Where the data is, for the record."""

    def held_out(self) -> BatchSource:
        """Batches of the validation split."""

    def check_model(self, retro: RetroConfig) -> None:
        """Raises a UserError where a model does not fit the data's tokens and chunks."""


class Run:
    """A training run in a directory: started, resumed and watched.

    Attributes:
      directory: the run's. plan: as make_plan gave it. data: that it trains on.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        plan: Plan,
        data: RunData,
        *,
        profile: tuple[int, int] | None = None,
        on_hang: Callable[[str], Any] | None = None,
        open_checkpoints: Callable[..., Any] = Checkpoints,
    ):
        """Opens the data that is still closed; writes nothing.

        Args:
          directory: of the run; created when it begins.
          plan: of the run. data: that it trains on.
          profile: first and last step that are traced, into the run's folder `profile`.
          on_hang: called with the reason, by another thread, when this process has waited longer than
            TrainConfig.hang_seconds for the others; must not return. None ends the process with
            status 76.
          open_checkpoints: opens its checkpoints, as Checkpoints does; BucketWorkdir.checkpoints gives
            one for a run in a bucket.

        Raises:
          UserError: the plan is for other batches, the model does not fit the data, or there are no
            held-out batches to evaluate on.
        """
        self.directory, self.plan, self.data = pathlib.Path(directory), plan, data
        shape = BatchShape.of(data.batches)
        if shape != plan.shape:
            raise UserError(f"the plan is for {plan.shape}: expected the data's {shape}")
        data.check_model(plan.settings.retro)
        check_trackers(plan.settings.training.trackers)
        self._profile, self._on_hang = profile, on_hang or _end_process
        self._open_checkpoints = open_checkpoints
        self._on_metrics: list[Callable[[int, Mapping[str, float]], Any]] = []
        self._hooks: list[Hook] = []
        self._finished: bool | None = None  # as claim found it, for the next train
        self._evaluate = None
        settings, training = plan.settings, plan.settings.training
        kept = settings.execution.kept_states
        self._kept = kept_of(self.directory, settings.start.base, settings.retro, kept)
        if training.evaluate_every:
            self._evaluate = held_out_evaluation(
                plan.graphdef,
                self._with_kept(data.held_out()),
                plan.mesh,
                count=training.evaluate_batches,
                pad_id=plan.settings.retro.pad_id,
            )

    def on_metrics(self, call: Callable[[int, Mapping[str, float]], Any]) -> None:
        """Calls call(step, metrics) for every line of metrics.jsonl, in every process.

        curves.py lists the names of the metrics. `step` counts the updates made so far.
        """
        self._on_metrics.append(call)

    def every(self, steps: int, call: Callable[[int, step.TrainState], Any]) -> None:
        """Calls call(step, state) after each update whose number is a multiple of `steps`.

        It is called in every process. The next step reuses the state's memory: copy (with
        jax.device_get) any array to keep.

        Raises:
          UserError: steps is not positive.
        """
        if steps < 1:
            raise UserError(f"a hook every {steps} steps: expected a positive number")
        self._hooks.append(Hook(steps, call))

    def claim(self) -> bool:
        """Records the run's settings and data in its directory; `train` does so by itself.

        Returns:
          Whether the run is trained to its end.

        Raises:
          UserError: the directory belongs to a run of other settings or data; says which.
        """
        self._finished = bool(processes.from_first(self._claim))
        return self._finished

    def train(self, stop: StopRequest | None = None) -> int:
        """Trains from the newest checkpoint, or from the first state, to TrainConfig.steps.

        Args:
          stop: asks the run to save and stop; its caller listens to signals. None for one of its own,
            which SIGTERM and Ctrl-C reach where this is the main thread.

        Returns:
          The step that was reached and saved.

        Raises:
          UserError: the directory belongs to another run, a checkpoint to another model, or a batch
            is bad; nothing after it is saved.
          LostPeerError: another process of the run was lost.
          OSError: a checkpoint cannot be written.
        """
        finished = self.claim() if self._finished is None else self._finished
        self._finished = None
        if finished:
            return self.plan.settings.training.steps
        with contextlib.ExitStack() as outer:
            stop = stop or outer.enter_context(StopRequest().listening())
            outer.enter_context(processes.noticing_loss())
            stack = outer.enter_context(contextlib.ExitStack())
            processes.connect(self.plan.mesh)
            return self._train(stop, stack)

    def model(self, *, averaged: bool = False) -> Retro:
        """The trained model, as the newest checkpoint has it, on the first device.

        Args:
          averaged: whether with the moving average of its parameters (TrainConfig.average_decay).

        Raises:
          UserError: there is no undamaged checkpoint, or it has no average.
        """
        settings = self.plan.settings
        _, graphdef, params = trained_model.load_model(
            self.directory / CHECKPOINTS,
            settings.retro,
            settings.execution,
            averaged=averaged,
            base=settings.start.base,
        )
        return nnx.merge(graphdef, params)

    def _claim(self) -> str:
        """`claim` in the first process; not empty where the run is trained to its end."""
        checkpoints, settings = self.directory / CHECKPOINTS, self.plan.settings
        check_path(checkpoints.absolute())
        reached, steps = latest_step(checkpoints), settings.training.steps
        configs = [getattr(settings, field.name) for field in dataclasses.fields(settings)]
        configs.append(self.data.batches.config)
        record.claim(
            self.directory,
            record.settings_text(configs),
            parents=run_parents(settings, self.data.parents),
            free=(*FREE, *longer(self.directory, settings.optimizer, steps)),
            defaults=record.default_settings(configs),
            begun=reached is not None,
            data=self.data.source,
        )
        return "yes" if reached == steps and not find_damage(checkpoints / str(steps)) else ""

    def _train(self, stop: StopRequest, stack: contextlib.ExitStack) -> int:
        """`train` of a run that is not finished, with what has to be closed on a stack."""
        plan, training = self.plan, self.plan.settings.training
        checkpoints = self._open_checkpoints(
            self.directory / CHECKPOINTS,
            keep=training.keep,
            keep_every=training.keep_every,
            left_out=plan.left_out,
        )

        def close(kind: type[BaseException] | None, *_: Any) -> None:
            # After an error of its own the others may be gone, and closing would wait for them.
            if kind is None or issubclass(kind, SharedError) or jax.process_count() == 1:
                checkpoints.close()

        stack.push(close)
        state = self._begin(checkpoints)
        start = int(state.step)
        if processes.is_first():
            print("\n".join(self._summary(start)))
        if not training.steps:
            checkpoints.save(state)
            checkpoints.wait()
            return start
        observer = self._observer(start)
        stack.callback(observer.close)
        stack.enter_context(Watchdog(observer.phases, training.hang_seconds, self._on_hang))
        stack.enter_context(jax.set_mesh(plan.mesh))
        state = loop.train(
            state,
            stack.enter_context(batches_from(self._with_kept(self.data.batches), plan.mesh, start)),
            step=plan.step,
            config=training,
            checkpoints=checkpoints,
            observer=observer,
            stop=stop,
            hooks=[*self._evaluations(observer), *self._hooks],
        )
        return int(state.step)

    def _begin(self, checkpoints: Checkpoints) -> step.TrainState:
        """The newest checkpoint, or the first state, with another run's parameters if so set."""
        settings = self.plan.settings
        state = checkpoints.restore(self.plan.abstract)
        if state is not None:
            with jax.set_mesh(self.plan.mesh):
                return complete_with_base(settings.start, state, settings.retro)
        with jax.set_mesh(self.plan.mesh):
            state = self.plan.first_state()
            start = self.plan.settings.start
            if start.base:
                return begin_with_base(start, state, self.plan.settings.retro)
            if start.run:
                checkpoints_of_other = pathlib.Path(start.run) / CHECKPOINTS
                return begin(start, state, checkpoints_of_other, self.plan.settings.retro)
        return state

    def _with_kept(self, batches: BatchSource) -> BatchSource:
        """Batches with what is kept of them, where something is."""
        return batches if self._kept is None else KeptBatches(batches, self._kept)

    def _evaluations(self, observer: Observer) -> list[Hook]:
        """The evaluation on held-out batches, where it is set."""
        if self._evaluate is None:
            return []
        every = self.plan.settings.training.evaluate_every
        return [evaluation_hook(self._evaluate, every, observer.note)]

    def _observer(self, start: int) -> Observer:
        """The run's curves, from a step on."""
        training, batches = self.plan.settings.training, self.data.batches
        describe = functools.partial(describe_documents, self.directory, batches)
        profile = Profile(self.directory / "profile", *self._profile) if self._profile else None
        return Observer(
            self.directory,
            corpora=batches.corpora,
            learning_rate=learning_rate(self.plan.settings.optimizer, training.steps),
            start_step=start,
            steps=training.steps,
            log_every=training.log_every,
            watched=Watched(
                BadBatches(training.skip_bad_batches, describe),
                _machine(self.plan),
                profile,
                self._on_metrics,
                training.trackers,
            ),
        )

    def _summary(self, start: int) -> list[str]:
        """Lines about the training that begins."""
        retro, shape = self.plan.settings.retro, self.plan.shape
        kind = "RETRO" if retro.has_retrieval else "baseline"
        device = f"{self.plan.mesh.size} {jax.devices()[0].device_kind} devices"
        sequences = self.data.batches.sequences.items()
        corpora = ", ".join(f"{name} {count:,}" for name, count in sequences)
        tokens = f"{shape.batch_size} x {shape.sequence_length} tokens a step"
        lines = [
            f"{kind} of {retro.num_parameters():,} parameters on {device}",
            f"sequences an epoch: {corpora}; {tokens}; the first one compiles",
        ]
        base = self.plan.settings.start.base
        if base and shape.sequence_length > (longest := context_length(base)):
            lines.append(
                f"{shape.sequence_length} tokens: {base} was trained with {longest} at most"
            )
        if self._kept is not None:
            lines.append(self._kept.summary())
        if start:
            lines.append(f"going on from step {start} of {self.plan.settings.training.steps}")
        return lines


def _machine(plan: Plan) -> Machine:
    """The costs of a step, and the peak of the devices."""
    shape, devices = plan.shape, jax.devices()
    flops = training_flops(plan.settings.retro, shape.sequence_length, shape.neighbours)
    return Machine(flops * shape.batch_size, len(devices), peak_flops(devices[0].device_kind))


def _end_process(reason: str) -> None:
    """Ends a process that hangs, or waits for one that does."""
    message = f"error: {reason}; start all processes again, and the run resumes"
    print(message, file=sys.stderr, flush=True)
    os._exit(LOST)
