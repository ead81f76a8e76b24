"""One long small run that is killed at random, beside one that is not: the same bits, no step lost.

    python -m benchmarks.soak --workdir=SCRATCH --kills=30
    python -m benchmarks.soak --workdir=SCRATCH --kills=20 --soak_steps=300 --store=s3 --faults=0.05

Trains a tiny model (tests/distributed/worker.py) in several processes to the end, once undisturbed
and once with SIGTERM or SIGKILL to a random process at random moments, started again each time.
Checks that no step before the last checkpoint is ever made again, and that no checkpoint is lost or
damaged. At most the steps between two checkpoints, and those of an unfinished write, may be made
again. Compares curves and final arrays bit by bit. With --store the run's place is a bucket of an
emulated store on this machine, a part of whose requests goes wrong; it is killed while it saves, and
every other time its disk is lost too. Takes about --kills times the seconds that a start
takes, plus the run itself, and stops itself after --limit seconds.
"""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from launch.common import app
from retro_jax.errors import UserError
from retro_jax.storage import urls
from retro_jax.storage.buckets import Bucket
from retro_jax.train.bucket_checkpoints import UNPUBLISHED, sealed_steps
from retro_jax.train.bucket_workdir import CACHE, BucketWorkdir
from retro_jax.train.checkpoint import find_damage, latest_step
from retro_jax.train.curves import read_curve, without_clock
from tests import object_stores
from tests.distributed import worker
from tests.ports import free_port

KILLS = flags.DEFINE_integer("kills", 30, "How often the run is killed.", lower_bound=0)
COUNT = flags.DEFINE_integer("soak_processes", 2, "Processes of the run.", lower_bound=1)
STEPS = flags.DEFINE_integer("soak_steps", 3000, "Steps of the run.", lower_bound=10)
SEED = flags.DEFINE_integer("soak_seed", 0, "Of the moments and the signals.")
STORE = flags.DEFINE_enum("store", None, list(object_stores.STORES), "The run is in a bucket.")
FAULTS = flags.DEFINE_float("faults", 0.05, "Share of its requests that go wrong.", 0.0, 1.0)
LIMIT = flags.DEFINE_integer("limit", 3600, "Seconds after which it gives up.", lower_bound=1)


def main() -> None:
    """Runs both and compares them."""
    root = pathlib.Path(app.required(app.WORKDIR, "an empty directory"))
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty: expected a new directory")
    with contextlib.ExitStack() as stack:
        place: str | pathlib.Path = root
        if STORE.value is not None:
            os.environ["HOME"] = str(root / "home")  # where processes keep what they bring
            faults = object_stores.Faults(FAULTS.value)
            place = stack.enter_context(object_stores.STORES[STORE.value](faults))
            stack.callback(lambda: print(f"requests that went wrong: {faults.happened}"))
        soak(place)


def soak(place: str | pathlib.Path) -> None:
    """Runs both in a place."""
    whole, killed = (inside(place, name) for name in ("whole", "killed"))
    deadline = time.monotonic() + LIMIT.value
    began = time.monotonic()
    finish(start(whole), deadline)
    print(f"undisturbed: {STEPS.value} steps in {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    kills, lost = disturb(killed, deadline)
    seconds = time.monotonic() - began
    signals = ", ".join(f"{count} {name}" for name, count in sorted(kills.items()))
    print(f"disturbed: {signals} in {seconds:.0f} s; most steps made again at once: {lost}")
    every = worker.interval(STEPS.value)
    print(
        f"a checkpoint every {every} steps: none lost, none damaged, none made again before the last"
    )
    compare(brought(whole), brought(killed))
    print("the curves and the final parameters are the same, bit for bit")


def inside(place: str | pathlib.Path, name: str) -> str | pathlib.Path:
    """A directory, or a place in a bucket."""
    return f"{place}/{name}" if isinstance(place, str) else place / name


def brought(run: str | pathlib.Path) -> pathlib.Path:
    """Where this process finds a run's files."""
    return pathlib.Path(run) if not urls.is_url(run) else BucketWorkdir(str(run)).bring() / "retro"


def reached_by(run: str | pathlib.Path) -> int:
    """The step of a run's newest checkpoint."""
    if not urls.is_url(run):
        return latest_step(pathlib.Path(run) / "checkpoints") or 0
    names = Bucket(str(run)).list("retro/checkpoints")
    if any(".damaged" in name for name in names):
        raise UserError(f"{run}: a kill damaged a checkpoint, expected it to be whole")
    return max(sealed_steps(names), default=0)


def start(directory: str | pathlib.Path) -> list[subprocess.Popen]:
    """Starts the processes of a run."""
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        # Programs are compiled once for all starts.
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(tempfile.gettempdir()) / "retro-jax-soak"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    arguments = [str(COUNT.value), str(free_port()), str(directory), str(STEPS.value), "-1,2,1"]
    words = [*arguments, "soak", "-1", "-1"]  # no accident, but the watchdog is on
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker", str(i), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
        for i in range(COUNT.value)
    ]


