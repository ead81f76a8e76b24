"""One long small run that is killed at random, beside one that is not: the same bits, no step lost.

    python -m benchmarks.soak --workdir=SCRATCH --kills=30

Trains a tiny model (tests/train/worker.py) in several processes to the end, once undisturbed and once
with SIGTERM or SIGKILL to a random process at random moments, started again each time. Checks that
nothing before the last checkpoint is ever made again, and compares the final parameters bit by bit.
Takes about --kills times the seconds that a start takes, plus the run itself, and stops itself after
--limit seconds.
"""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
from absl import flags

from launch import app
from retro_jax.errors import UserError
from retro_jax.train.checkpoint import find_damage, latest_step
from retro_jax.train.metrics import read_curve, without_clock

KILLS = flags.DEFINE_integer("kills", 30, "How often the run is killed.", lower_bound=0)
COUNT = flags.DEFINE_integer("soak_processes", 2, "Processes of the run.", lower_bound=1)
STEPS = flags.DEFINE_integer("soak_steps", 3000, "Steps of the run.", lower_bound=10)
SEED = flags.DEFINE_integer("soak_seed", 0, "Of the moments and the signals.")
LIMIT = flags.DEFINE_integer("limit", 3600, "Seconds after which it gives up.", lower_bound=1)


def main() -> None:
    """Runs both and compares them."""
    root = pathlib.Path(app.required(app.WORKDIR, "an empty directory"))
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty: expected a new directory")
    deadline = time.monotonic() + LIMIT.value
    began = time.monotonic()
    finish(start(root / "whole"), deadline)
    print(f"undisturbed: {STEPS.value} steps in {time.monotonic() - began:.0f} s", flush=True)
    kills, lost = disturb(root / "killed", deadline)
    print(f"killed {kills} times; steps made again, after the last checkpoint: {lost}")
    compare(root / "whole", root / "killed")
    print("the curves and the final parameters are the same, bit for bit")


def start(directory: pathlib.Path) -> list[subprocess.Popen]:
    """Starts the processes of a run."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    flag = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    words = [str(COUNT.value), str(port), str(directory), str(STEPS.value), "soak", "-1", "-1"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.worker", str(i), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
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


def disturb(directory: pathlib.Path, deadline: float) -> tuple[int, int]:
    """Kills a run again and again until it is done: (how often, most steps made again)."""
    chance, kills, lost = random.Random(SEED.value), 0, 0
    part = max(1, STEPS.value // (KILLS.value + 1))
    while (reached := latest_step(directory / "checkpoints") or 0) < STEPS.value:
        made = _last_line(directory)
        lost = max(lost, made - reached)
        processes = start(directory)
        target = reached + chance.randrange(1, 2 * part)
        if kills < KILLS.value:
            while _last_line(directory) < target and all(p.poll() is None for p in processes):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            victim = processes[chance.randrange(len(processes))]
            victim.send_signal(chance.choice([signal.SIGTERM, signal.SIGKILL]))
            kills += 1
        finish(processes, deadline)
        after = latest_step(directory / "checkpoints") or 0
        if after < reached:
            raise UserError(f"{directory}: checkpoint {reached} was lost, expected it to stay")
    return kills, lost


def compare(whole: pathlib.Path, killed: pathlib.Path) -> None:
    """Raises unless both runs have the same curve and the same last arrays."""
    curves = [
        list(map(without_clock, read_curve(run / "metrics.jsonl"))) for run in (whole, killed)
    ]
    if curves[0] != curves[1]:
        raise UserError(f"{killed} has another curve than {whole}: expected the same")
    from retro_jax.train.trees import named_leaves
    from tests.train.small import one_device_state

    states = [named_leaves(one_device_state(run / "checkpoints")) for run in (whole, killed)]
    for run in (whole, killed):
        problem = find_damage(run / "checkpoints" / str(STEPS.value))
        if problem:
            raise UserError(f"{run}: the last checkpoint is damaged: {problem}")
    for name, leaf in states[0].items():
        if np.asarray(leaf).tobytes() != np.asarray(states[1][name]).tobytes():
            raise UserError(f"{name} differs between {whole} and {killed}: expected the same bits")


def _last_line(directory: pathlib.Path) -> int:
    """The last step of a run's curve."""
    lines = read_curve(directory / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


if __name__ == "__main__":
    app.run(main)
