"""launch.results: commands that parse, ablations that differ from the base in what they say."""

import importlib
import json
import pathlib

import jax
import pytest
from absl import flags
from flax import nnx

from data_pipelines.batches.batches import BatchConfig
from launch import quickstart, results
from launch.common import app, configurables
from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.evaluate.scored_text import documents_file, write_scored_text
from retro_jax.report import generated_part, published
from retro_jax.report.seed_files import seed_parts
from retro_jax.sharding import make_mesh
from retro_jax.train.loop import TrainConfig
from retro_jax.train.plan import Settings, model_maker
from tests.evaluate.test_scored_text import scored_text

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


def _training(path: pathlib.Path) -> TrainConfig:
    """How an experiment trains."""
    configurables.load(str(path))
    return configurables.make(TrainConfig)


def test_each_ablation_changes_one_setting(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    base = _settings(FOLDER / "code_small.gin")
    names = results.ablations(None)
    assert sorted(names) == sorted(CHANGED) == sorted({*published.ABLATIONS, "norm_conditioning"})
    assert names[:2] == ["chunk_only", "continuation_only"]  # what costs most in the paper
    for name, changed in CHANGED.items():
        found = _settings(FOLDER / "ablations" / f"{name}.gin")
        assert {key: found[key] for key in found if found[key] != base[key]} == changed


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_each_ablation_can_begin(name, monkeypatch):
    """As its base does: the start is not a second thing that is changed."""
    monkeypatch.chdir(FOLDER.parent)
    base = _training(FOLDER / "code_small.gin")
    training = _training(FOLDER / "ablations" / f"{name}.gin")
    assert training == base
    config = configurables.make(RetroConfig, vocab_size=4096)
    settings = Settings(retro=config, training=training)
    with jax.set_mesh(make_mesh(settings.mesh)):
        nnx.eval_shape(model_maker(settings))


def test_the_commands_are_of_entry_points_and_their_flags(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    commands = results.steps("W", "experiments/code_small.gin")
    of_seeds = results.seed_steps("W", "experiments/quickstart.gin", ["one_neighbour"], 3)
    assert [arguments[0].removeprefix("launch.") for _, arguments in of_seeds] == [
        *("train", "train", "evaluate") * 2,
        *("train", "evaluate") * 3,
    ]
    for number, (_, arguments) in enumerate(of_seeds[:6]):
        seed = 1 + number // 3
        assert {"--data=W", f"--workdir=W/seeds/{seed}"} <= set(arguments)
        if arguments[0] == "launch.train":
            assert set(_bound(seed)) < set(arguments)
    homes = ("W", "W/seeds/1", "W/seeds/2")
    for number, (_, arguments) in enumerate(of_seeds[6:]):
        home = f"--workdir={homes[number // 2]}/ablations/one_neighbour"
        assert {"--data=W", home} <= set(arguments)
        if arguments[0] == "launch.train":
            assert "--gin_file=experiments/ablations/one_neighbour.gin" in arguments
            given = [argument for argument in arguments if ".seed = " in argument]
            assert given == (_bound(number // 2) if number >= 2 else [])
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


def test_every_score_has_the_given_neighbours_and_conditions():
    commands = results.seed_steps("W", "experiments/code_small.gin", ["one_neighbour"], 2)
    assert results.scored_with(commands, None, None) == commands
    changed = results.scored_with(commands, 4, ["on", "tokens"])
    for (_, given), (_, found) in zip(commands, changed, strict=True):
        if given[0] != "launch.evaluate":
            assert found == given
        else:
            rest = [each for each in given if each != "--retrieval=on,off"]
            assert found == [*rest, "--num_neighbours=4", "--retrieval=on,tokens"]
            assert len(rest) == len(given) - 1


def _bound(seed: int) -> list[str]:
    """The flags of a seed."""
    return [f"--gin_bindings={of}.seed = {seed}" for of in ("TrainConfig", "BatchConfig")]


def test_figures_of_seeds_and_ablations_are_written(tmp_path: pathlib.Path):
    """From what launch.evaluate left in each run's folder, seed beside seed."""
    scored = [scored_text(seed)[0] for seed in range(3)]
    homes = [tmp_path, tmp_path / "seeds/1"]
    for seed, home in enumerate(homes):
        for folder, sums in ((home, scored[seed]), (home / "ablations/chunk_only", scored[2])):
            (folder / "evaluation").mkdir(parents=True)
            write_scored_text(documents_file(folder / "evaluation", "test"), sums)
    seeds, ablations = seed_parts(tmp_path, homes, ["chunk_only"], "test")
    assert "2 seeds" in seeds and "| chunk only |" in ablations
    written = json.loads((tmp_path / "ablations.json").read_text())
    assert written["sources"] == {
        "whole": [each.source for each in scored[:2]],
        "chunk_only": [scored[2].source] * 2,
    }
    found = written["figures"]["chunk_only"]
    rows = json.loads((tmp_path / "seeds.json").read_text())["figures"]
    figures = rows[-1]["bits_per_byte"]["on"]
    assert found["bits_per_byte"]["whole"] == figures
    first, second = found["bits_per_byte"]["ablated"]["seeds"]
    assert first == second  # one model under both
    assert len(seed_parts(tmp_path, homes[:1], ["chunk_only"], "test")) == 1
    assert seed_parts(tmp_path, homes[:1], [], "test") == []


def test_ablations_of_other_settings_are_refused(tmp_path: pathlib.Path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parent)
    made: list = []
    monkeypatch.setattr(results, "run_steps", made.extend)
    monkeypatch.setattr(results, "results_text", lambda *_: "")
    (tmp_path / "W").mkdir()
    arguments = ["results", f"--workdir={tmp_path / 'W'}", "--gin_file=experiments/quickstart.gin"]
    for more in ([], ["--headline", "--ablations=chunk_only"]):
        assert app.execute(results.main, [*arguments, *more]) == 1
        assert "ablations are of experiments/code_small.gin" in capsys.readouterr().err
        assert not made
    (tmp_path / "ten.gin").write_text(
        f"include '{FOLDER / 'quickstart.gin'}'\nNeighboursConfig.test = 10\n"
        "NeighboursConfig.validation = 4\n"
    )
    ten = f"--gin_file={tmp_path / 'ten.gin'}"
    for more in (["--headline"], ["--ablations=", ten], [ten, "--headline", "--num_neighbours=10"]):
        assert app.execute(results.main, [*arguments, *more]) == 0
        assert made and not any("ablation" in about for about, _ in made)
        made.clear()
    assert app.execute(results.main, [*arguments[:2], "--headline", "--ablations=chunk_only"]) == 0
    assert made[-1][0] == "Score the ablation chunk_only, seed 0"


@pytest.mark.parametrize("given", ["", "off,tokens", "on,orcale"])
def test_conditions_that_cannot_be_scored_are_refused_before_training(
    given, tmp_path: pathlib.Path, monkeypatch, capsys
):
    monkeypatch.setattr(results, "run_steps", pytest.fail)
    assert app.execute(results.main, ["results", f"--workdir={tmp_path}", f"--retrieval={given}"])
    assert f"--retrieval={given}: expected on and some of off, random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--headline", "--num_neighbours=3"], "NeighboursConfig.test is 2: expected at least 3"),
        (
            ["--ablations=", "--num_neighbours=3"],
            "NeighboursConfig.train is 2: expected at least 3",
        ),
        (["--ablations="], "NeighboursConfig.test is 2: expected at least 10"),
        (["--headline", "--gin_bindings=TrainConfig.steps = 3"], "--gin_bindings: expected none"),
        (["--headline", "--print_config"], "--print_config: expected none, but settings in a file"),
        (["--headline", "--gin_file=none.gin"], "cannot read none.gin"),
    ],
)
def test_what_no_step_could_use_is_refused_before_the_first(
    given, told, tmp_path: pathlib.Path, monkeypatch, capsys
):
    monkeypatch.setattr(quickstart, "_call", pytest.fail)
    gin_file = FOLDER / "quickstart.gin"
    arguments = ["results", f"--workdir={tmp_path / 'W'}", f"--gin_file={gin_file}", *given]
    assert app.execute(results.main, arguments)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "W").exists()


