"""Who only trains needs no TensorFlow: commands import what prepares texts when they prepare."""

import subprocess
import sys

from launch import retro
from tests.launch.trained import TINY

# What the extras bring, and training does without.
EXTRAS = (
    "tensorflow",
    "tensorflow_text",
    "scann",
    "rensa",
    "pydivsufsort",
    "pyarrow",
    "ray",
    "gguf",
    "tokenizers",
    "fastapi",
    "uvicorn",
    "pydantic",
    "gcsfs",
    "s3fs",
)
_BLOCKED = """
import importlib, sys
for name in {extras!r}:
    sys.modules[name] = None  # importing it raises ImportError
for name in {modules!r}:
    importlib.import_module(name)
"""
_TRAIN = """
from launch import train
from launch.common import app
sys.exit(app.execute(train.main, ["train", *{flags!r}]))
"""


def _run(code: str) -> subprocess.CompletedProcess:
    """Python that ran a text."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_every_command_is_imported_without_the_extras():
    modules = [retro.module(name) for name in retro.available()]
    assert "launch.train" in modules
    run = _run(_BLOCKED.format(extras=EXTRAS, modules=modules))
    assert run.returncode == 0, run.stderr


def test_training_runs_without_the_extras(prepared_workdir, tmp_path):
    (tmp_path / "tiny.gin").write_text(TINY)
    flags = [f"--gin_file={tmp_path / 'tiny.gin'}", "--gin_bindings=TrainConfig.steps = 3"]
    flags += [f"--workdir={tmp_path / 'W'}", f"--data={prepared_workdir}"]
    run = _run(_BLOCKED.format(extras=EXTRAS, modules=[]) + _TRAIN.format(flags=flags))
    assert run.returncode == 0, run.stderr
    assert "trained 3 steps" in run.stdout
