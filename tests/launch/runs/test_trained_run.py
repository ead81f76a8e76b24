"""A trained run under bindings: what they change is a part of its identity."""

import json
import pathlib

import pytest

from launch import evaluate
from launch.runs import trained_run
from tests.launch.trained import call

RELU = "RetroConfig.activation = 'relu'"
PART = "BatchConfig.neighbour_part = 'chunk'"


@pytest.mark.parametrize(
    ("bindings", "changed"),
    [
        ([RELU], {"RetroConfig.activation": "'relu'"}),
        (
            [PART, RELU],
            {"RetroConfig.activation": "'relu'", "BatchConfig.neighbour_part": "'chunk'"},
        ),
        (["RetroConfig.d_model = 32"], None),  # as it was trained
        (["BatchConfig.prefetch = 1", "ExecutionConfig.remat = 'full'"], None),
    ],
)
def test_settings_that_change_figures_are_in_the_identity(workdir, trained, bindings, changed):
    plain = trained_run.open_run(workdir / "retro").identity()
    assert set(plain) == {"run", "step", "checkpoint"}  # results of before are found
    found = trained_run.open_run(workdir / "retro", bindings).identity()
    assert found == (plain | {"changed": changed} if changed else plain)


def test_figures_under_bindings_are_not_those_without(
    evaluated: dict, trained: list[str], workdir: pathlib.Path
):
    more = ["--retrieval=on", "--gin_bindings", RELU, "--gin_bindings", PART]
    assert call(evaluate.main, *trained, *more) == 0
    path = workdir / "evaluation" / "test.json"
    changed = json.loads(path.read_text())["on"]
    assert call(evaluate.main, *trained) == 0  # the summary again
    again = json.loads(path.read_text())["on"]
    assert changed["all"]["nats"] != again["all"]["nats"] == evaluated["on"]["all"]["nats"]
