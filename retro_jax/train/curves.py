"""Curves of a run: metrics.jsonl, what trackers.py knows beside it, and the progress bar.

A line of metrics.jsonl describes the updates since the line before it:

    step              updates made so far          steps             updates in this line
    loss              nats per token, over them    loss/CORPUS       the same of one corpus
    tokens            targets they had             tokens_per_second, over the last 30 seconds
    grad_norm         their mean, before clipping  param_norm, learning_rate: of the last one
    grad_norm/PLACE, param_norm/PLACE  of the last one, by layer, with TrainConfig.layer_norms
    skipped           bad batches among the steps; their losses count nowhere; absent without any.
                      A line of bad batches alone has neither losses nor norms.
    seconds           of a step, by the clock      seconds/PHASE     of it, as phases.py has them
    mfu               part of the devices' peak    memory/device, memory/host: the most so far, GiB
    goodput           share of the time since the run began that its steps took, at their median:
                      compiling, starting again, lost and skipped steps are the rest
    began             in the first line: when that was, in seconds since 1970
    validation/on, validation/off     nats per token of held-out batches, at steps that evaluate

The files are opened at the step that a run resumes from: later lines are dropped, as those updates
are computed again. A curve therefore never doubles back.
"""

import collections
import dataclasses
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from retro_jax.distributed import processes
from retro_jax.errors import SharedError, UserError
from retro_jax.storage import files
from retro_jax.train.bad_batches import BadBatches
from retro_jax.train.layer_norms import as_values
from retro_jax.train.phases import Phases
from retro_jax.train.step import StepMetrics
from retro_jax.train.trackers import open_trackers
from retro_jax.train.utilisation import Machine, Profile, memory

METRICS_FILE = "metrics.jsonl"
_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0  # between refreshes of the progress bar
_RATE_SECONDS = 30.0  # that tokens_per_second is a mean over
_MOST_SKIPPED = 10  # bad batches one after the other that end a run even where they are skipped
_CLOCKED = ("tokens_per_second", "seconds", "mfu", "memory", "goodput", "began")

_logger = logging.getLogger(__name__)


class Averager:
    """Means over a window of steps. Sums are kept in float64 on the host."""

    def __init__(self, corpora: Sequence[str]):
        self._corpora = corpora
        self._times: collections.deque[tuple[float, int]] = collections.deque()
        self._norms: dict[str, float] = {}
        self._reset()

    def skip(self) -> None:
        """Counts a step whose batch was bad."""
        self._steps += 1
        self._skipped += 1

    def add(self, metrics: StepMetrics) -> None:
        """Adds one step's metrics, NumPy on the host."""
        tokens = int(metrics.tokens)
        self._steps += 1
        self._loss += float(metrics.loss) * tokens
        self._tokens += tokens
        self._grad_norm += float(metrics.grad_norm)
        self._param_norm = float(metrics.param_norm)
        if metrics.grad_norms is not None:
            self._norms = as_values("grad_norm", metrics.grad_norms)
            self._norms |= as_values("param_norm", metrics.param_norms)
        self._corpus_losses += np.asarray(metrics.corpus_losses)
        self._corpus_tokens += np.asarray(metrics.corpus_tokens)
        self._times.append((time.perf_counter(), tokens))
        while self._times[-1][0] - self._times[1 % len(self._times)][0] > _RATE_SECONDS:
            self._times.popleft()

    @property
    def rate(self) -> float | None:
        """Tokens per second over the last steps; None before there are two, as the first compiles."""
        if len(self._times) < 2:
            return None
        seconds = self._times[-1][0] - self._times[0][0]
        return (sum(tokens for _, tokens in self._times) - self._times[0][1]) / max(seconds, 1e-9)

    def flush(self) -> dict[str, float]:
        """The window's means, as the module's docstring names them; begins another window."""
        means = {"loss": self._loss / self._tokens} if self._tokens else {}
        for name, loss, tokens in zip(
            self._corpora, self._corpus_losses, self._corpus_tokens, strict=True
        ):
            if tokens:
                means[f"loss/{name}"] = float(loss) / float(tokens)
        updates = self._steps - self._skipped
        if updates:
            means |= {"grad_norm": self._grad_norm / updates, "param_norm": self._param_norm}
            means |= self._norms
        means |= {"steps": self._steps, "tokens": self._tokens}
        if self._skipped:
            means["skipped"] = self._skipped
        if self.rate is not None:
            means["tokens_per_second"] = self.rate
        self._reset()
        return means

    def _reset(self) -> None:
        """Empties the window."""
        self._steps, self._tokens, self._skipped = 0, 0, 0
        self._loss, self._grad_norm, self._param_norm = 0.0, 0.0, 0.0
        self._norms = {}
        self._corpus_losses: np.ndarray = np.zeros(len(self._corpora), np.float64)
        self._corpus_tokens: np.ndarray = np.zeros(len(self._corpora), np.int64)