def finish(processes: list[subprocess.Popen], deadline: float) -> list[int]:
    """Waits for all of them, and ends those that outlive the others by a minute."""
    first = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if first is None and any(process.poll() is not None for process in processes):
            first = now
        if now > deadline or (first is not None and now > first + 60):
            for process in processes:
                process.kill()
        time.sleep(0.05)
    if time.monotonic() > deadline:
        raise UserError(
            f"not done after {LIMIT.value} s: expected a larger --limit, or fewer --kills"
        )
    return [process.returncode for process in processes]


def disturb(run: str | pathlib.Path, deadline: float) -> tuple[dict[str, int], int]:
    """Kills a run again and again until it is done: signals by name, most steps made again at once."""
    chance, lost = random.Random(SEED.value), 0
    kills = {"SIGKILL": 0, "SIGTERM": 0}
    part = max(2, STEPS.value // (KILLS.value + 1))
    while (reached := reached_by(run)) < STEPS.value:
        lost = max(lost, _last_line(run) - reached)
        # A write is asked for once the one before it has ended.
        if lost > 2 * worker.interval(STEPS.value):
            raise UserError(f"{run}: {lost} steps are made again, expected two intervals at most")
        processes = start(run)
        target = reached + chance.randrange(1, max(2, part * 3 // 2))
        if sum(kills.values()) < KILLS.value:
            while not _is_time(run, target) and all(p.poll() is None for p in processes):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            if urls.is_url(run):
                time.sleep(
                    chance.uniform(0, 0.2)
                )  # anywhere from its first byte to what is removed
            victim = processes[chance.randrange(len(processes))]
            number = chance.choice([signal.SIGTERM, signal.SIGKILL])
            kills[number.name] += victim.poll() is None
            victim.send_signal(number)
        finish(processes, deadline)
        if reached_by(run) < reached:
            raise UserError(f"{run}: checkpoint {reached} was lost, expected it to stay")
        if urls.is_url(run) and chance.random() < 0.5:
            shutil.rmtree(CACHE.expanduser(), ignore_errors=True)
        elif not urls.is_url(run):
            for path in (pathlib.Path(run) / "checkpoints").glob("*.damaged*"):
                raise UserError(f"{path}: a kill damaged a checkpoint, expected it to be whole")
    return kills, lost


def _is_time(run: str | pathlib.Path, target: int) -> bool:
    """Whether a run has come to a step; of one in a bucket, whether it is saving then."""
    if not urls.is_url(run):
        return _last_line(run) >= target
    saving: list[str] = []
    for folder in CACHE.expanduser().glob("*/train-*/retro/checkpoints"):
        with contextlib.suppress(FileNotFoundError):
            saving += [name for name in os.listdir(folder) if name.endswith(UNPUBLISHED)]
    return any(int(name.removesuffix(UNPUBLISHED)) >= target for name in saving)


def compare(whole: pathlib.Path, killed: pathlib.Path) -> None:
    """Raises unless both runs have the same curve and the same last arrays."""
    curves = [
        list(map(without_clock, read_curve(run / "metrics.jsonl"))) for run in (whole, killed)
    ]
    if curves[0] != curves[1]:
        raise UserError(f"{killed} has another curve than {whole}: expected the same")
    from retro_jax.train.parameter_names import named_leaves
    from tests.train.small import one_device_state

    states = [named_leaves(one_device_state(run / "checkpoints")) for run in (whole, killed)]
    for run in (whole, killed):
        problem = find_damage(run / "checkpoints" / str(STEPS.value))
        if problem:
            raise UserError(f"{run}: the last checkpoint is damaged: {problem}")
    for name, leaf in states[0].items():
        if np.asarray(leaf).tobytes() != np.asarray(states[1][name]).tobytes():
            raise UserError(f"{name} differs between {whole} and {killed}: expected the same bits")


def _last_line(run: str | pathlib.Path) -> int:
    """The last step of a run's curve; of one in a bucket, as the bucket has it."""
    folder = pathlib.Path(run) if not urls.is_url(run) else brought(run)
    lines = read_curve(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


if __name__ == "__main__":
    app.run(main)
