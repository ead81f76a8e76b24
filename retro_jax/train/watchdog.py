"""Names the process of a run that is behind, when the others wait for it."""

import contextlib
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from retro_jax.distributed.processes import client, meet
from retro_jax.train.phases import Phases

_KEY, _VERDICT = "retro/progress/", "retro/verdict"
_ASK_SECONDS = 10.0  # for the phases of the others
_MOST_BETWEEN_REPORTS, _REPORTS_BEFORE_END = 15.0, 4


@dataclasses.dataclass(frozen=True)
class Report:
    """A process's report of itself.

    Attributes:
      phase, step: its current ones. alive: seconds it had lived when it said so.
    """

    phase: str
    step: int
    alive: float


def blame(reports: Mapping[int, Report], count: int, silence: float) -> str:
    """Names the processes that the others wait for, in words.

    Args:
      reports: of each process that has sent one. count: of processes.
      silence: seconds by which a report may lag behind the latest.
    """
    missing = [i for i in range(count) if i not in reports]
    if missing:
        return f"{_listed(missing)} said nothing at all"
    latest = max(report.alive for report in reports.values())
    silent = [i for i, report in reports.items() if latest - report.alive > silence]
    if silent:
        longest = max(latest - reports[i].alive for i in silent)
        return f"{_listed(silent)} gave no sign of life for {longest:.0f} s"
    least = min(report.step for report in reports.values())
    behind = [i for i, report in reports.items() if report.step == least]
    # In a step, or waiting for its end, a process waits for the others: the cause is elsewhere.
    elsewhere = [i for i in behind if reports[i].phase not in ("step", "device")]
    culprits = elsewhere or behind
    phase = reports[culprits[0]].phase
    if len(culprits) == count:
        return f"all are at step {least} ({phase}): a device or the network between them hangs"
    verb = "is" if len(culprits) == 1 else "are"
    return f"{_listed(culprits)} {verb} behind, at step {least} ({phase})"


class Watchdog:
    """Ends this process when it has been in one phase for too long; several processes only."""

    def __init__(self, phases: Phases, seconds: float, end: Callable[[str], Any]):
        """Watches from when it is entered until it is left.

        Args:
          phases: of this process. seconds: that one phase may take; 0 for any.
          end: called with the reason, by another thread than the main one; does not return.
        """
        self._phases, self._seconds, self._end = phases, seconds, end
        self._interval = min(seconds / _REPORTS_BEFORE_END, _MOST_BETWEEN_REPORTS)
        self._began, self._left = time.perf_counter(), threading.Event()
        self._active = seconds > 0 and jax.process_count() > 1

    def __enter__(self) -> "Watchdog":
        if self._active:
            meet("watchdog")  # lives are counted from here: those of all processes are comparable
            self._began = time.perf_counter()
            self._report(*self._phases.now)  # so that the others know of it, however soon it ends
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._left.set()

    def _watch(self) -> None:
        """Reports, and ends the process once it hangs."""
        while not self._left.wait(self._interval):
            phase, step = self._phases.now
            waited = time.perf_counter() - self._phases.since
            if waited <= self._seconds:
                self._report(phase, step)
                continue
            reason = _within(_ASK_SECONDS, functools.partial(self._ask, phase, step))
            self._end(
                f"step {step} has been waiting for {waited:.0f} s ({phase}): "
                f"{reason or 'process 0, which knows the others, does not answer'}"
            )

    def _report(self, phase: str, step: int) -> None:
        """Reports this process's phase, as far as process 0 listens."""
        alive = time.perf_counter() - self._began
        text = json.dumps([phase, step, alive])
        key = f"{_KEY}{jax.process_index()}"
        _within(_ASK_SECONDS, lambda: client().key_value_set(key, text, allow_overwrite=True))

    def _ask(self, phase: str, step: int) -> str:
        """Who is behind, as far as it is known."""
        self._report(phase, step)
        entries = client().key_value_dir_get(_KEY)
        reports = {int(key.rsplit("/", 1)[1]): Report(*json.loads(text)) for key, text in entries}
        silence = _REPORTS_BEFORE_END / 2 * self._interval + 1
        verdict = blame(reports, jax.process_count(), silence)
        # The first to ask speaks for all: once it has ended, it would itself seem to be the cause.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client().key_value_set(_VERDICT, verdict)
        return client().key_value_try_get(_VERDICT)


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """The result of an action; None where it fails or takes longer."""
    results: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            results.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _listed(numbers: list[int]) -> str:
    """As in "process 3" or "processes 3, 5"."""
    shown = ", ".join(map(str, sorted(numbers)))
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"
