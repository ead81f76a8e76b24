"""Seconds of many tasks that do nothing, over local processes and over Ray.

    python -m benchmarks.many_tasks [--counts=1000,4000,16000] [--runners=local,ray]

What a task costs beside its work: the time of a stage grows with its tasks, not with their square. The
work carries a plan of some megabytes, which each worker unpickles once. The first run of a runner starts
its workers; it is left out.
"""

import dataclasses
import os
import time

import numpy as np
from absl import app, flags

from data_pipelines.artefacts.ray_runner import RayCluster
from data_pipelines.artefacts.runner import LocalProcesses, Runner

_COUNTS = flags.DEFINE_list("counts", ["1000", "4000", "16000"], "Of tasks.")
_RUNNERS = flags.DEFINE_list("runners", ["local", "ray"], "local, ray.")
_PLAN = flags.DEFINE_integer("plan_megabytes", 4, "That the work carries.", lower_bound=0)


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Work that does nothing, with a plan."""

    plan: np.ndarray

    def __call__(self, task: int) -> int:
        """The number of the task."""
        return task


def main(_: list[str]) -> None:
    """Runs the tasks and prints a line for each count."""
    processes = os.cpu_count() or 1
    runners: dict[str, Runner] = {"local": LocalProcesses(processes), "ray": RayCluster()}
    work = Nothing(np.zeros(_PLAN.value << 20, np.uint8))
    for name in _RUNNERS.value:
        for count in [16, *map(int, _COUNTS.value)]:
            start = time.perf_counter()
            done = sum(1 for _ in runners[name].run(work, range(count)))
            took = time.perf_counter() - start
            if count > 16:
                print(f"{name}: {done:,} tasks in {took:.1f} s, {1e3 * took / done:.2f} ms each")


if __name__ == "__main__":
    app.run(main)
