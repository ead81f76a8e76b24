"""launch.results: commands that parse, ablations that differ from the base in what they say."""

import importlib
import pathlib

import pytest
from absl import flags

from data_pipelines.batches.batches import BatchConfig
from launch import results
from launch.common import app, configurables
from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.report import published

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
CHANGED = {
    "chunk_only": {"neighbour_part": "chunk"},
    "continuation_only": {"neighbour_part": "continuation"},
    "no_query_conditioning": {"encoder_cca_layers": ()},
    "no_cca_positions": {"cca_positions": False},
    "own_embeddings": {"share_embeddings": False},
    "cca_first_layer": {"cca_layers": (1,)},
    "cca_last_layer": {"cca_layers": (3,)},
    "cca_every_layer": {"cca_layers": (1, 2, 3)},
    "one_neighbour": {"neighbours": 1},
    "norm_conditioning": {"norm_conditioning": True},  # ours
}


def _settings(path: pathlib.Path) -> dict:
    """Model and batches of an experiment."""
    configurables.load(str(path))
    return {
        **vars(configurables.make(RetroConfig, vocab_size=4096)),
        **vars(configurables.make(BatchConfig)),
    }


def test_each_ablation_changes_one_setting(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    base = _settings(FOLDER / "code_small.gin")
    names = results.ablations(None)
    assert sorted(names) == sorted(CHANGED) == sorted({*published.ABLATIONS, "norm_conditioning"})
    assert names[:2] == ["chunk_only", "continuation_only"]  # what costs most in the paper
    for name, changed in CHANGED.items():
        found = _settings(FOLDER / "ablations" / f"{name}.gin")
        assert {key: found[key] for key in found if found[key] != base[key]} == changed


def test_the_commands_are_of_entry_points_and_their_flags(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    commands = results.steps("W", "experiments/code_small.gin")
    of_seeds = results.seed_steps("W", "experiments/quickstart.gin", ["one_neighbour"], 3)
    assert [arguments[0].removeprefix("launch.") for _, arguments in of_seeds] == [
        *("train", "train", "evaluate") * 2,
        *("train", "evaluate") * 3,
    ]
    for number, (_, arguments) in enumerate(of_seeds[:6]):
        assert {"--data=W", f"--workdir=W/seeds/{1 + number // 3}"} <= set(arguments)
    homes = ("W", "W/seeds/1", "W/seeds/2")
    for number, (_, arguments) in enumerate(of_seeds[6:]):
        home = f"--workdir={homes[number // 2]}/ablations/one_neighbour"
        assert {"--data=W", home} <= set(arguments)
        seeds = [
            f"--gin_bindings={of}.seed = {number // 2}" for of in ("TrainConfig", "BatchConfig")
        ]
        given = [argument for argument in arguments if ".seed = " in argument]
        assert given == (seeds if number >= 2 and number % 2 == 0 else [])
    assert [arguments[0] for _, arguments in commands] == [
        *("launch.prepare", "launch.train", "launch.train", "launch.evaluate", "launch.report")
    ]
    for _, (module, *arguments) in [*commands, *of_seeds]:
        importlib.import_module(module)  # defines its flags
        for argument in arguments:
            name = argument.removeprefix("--").partition("=")[0]
            assert name in flags.FLAGS
    with pytest.raises(flags.Error, match="--ablations=none: expected some of cca_every_layer"):
        results.ablations(["none"])
    assert results.ablations([""]) == []


def test_ablations_of_other_settings_are_refused(tmp_path: pathlib.Path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parent)
    arguments = [f"--workdir={tmp_path / 'W'}", "--gin_file=experiments/quickstart.gin"]
    assert app.execute(results.main, ["results", *arguments]) == 1
    assert "ablations are of experiments/code_small.gin" in capsys.readouterr().err
    assert not (tmp_path / "W").exists()


def test_what_is_generated_is_replaced_and_nothing_else(tmp_path: pathlib.Path, capsys):
    path = tmp_path / "results.md"
    path.write_text(f"# Results\n\n{results.BEGIN}\nold\n{results.END}\nkept\n")
    text = results.replaced(path, "# Evaluation\n\nnew")
    assert text == f"# Results\n\n{results.BEGIN}\n\n## Evaluation\n\nnew\n\n{results.END}\nkept\n"
    path.write_text("# Results\n")
    with pytest.raises(UserError, match=r"results\.md: expected the lines"):
        results.replaced(path, "")
    arguments = ["results", f"--workdir={tmp_path / 'W'}", f"--docs={path}"]
    assert app.execute(results.main, arguments) == 1  # before anything is computed
    assert not (tmp_path / "W").exists()