class Goodput:
    """The share of a run's time that made progress, over all its starts."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], now: float):
        """Begins, or goes on after the lines of a curve.

        Args:
          lines: of the starts before. now: seconds since 1970, when a new run begins.
        """
        self._began = lines[0].get("began") if lines else now
        self._written = bool(lines)
        self._seconds: list[float] = []
        self._updates = 0
        for line in lines:
            self._count(line)

    def after(self, line: Mapping[str, Any], now: float) -> dict[str, float]:
        """What a new line has of it; nothing in a curve that began without."""
        self._count(line)
        if self._began is None or not self._seconds:
            return {}
        share = self._updates * float(np.median(self._seconds)) / max(now - self._began, 1e-9)
        values = {"goodput": min(share, 1.0)}
        if not self._written:
            values["began"] = self._began
            self._written = True
        return values

    def _count(self, line: Mapping[str, Any]) -> None:
        """Adds a line's steps."""
        if "seconds" in line and "steps" in line:
            self._seconds.append(line["seconds"])
            self._updates += int(line["steps"]) - int(line.get("skipped", 0))


class CurveWriter:
    """Appends to metrics.jsonl and to trackers."""

    def __init__(
        self,
        directory: str | os.PathLike,
        start_step: int,
        trackers: Sequence[str] = ("tensorboard",),
    ):
        """Opens the files of a run that has made `start_step` updates.

        Args:
          directory: the run's. start_step: lines after it are dropped. trackers: by name.
        """
        self._path = pathlib.Path(directory) / METRICS_FILE
        truncate_curve(self._path, start_step)
        self._goodput = Goodput(read_curve(self._path), time.time())
        self._trackers = open_trackers(trackers, directory, start_step)

    def write(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Adds and returns a line: `values` after `step` updates, and the goodput if they have `seconds`."""
        values = values | self._goodput.after(values, time.time())
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            tracker.write(step, values)
        return values

    def close(self) -> None:
        """Closes the trackers."""
        for tracker in self._trackers:
            tracker.close()


def read_curve(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file.

    Raises:
      UserError: a line in the middle that is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
            entries[-1]["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # a killed run's last line
                return entries
            raise UserError(f"{path}:{number}: expected a line of metrics in JSON") from error
    return entries


def truncate_curve(path: str | os.PathLike, step: int) -> None:
    """Drops the lines after a step, and half a last line; atomic."""
    path = pathlib.Path(path)
    entries = [entry for entry in read_curve(path) if entry["step"] <= step]
    if not path.exists():
        return
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    files.write_atomically(path, text.encode())


def without_clock(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a curve without the values that depend on the clock, for comparing runs."""
    return {name: value for name, value in line.items() if name.split("/")[0] not in _CLOCKED}


class Progress:
    """A bar on standard error with steps, loss, tokens per second and the time left."""

    def __init__(self, start_step: int, steps: int, shown: bool = True):
        interval = _TERMINAL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start_step,
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
            disable=not shown,
        )

    def update(self, loss: float, rate: float | None) -> None:
        """One more step was made."""
        text = f"loss={loss:.4f}" + (f", {rate:,.0f} tokens/s" if rate else "")
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.refresh()
        self._bar.close()


