"""docs/tutorial.md: its settings can be made, and its commands have flags that exist.

test_results.py, which has a trained model at hand, runs those of one machine; test_train.py starts many
processes by the flags of the others.
"""

import importlib
import pathlib
import re
import shlex

import pytest

from data_pipelines.chunk_database.database import CHUNK_LENGTH
from launch.common import app, configurables
from retro_jax.config import RetroConfig

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
ONE_MACHINE = [c for c in COMMANDS if "launch.cluster" not in c and "--num_processes" not in c]
(SETTINGS,) = re.findall(r"```gin\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    """Where my.gin and experiments/ are."""
    (tmp_path / "my.gin").write_text(SETTINGS)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)


def test_the_settings_can_be_made(folder):
    configurables.load("my.gin")
    made = {}
    for name in ("DocumentsConfig", "TokenizerConfig", "NeighboursConfig", "BatchConfig"):
        made[name] = configurables.make(configurables.configurable(name))
    vocabulary = made["TokenizerConfig"].vocab_size
    assert configurables.make(RetroConfig, vocab_size=vocabulary).chunk_length == CHUNK_LENGTH
    for name in ("OptimizerConfig", "TrainConfig", "StartConfig", "MeshConfig"):
        configurables.make(configurables.configurable(name))
    assert made["BatchConfig"].neighbours <= made["NeighboursConfig"].train


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_and_bindings_of_every_command_exist(folder, command, capsys):
    python, dash, module, *arguments = shlex.split(command)
    assert (python, dash) == ("python", "-m")
    entry = importlib.import_module(module)
    if module == "launch.cluster":
        arguments[0] = f"--kind={arguments[0]}"
        assert app.execute(entry.main, [module, *arguments]) == 0  # they are all dry
        assert "set -e" in capsys.readouterr().out
        return

    def main() -> None:
        configurables.load_from_flags()

    main.__module__ = module  # whose flags are known
    known = set(re.findall(r"--(?:\[no\])?(\w+)", app.usage(entry.main)))
    given = {word[2:].split("=")[0] for word in arguments}
    assert given <= known, f"{module} does not know {sorted(given - known)}"
    assert app.execute(main, [module, *arguments]) == 0


def test_every_entry_point_of_the_path_is_in_it():
    used = {line.split()[2] for line in COMMANDS}
    wanted = ("prepare", "train", "evaluate", "sample", "report", "cluster")
    assert used == {f"launch.{name}" for name in wanted}
