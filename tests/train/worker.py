"""One of several processes that train together.

python -m tests.train.worker ID COUNT PORT DIRECTORY STEPS
"""

import itertools
import pathlib
import sys

import jax

from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.train.checkpoint import Checkpoints
from retro_jax.train.inputs import global_batches, local_rows
from retro_jax.train.loop import StopRequest, TrainConfig, train
from retro_jax.train.metrics import Observer
from tests.train.small import ROWS, Trainer, host_rows


def main(directory: pathlib.Path, steps: int) -> list[int]:
    """Trains, or goes on, on all devices of all processes; returns the rows made here."""
    mesh = make_mesh(MeshConfig(fsdp=2))
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
        main_process=jax.process_index() == 0,
    )
    hosts = (host_rows(step, rows) for step in itertools.count(start))
    with jax.set_mesh(mesh):
        train(
            state,
            global_batches(hosts, mesh, ROWS, rows),
            step=trainer.step,
            config=TrainConfig(steps=steps, log_every=1, checkpoint_every=1000),
            checkpoints=checkpoints,
            observer=observer,
            stop=StopRequest(),
        )
    checkpoints.close()
    observer.close()
    return rows


if __name__ == "__main__":
    index, count, port = map(int, sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    print(*main(pathlib.Path(sys.argv[4]), int(sys.argv[5])))