@dataclasses.dataclass(frozen=True)
class Watched:
    """The settings of a loop's monitoring, beside the losses.

    Attributes:
      bad_batches: the action at one; by default the run stops.
      machine: to relate speed to. profile: steps that are traced.
      on_metrics: called with the step and the values of each line, in every process.
      trackers: names of trackers.TRACKERS.
    """

    bad_batches: BadBatches = dataclasses.field(default_factory=BadBatches)
    machine: Machine | None = None
    profile: Profile | None = None
    on_metrics: Sequence[Callable[[int, Mapping[str, float]], Any]] = ()
    trackers: Sequence[str] = ("tensorboard",)


class Observer:
    """Receives every step's metrics and keeps the curves; the loop's only way to the outside.

    Attributes:
      phases: counts where the time goes.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        corpora: Sequence[str],
        learning_rate: Callable[[int], Any],
        start_step: int,
        steps: int,
        log_every: int,
        watched: Watched | None = None,
    ):
        """Opens the run's curves.

        Args:
          directory: of the run. corpora: names, in the order of StepMetrics.corpus_losses.
          learning_rate: the schedule. start_step: updates made already. steps: of the whole run.
          log_every: steps per line. watched: further actions. Only the first process writes and shows
            anything.
        """
        self.phases = Phases()
        self._averager = Averager(corpora)
        self._learning_rate, self._log_every, self._steps = learning_rate, log_every, steps
        first = processes.is_first()
        self._watched, self._skipped_in_a_row = watched or Watched(), 0
        trackers = self._watched.trackers
        self._writer = CurveWriter(directory, start_step, trackers) if first else None
        self._progress = Progress(start_step, steps, shown=first)
        self._noted: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Update number `step` is about to be made."""
        if self._watched.profile is not None:
            self._watched.profile.begin_step(step)

    def note(self, values: Mapping[str, float]) -> None:
        """Adds values to the line that is written next."""
        self._noted |= values

    def observe(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of update number `step`, counted from 1.

        Raises:
          SharedError: its batch is bad, and is not skipped, or is one of too many.
        """
        problem = _problem(step, metrics)
        if problem:
            self._skip_or_stop(step, problem)
        else:
            self._averager.add(metrics)
            self._skipped_in_a_row = 0
        self._progress.update(float(metrics.loss), self._averager.rate)
        if step % self._log_every == 0 or step == self._steps:
            values = self._averager.flush() | {
                "learning_rate": float(self._learning_rate(step - 1))
            }
            values |= self._measured(int(values["steps"])) | self._noted
            self._noted = {}
            if self._writer is not None:
                values = self._writer.write(step, values)
            for call in self._watched.on_metrics:
                with self.phases.during("hooks", step):
                    call(step, dict(values))

    def close(self) -> None:
        """Closes files, bar and trace."""
        if self._watched.profile is not None:
            self._watched.profile.close()
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def _measured(self, steps: int) -> dict[str, float]:
        """The time of a line's steps by phase, and their use of the machine."""
        values, machine = self.phases.flush(steps), self._watched.machine
        if machine is not None:
            values |= machine.mfu(values["seconds"])
        return values | memory()

    def _skip_or_stop(self, step: int, problem: str) -> None:
        """Reports a bad batch; raises unless the run continues without it."""
        message = f"{problem}{self._watched.bad_batches.describe(step)}"
        self._skipped_in_a_row += 1
        if not self._watched.bad_batches.skip:
            raise SharedError(
                f"{message}; nothing was saved after it (TrainConfig.skip_bad_batches = True leaves such "
                "batches out, a lower OptimizerConfig.max_learning_rate may help)"
            )
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise SharedError(f"{message}; the last {_MOST_SKIPPED} batches were all bad")
        if self._writer is not None:
            _logger.warning("%s: its update is left out", message)
        self._averager.skip()


def _problem(step: int, metrics: StepMetrics) -> str:
    """The fault of a step, if there is one."""
    for name in ("loss", "grad_norm"):
        value = float(getattr(metrics, name))
        if not math.isfinite(value):
            return f"{name} is {value} at step {step}: expected a finite number"
    if metrics.bad:
        mean = float(metrics.recent_loss)
        loss = float(metrics.loss)
        return f"loss is {loss:.4f} at step {step}: expected no jump from a mean of {mean:.4f}"
    return ""
