"""Tuning: measured recall and speed, the settings that no other beats, and the choice among them."""

import json

import pytest

from data_pipelines.retriever.index_kind import IndexPlan
from data_pipelines.retriever.index_tuning import (
    Point,
    TuneConfig,
    bindings,
    choose,
    frontier,
    measure,
)
from launch import tune
from launch.common import app
from retro_jax.errors import UserError
from tests.data_pipelines.synthetic import clustered, write_database, write_keys


def point(recall, speed):
    return Point(IndexPlan("tree"), recall, speed)


def test_the_frontier_and_the_choice():
    points = [point(0.9, 100), point(0.95, 50), point(0.94, 40), point(0.99, 10), point(0.9, 90)]
    assert frontier(points) == [point(0.9, 100), point(0.95, 50), point(0.99, 10)]
    assert choose(points, 0.92) == point(0.95, 50)
    with pytest.raises(UserError, match=r"target_recall is 1.0: expected at most 0\.9900"):
        choose(points, 1.0)


def test_more_leaves_find_more_and_the_result_can_be_put_into_a_gin_file(tmp_path, capsys):
    database = write_database(tmp_path / "W" / "chunks" / "train", [2000])
    write_keys(tmp_path / "W" / "keys" / "train", database, clustered(2000))
    settings = "TuneConfig.queries = 50", "TuneConfig.leaves = (1.0,)", "TuneConfig.reorder = (60,)"
    blocks = "TuneConfig.dimensions_per_block = (4,)"
    flags = [f"--gin_bindings={binding}" for binding in (*settings, blocks)]
    assert app.execute(tune.main, ["tune", f"--workdir={tmp_path / 'W'}", *flags]) == 0
    result = json.loads((tmp_path / "W" / "tune.json").read_text())
    recalls = [entry["recall"] for entry in result["points"]]
    assert recalls[0] < 0.9 < 0.95 < recalls[-1]
    assert all(entry["plan"]["num_leaves"] == 45 for entry in result["points"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-5] == "IndexConfig.kind = 'tree'"
    assert printed[-4] == "IndexConfig.num_leaves = 45"


def test_bindings_are_those_of_the_index():
    plan = IndexPlan("tree", 70, 5, 2, 100)
    assert bindings(plan)[1:] == [
        "IndexConfig.num_leaves = 70",
        "IndexConfig.leaves_to_search = 5",
        "IndexConfig.dimensions_per_block = 2",
        "IndexConfig.reorder = 100",
    ]


def test_too_few_keys_are_refused(tmp_path):
    database = write_database(tmp_path / "chunks", [9])
    keys = write_keys(tmp_path / "keys", database, clustered(9))
    with pytest.raises(UserError, match="holds 9 keys: expected more to tune with"):
        measure(keys, TuneConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_recall", 0.0), ("k", 0), ("leaves", ()), ("reorder", (0,)), ("queries", -1)],
)
def test_refuses_a_setting(field, value):
    with pytest.raises(UserError, match=rf"TuneConfig\.{field} is .*: expected"):
        TuneConfig(**{field: value})
