"""docs/python.md, section "Train": its code runs, and trains what it says."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from launch import evaluate
from launch.runs import trained_run
from retro_jax.train.checkpoint import latest_step
from retro_jax.train.curves import read_curve
from retro_jax.train.record import recorded_parents
from tests.launch.trained import call

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "python.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^## Train\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


@pytest.fixture(name="names", scope="module")
def _names(prepared_workdir, tmp_path_factory):
    """The names that the section's code defines, run on a copy of a prepared W."""
    folder = tmp_path_factory.mktemp("python")
    shutil.copytree(prepared_workdir, folder / "W")
    names: dict = {}
    (section,) = _SECTION.findall(PAGE.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in _BLOCK.findall(section):
            exec(compile(block, str(PAGE), "exec"), names)
        yield names, folder / "W"


def test_the_page_trains_a_run_that_the_commands_open(names):
    values, workdir = names
    lines = read_curve(workdir / "retro" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]
    run = trained_run.open_run(workdir / "retro")
    assert (run.step, run.model) == (20, values["settings"].retro)
    assert run.batches == values["data"].batches.config
    trained_run.check_data(run, workdir)
    assert recorded_parents(workdir / "retro") == values["data"].parents


def test_a_hook_stops_a_run_and_the_model_is_used(names):
    values, workdir = names
    assert values["reached"] == latest_step(workdir / "second" / "checkpoints") == 10
    assert list(values["norms"]) == [5, 10]
    assert values["logits"].shape == (8, 128, values["data"].vocab_size)
    assert np.isfinite(values["logits"]).all()


def test_the_scores_are_those_of_the_command(names):
    values, workdir = names
    assert call(evaluate.main, f"--workdir={workdir}", "--retrieval=on") == 0
    results = json.loads((workdir / "evaluation" / "test.json").read_text())["on"]["corpora"]
    assert values["scores"].keys() == results.keys()
    for corpus, score in values["scores"].items():
        expected = results[corpus]["bits_per_byte"]
        assert score.bits_per_byte == pytest.approx(expected, rel=1e-5)
