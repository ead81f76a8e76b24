"""The training loop. A "step" is one update of the parameters; a skipped batch counts as one.

Resuming, in this order:

    1. the newest undamaged checkpoint gives the state, with it the step t (Checkpoints.restore);
    2. lines of metrics.jsonl after t are dropped (Observer), as those updates are made again;
    3. batches are built from number t on (a batch is a function of the seed and its number);
    4. dropout draws from (seed, t): nothing else is stored, and nothing else is needed.

A run that was killed and started again therefore ends with the same bits as one that was not.
"""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from retro_jax.batch import RetroBatch
from retro_jax.config import require
from retro_jax.model.noise_target import NOISE_TARGETS
from retro_jax.train.checkpoint import Checkpoints
from retro_jax.train.curves import Observer
from retro_jax.train.step import StepMetrics, TrainState, TrainStep
from retro_jax.train.trackers import require_trackers

INITIAL_RETRIEVAL = ("random", "copying", "endings")
INITIAL_ATTENTION = ("random", "endings")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, checkpoints and safeguards of a run.

    Attributes:
      steps: updates of the whole run; the schedule's length. With 0 the first parameters are the model.
      seed: seed of the initial parameters and of dropout.
      initial_retrieval: "random" values of encoder and CCA, or "copying": the first heads of both
        begin as a circuit that copies what follows the same token in a neighbour
        (model/copying_init.py), or "endings": what follows the same last few tokens
        (model/ending_init.py).
      initial_attention: "random" values of the decoder's attention, of a RETRO or a baseline, or
        "endings": its first two layers begin as a circuit that copies what follows the same last few
        tokens in the text so far (model/ending_init.py).
      neighbour_dropout: fraction of the sequences trained without their neighbours.
      noise_target: what is learnt at tokens that read another chunk's neighbours
        (BatchConfig.neighbour_noise): the "text", or "off", what the model predicts without neighbours
        (model/noise_target.py).
      noise_weight: what the gradients at these tokens are multiplied by, with noise_target "off".
      noise_unlearning: with "off", how much of the text's gradients is taken away at these tokens, so that
        what an adapter has learnt of the corpus is unlearnt. Too much makes random neighbours costly.
      log_every: steps per line of metrics.jsonl.
      checkpoint_every: steps between checkpoints, a multiple of log_every, so that a resumed curve
        has the same lines; the last step always has one.
      keep: how many of the newest checkpoints are kept.
      keep_every: checkpoints at multiples of it are kept for ever; 0 for none.
      accumulate: parts in which a batch is computed, one after the other, for less memory.
      average_decay: decay of a moving average of the parameters, as in 0.9999; checkpoints contain
        it beside them. 0 for none.
      loss_jump: nats by which a step's loss may exceed the mean of the last 100 or so before the run
        stops; 0 for any.
      skip_bad_batches: leave out the update of a batch whose loss jumps or is not finite, and
        continue; ten of them in a row stop the run even so.
      evaluate_every: steps between evaluations on the validation split, a multiple of log_every; 0
        for none.
      evaluate_batches: batches of the validation split that are scored.
      layer_norms: whether curves have the norms of gradients and parameters of every layer.
      trackers: where curves go beside metrics.jsonl: "tensorboard", "wandb" (Weights & Biases).
      hang_seconds: how long one of several processes may wait before it gives up; 0 for ever.
    """

    steps: int
    seed: int = 0
    initial_retrieval: str = "random"
    initial_attention: str = "random"
    neighbour_dropout: float = 0.0
    noise_target: str = "text"
    noise_weight: float = 1.0
    noise_unlearning: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 1000
    keep: int = 3
    keep_every: int = 0
    accumulate: int = 1
    average_decay: float = 0.0
    loss_jump: float = 0.0
    skip_bad_batches: bool = False
    evaluate_every: int = 0
    evaluate_batches: int = 8
    layer_norms: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)
    hang_seconds: float = 1800.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "trackers", tuple(self.trackers))  # gin gives lists
        require_trackers(self.trackers, self)
        require(
            self.steps >= 0, self, "steps", "a number of updates, or 0 for the first parameters"
        )
        for field in ("log_every", "checkpoint_every", "keep"):
            require(getattr(self, field) > 0, self, field, "a positive integer")
        require(self.accumulate > 0, self, "accumulate", "a positive number of parts")
        require(0 <= self.average_decay < 1, self, "average_decay", "a number from 0 to below 1")
        require(self.loss_jump >= 0, self, "loss_jump", "a number of nats, or 0 for any")
        whole = self.evaluate_every >= 0 and self.evaluate_every % self.log_every == 0
        rule = f"a multiple of log_every = {self.log_every}, or 0 for none"
        require(whole, self, "evaluate_every", rule)
        require(self.evaluate_batches > 0, self, "evaluate_batches", "a positive number")
        require(self.hang_seconds >= 0, self, "hang_seconds", "a number of seconds, or 0 for ever")
        require(self.keep_every >= 0, self, "keep_every", "a number of steps, or 0 for none")
        require(0 <= self.seed < 2**32, self, "seed", "an integer from 0 to 2**32 - 1")
        supported = self.initial_retrieval in INITIAL_RETRIEVAL
        require(supported, self, "initial_retrieval", f"one of {INITIAL_RETRIEVAL}")
        supported = self.initial_attention in INITIAL_ATTENTION
        require(supported, self, "initial_attention", f"one of {INITIAL_ATTENTION}")
        alone = self.initial_retrieval == "copying" and self.initial_attention != "random"
        require(not alone, self, "initial_attention", "'random' with initial_retrieval 'copying'")
        valid = 0 <= self.neighbour_dropout <= 1
        require(valid, self, "neighbour_dropout", "a number from 0 to 1")
        known = self.noise_target in NOISE_TARGETS
        require(known, self, "noise_target", f"one of {NOISE_TARGETS}")
        valid = self.noise_weight == 1 or (self.noise_weight > 0 and self.noise_target == "off")
        require(valid, self, "noise_weight", "a positive number; 1 without noise_target 'off'")
        valid = self.noise_unlearning == 0 or (
            self.noise_unlearning > 0 and self.noise_target == "off"
        )
        require(valid, self, "noise_unlearning", "0, or a positive number with noise_target 'off'")
        whole = self.checkpoint_every % self.log_every == 0
        require(whole, self, "checkpoint_every", f"a multiple of log_every = {self.log_every}")


# Settings that may differ when a run resumes: the parameters do not depend on them, or only where the
# run would not continue without.
FREE_SETTINGS = (
    "log_every",
    "checkpoint_every",
    "keep",
    "keep_every",
    "loss_jump",
    "skip_bad_batches",
    "evaluate_every",
    "evaluate_batches",
    "layer_norms",
    "trackers",
    "hang_seconds",
)


class StopRequest:
    """Whether SIGTERM or Ctrl-C has asked this process to stop; a second one stops at once.

    With several processes JAX's preemption service listens to SIGTERM instead, so that all of them
    stop after the same step (Checkpoints.must_stop).
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catches both signals while inside, where signals can be caught: in the main thread."""
        alone = jax.process_count() == 1
        if not alone or threading.current_thread() is not threading.main_thread():
            yield self
            return
        caught = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._note) for number in caught}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self) -> None:
        """Asks from inside the run, as a hook may: it saves and stops after its current step."""
        if jax.process_count() > 1:  # the preemption service makes all processes agree
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = signal.SIGTERM

    def _note(self, number: int, frame: Any) -> None:
        """Notes the first signal."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"\nsaving and stopping after this step; once more to stop at once\n")


