"""One of several processes that train together.

python -m tests.distributed.worker ID COUNT PORT DIRECTORY STEPS DATA,FSDP,TENSOR [WHAT ID STEP]

DIRECTORY may be a place in a bucket. At the batch of STEP, process ID is killed (WHAT = kill) or waits for ever (WHAT = hang). Writes to
DIRECTORY/rows-ID.json the step that it began with and checksums of the rows of the first batch that
its devices hold: a file, since Gloo prints from several threads, into other lines too.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import sys
import time
import zlib
from collections.abc import Iterator

import jax
import numpy as np

from retro_jax.batch import RetroBatch
from retro_jax.distributed import processes
from retro_jax.errors import LostPeerError
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.storage import urls
from retro_jax.train.bucket_workdir import BucketWorkdir
from retro_jax.train.checkpoint import Checkpoints
from retro_jax.train.curves import Observer
from retro_jax.train.global_batches import global_batches, local_rows
from retro_jax.train.loop import StopRequest, TrainConfig, train
from retro_jax.train.watchdog import Watchdog
from tests.train.small import ROWS, Trainer, host_rows

# How long a process may wait. Where one of them hangs, the watch begins at that step: before it,
# whatever takes long is no accident.
_HANG_SECONDS = {"hang": 10.0, "soak": 60.0}

Rows = dict[int, list[int]]


def main(
    directory: str | pathlib.Path,
    steps: int,
    config: MeshConfig = MeshConfig(fsdp=2),
    accident: tuple[str, ...] = (),
) -> tuple[int, Rows]:
    """Trains, or goes on, on all devices of all processes; returns what it writes."""
    mesh = make_mesh(config)
    processes.connect(mesh)
    trainer = Trainer(mesh, neighbour_dropout=0.3)
    rows = local_rows(mesh, ROWS)
    remote = BucketWorkdir(str(directory), "train") if urls.is_url(directory) else None
    directory = pathlib.Path(directory) if remote is None else remote.bring() / "retro"
    directory.mkdir(parents=True, exist_ok=True)
    open_checkpoints = Checkpoints if remote is None else remote.checkpoints("retro")
    checkpoints = open_checkpoints(directory / "checkpoints")
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
    held: Rows = {}
    what = accident[0] if accident else ""
    watchdog = Watchdog(observer.phases, _HANG_SECONDS.get(what, 0.0), _give_up)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        if remote is not None:
            stack.enter_context(remote.following())

        def make_rows(step: int) -> RetroBatch:
            if accident and step == (int(accident[2]) if what == "hang" else start):
                stack.enter_context(watchdog)
            return _make_rows(step, rows, accident)

        hosts = map(make_rows, itertools.count(start))
        train(
            state,
            _noting_rows(global_batches(hosts, mesh, ROWS, rows), held),
            step=trainer.step,
            config=TrainConfig(steps=steps, log_every=1, checkpoint_every=interval(steps)),
            checkpoints=checkpoints,
            observer=observer,
            stop=StopRequest(),
        )
    checkpoints.close()
    observer.close()
    return start, held


def interval(steps: int) -> int:
    """Steps between checkpoints: many in short runs, none soon in those that are stopped."""
    return 2 if steps < 100 else min(steps // 100, 1000)


def checksums(batch: RetroBatch) -> Rows:
    """Of every row of a batch, or of the rows that this process's devices hold: one a field."""
    found: Rows = {}
    for array in jax.tree.leaves(batch):
        parts = getattr(array, "addressable_shards", None)
        pieces = [(p.index[0].start or 0, p.data) for p in parts] if parts else [(0, array)]
        sums = {f + i: zlib.crc32(row) for f, piece in pieces for i, row in enumerate(_rows(piece))}
        for row, total in sums.items():
            found.setdefault(row, []).append(total)
    return found


def _rows(array: jax.Array | np.ndarray) -> list[bytes]:
    """The bytes of each row."""
    return [np.ascontiguousarray(row).tobytes() for row in np.asarray(array)]


def _noting_rows(batches: Iterator[RetroBatch], held: Rows) -> Iterator[RetroBatch]:
    """The batches; the first one's rows are noted."""
    for batch in batches:
        if not held:
            held |= checksums(batch)
        yield batch


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
    # Where a lost process is not noticed by a collective, it is after so many seconds.
    jax.distributed.initialize(f"localhost:{port}", count, index, heartbeat_timeout_seconds=30)
    mesh = MeshConfig(*map(int, sys.argv[6].split(",")))
    try:
        with processes.noticing_loss():
            result = main(sys.argv[4], int(sys.argv[5]), mesh, tuple(sys.argv[7:]))
        if not urls.is_url(sys.argv[4]):
            pathlib.Path(sys.argv[4], f"rows-{index}.json").write_text(json.dumps(result))
    except LostPeerError as error:
        _give_up(str(error))
