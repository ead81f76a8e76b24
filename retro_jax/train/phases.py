"""Where a process's time goes, and whether it still goes anywhere.

    input        waiting for the next batch            device       waiting for a step to end
    checkpoint   handing a state to the writer, and    evaluation   scoring held-out batches
                 waiting for the write before it       hooks        functions of the caller

Steps are dispatched ahead of the device, so that the run waits for its slowest part: a run that
waits for its input does not wait for the device. Where several processes train together, each of
them reports its phase now and then. One that waits for too long asks who is behind, says so and
ends: a collective that lacks one process would otherwise wait for ever.
"""

import contextlib
import time
from collections.abc import Iterator

PHASES = ("input", "device", "checkpoint", "evaluation", "hooks")


class Phases:
    """The seconds spent in each phase, and the phase of the process."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._began = time.perf_counter()
        self.touch("start", 0)

    def touch(self, name: str, step: int) -> None:
        """Notes the phase of the process from now on."""
        self.now = (name, step)
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def during(self, name: str, step: int) -> Iterator[None]:
        """Counts the time inside as one of PHASES, of a step."""
        self.touch(name, step)
        begin = self.since
        try:
            yield
        finally:
            self.touch("step", step)
            self._seconds[name] += self.since - begin

    def flush(self, steps: int) -> dict[str, float]:
        """Mean seconds per step since the last flush: in all, and in each phase that took any."""
        now = time.perf_counter()
        means = {"seconds": (now - self._began) / max(steps, 1)}
        for name, seconds in self._seconds.items():
            if seconds:
                means[f"seconds/{name}"] = seconds / max(steps, 1)
        self._seconds, self._began = dict.fromkeys(PHASES, 0.0), now
        return means