def test_mixtures_need_the_validation_table_too(tmp_path: pathlib.Path, monkeypatch, capsys):
    monkeypatch.setattr(results, "run_steps", lambda steps: None)
    monkeypatch.setattr(results, "results_text", lambda *_: "")
    gin_file = FOLDER / "living_docs.gin"  # 2 neighbours in validation, 10 in test
    arguments = ["results", f"--workdir={tmp_path}", f"--gin_file={gin_file}", "--headline"]
    assert app.execute(results.main, [*arguments, "--num_neighbours=4"]) == 0
    assert app.execute(results.main, [*arguments, "--num_neighbours=4", "--retrieval=on,tokens"])
    assert "NeighboursConfig.validation is 2: expected at least 4" in capsys.readouterr().err


def test_what_is_generated_is_replaced_and_nothing_else(tmp_path: pathlib.Path, capsys):
    path = tmp_path / "results.md"
    path.write_text(f"# Results\n\n{generated_part.BEGIN}\nold\n{generated_part.END}\nkept\n")
    text = generated_part.replaced(path, "# Evaluation\n\nnew")
    assert (
        text
        == f"# Results\n\n{generated_part.BEGIN}\n\n## Evaluation\n\nnew\n\n{generated_part.END}\nkept\n"
    )
    path.write_text("# Results\n")
    with pytest.raises(UserError, match=r"results\.md: expected the lines"):
        generated_part.replaced(path, "")
    arguments = ["results", f"--workdir={tmp_path / 'W'}", f"--docs={path}"]
    assert app.execute(results.main, arguments) == 1  # before anything is computed
    assert not (tmp_path / "W").exists()
