"""launch.train to which something happens at an exact step.

python -m tests.launch.accident WHAT STEP FLAGS

Once the metrics of update STEP are known, and before the next checkpoint is begun, this process is
killed (WHAT = kill) or asks itself to stop (WHAT = stop), after which it makes a step in half a
second: JAX tells the other processes within seconds, and a run is longer than that.
"""

import os
import signal
import sys
import time
from collections.abc import Callable

from launch import train
from launch.common import app
from retro_jax.train.curves import Observer
from retro_jax.train.step import StepMetrics

_SECONDS_A_STEP = 0.5


def befalling(
    what: str, step: int, observe: Callable[[Observer, int, StepMetrics], None]
) -> Callable[[Observer, int, StepMetrics], None]:
    """Observer.observe with the accident."""

    def observed(self: Observer, number: int, metrics: StepMetrics) -> None:
        observe(self, number, metrics)
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
        if number >= step:
            time.sleep(_SECONDS_A_STEP)

    return observed


if __name__ == "__main__":
    Observer.observe = befalling(sys.argv[1], int(sys.argv[2]), Observer.observe)  # type: ignore[method-assign]
    sys.exit(app.execute(train.main, ["launch.train", *sys.argv[3:]]))