@dataclasses.dataclass(frozen=True)
class Hook:
    """A function that the loop calls between steps.

    Attributes:
      every: steps between two calls: it is called after the updates whose number is a multiple.
      call: of the number of updates and the state after them. The next step reuses the state's
        memory: copy (jax.device_get) any array to keep.
      phase: of phases.PHASES, that its time counts as.
    """

    every: int
    call: Callable[[int, TrainState], Any]
    phase: str = "hooks"


def train(
    state: TrainState,
    batches: Iterator[RetroBatch],
    *,
    step: TrainStep,
    config: TrainConfig,
    checkpoints: Checkpoints,
    observer: Observer,
    stop: StopRequest,
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Trains from a state to config.steps, or until it is asked to stop.

    Args:
      state: where to start. batches: global batches, the first of them number state.step.
      step: the compiled train_step. config: steps and intervals.
      checkpoints: where states are saved. observer: where metrics go. stop: asks to stop.
      hooks: called in this order, in every process; they must not change the state.

    Returns:
      The last state, which is saved.

    Raises:
      UserError: a batch is bad (StepMetrics.bad), and is not to be skipped; nothing after it is
        saved.
      OSError: a checkpoint cannot be written.
    """
    pending = None
    during = observer.phases.during

    def observe(number: int, metrics: StepMetrics) -> None:
        with during("device", number):
            measured = jax.device_get(metrics)
        observer.observe(number, measured)

    for number in range(int(state.step) + 1, config.steps + 1):
        observer.begin(number)
        with during("input", number):
            batch = next(batches)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
        # Metrics of the step before are read while this one runs: nothing waits for the device.
        if pending is not None:
            observe(number - 1, pending)
        pending = metrics
        for hook in hooks:
            if number % hook.every == 0:
                with during(hook.phase, number):
                    hook.call(number, state)
        stopping = checkpoints.must_stop(number, stop.signal is not None)
        if stopping or number == config.steps or number % config.checkpoint_every == 0:
            observe(number, pending)  # first: a bad state is not saved
            pending = None
            with during("checkpoint", number):
                checkpoints.save(state)
        if stopping:
            break
    with during("checkpoint", int(state.step)):
        checkpoints.wait()
    return state
