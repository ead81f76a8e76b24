"""One of several processes that train together.

python -m tests.train.worker ID COUNT PORT DIRECTORY STEPS [WHAT ID STEP]

At the batch of STEP, process ID is killed (WHAT = kill) or waits for ever (WHAT = hang).
"""

import itertools
import os
import pathlib
import signal
import sys
import time

import jax

from retro_jax.batch import RetroBatch
from retro_jax.errors import LostPeerError
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.train import processes
from retro_jax.train.checkpoint import Checkpoints
from retro_jax.train.inputs import global_batches, local_rows
from retro_jax.train.loop import StopRequest, TrainConfig, train
from retro_jax.train.metrics import Observer
from retro_jax.train.phases import Watchdog
from tests.train.small import ROWS, Trainer, host_rows

_HANG_SECONDS = 20.0


def main(directory: pathlib.Path, steps: int, accident: tuple[str, ...] = ()) -> list[int]:
    """Trains, or goes on, on all devices of all processes; returns the rows made here."""
    mesh = make_mesh(MeshConfig(fsdp=2))
    processes.connect(mesh)
    trainer = Trainer(mesh, neighbour_dropout=0.3)
    rows = local_rows(mesh, ROWS)
    checkpoints = Checkpoints(directory / "checkpoints")
    state = checkpoints.restore(trainer.abstract) or trainer.state
    start = int(state.step)
    observer = Observer(
        directory,
        corpora=["a", "b"],
        learning_rate=lambda t: 0.1,
        start_step=start,
        steps=steps,
        log_every=1,
    )
    hosts = (_make_rows(step, rows, accident) for step in itertools.count(start))
    watchdog = Watchdog(observer.phases, _HANG_SECONDS if accident else 0.0, _give_up)
    with jax.set_mesh(mesh), watchdog:
        train(
            state,
            global_batches(hosts, mesh, ROWS, rows),
            step=trainer.step,
            config=TrainConfig(
                steps=steps, log_every=1, checkpoint_every=2 if steps < 100 else 1000
            ),
            checkpoints=checkpoints,
            observer=observer,
            stop=StopRequest(),
        )
    checkpoints.close()
    observer.close()
    return rows


def _interval(steps: int) -> int:
    """Steps between checkpoints: some in short runs, none in those that are stopped."""
    return 2 if steps < 100 else max(1, min(steps // 100, 1000))


def _make_rows(step: int, rows: list[int], accident: tuple[str, ...]) -> RetroBatch:
    """This process's rows, or what befalls it instead."""
    if accident[1:] == (str(jax.process_index()), str(step)):
        if accident[0] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)
    return host_rows(step, rows)


def _give_up(reason: str) -> None:
    """Says why and ends, past what waits for the other process."""
    print(f"{processes.name()}: {reason}", file=sys.stderr, flush=True)
    os._exit(76)


if __name__ == "__main__":
    index, count, port = map(int, sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    try:
        with processes.noticing_loss():
            print(*main(pathlib.Path(sys.argv[4]), int(sys.argv[5]), tuple(sys.argv[6:])))
    except LostPeerError as error:
        _give_up(str(error))
