"""Two processes train as one does: same rows, same curve, checkpoints that either can read."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.train.checkpoint import Checkpoints, find_damage, latest_step
from retro_jax.train.metrics import read_curve
from retro_jax.train.trees import named_leaves
from tests.train import worker
from tests.train.small import Trainer


def _free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _start(directory, steps: int) -> list[subprocess.Popen]:
    """Starts two processes of two devices each that train together."""
    port = str(_free_port())
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    worker_of_two = [sys.executable, "-m", "tests.train.worker"]
    return [
        subprocess.Popen(
            [*worker_of_two, str(i), "2", port, str(directory), str(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]


def _finish(processes: list[subprocess.Popen]) -> list[list[int]]:
    """Waits for both; the rows that each of them made."""
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lasts = [out.splitlines()[-1] for out, _ in outputs]  # Gloo prints lines of its own
    return [[int(row) for row in last.split()] for last in lasts]


def test_two_processes_equal_one(tmp_path):
    rows = _finish(_start(tmp_path / "two", steps=8))
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]  # each makes only what its devices hold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "make_mesh", lambda c: make_mesh(c, jax.devices()[:4]))
        assert worker.main(tmp_path / "one", 8) == list(range(8))
    curves = [read_curve(tmp_path / name / "metrics.jsonl") for name in ("two", "one")]
    for a, b in zip(*curves, strict=True):
        assert a["step"] == b["step"]
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    path = tmp_path / "two" / "checkpoints" / "8"
    assert find_damage(path) is None
    trainer = Trainer(make_mesh(MeshConfig(), jax.devices()[:1]))
    states = [
        Checkpoints(tmp_path / n / "checkpoints").restore(trainer.abstract) for n in ("two", "one")
    ]
    named = [named_leaves(state) for state in states]
    for name, leaf in named[0].items():
        np.testing.assert_allclose(leaf, named[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    processes = _start(tmp_path, steps=10**6)
    deadline = time.monotonic() + 300
    while len(read_curve(tmp_path / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    _finish(processes)
    reached = latest_step(tmp_path / "checkpoints")
    assert reached == read_curve(tmp_path / "metrics.jsonl")[-1]["step"] < 10**6
    assert find_damage(tmp_path / "checkpoints" / str(reached)) is None
