"""The benchmark of generation, on a model that is read in a millisecond."""

import json

import pytest

from benchmarks import blocks, generate, generate_against
from launch.common import app


def test_its_table_has_every_batch_and_position(capsys, tmp_path):
    output = tmp_path / "generate.json"
    arguments = ["--preset=tiny", "--turns=1", "--at_once=1,2", "--at=70", "--database=100"]
    assert app.execute(generate.main, ["benchmark", *arguments, f"--output={output}"]) == 0
    rows = json.loads(output.read_text())["table"]
    assert [(row["texts"], row["position"]) for row in rows] == [(1, 70), (2, 70)]
    assert all(row["step ms"] > 0 and row["reading ms"] > 0 for row in rows)
    assert rows[0]["uncached / step"] > 0 and rows[1]["uncached / step"] is None
    assert "among 100 random keys" in capsys.readouterr().out


def test_blocks_are_compared_with_one_token(capsys):
    arguments = ["--preset=tiny", "--turns=1", "--at_once=2", "--blocks=1,4"]
    assert app.execute(blocks.main, ["benchmark", *arguments]) == 0
    header, row = capsys.readouterr().out.splitlines()[-2:]
    assert header.split()[-3:] == ["4", "over", "1"] and row.split()[0] == "2"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--at=512", "--at=512: expected numbers from 1 to 511"),
        ("--at_once=two", "--at_once=two: expected numbers from 1 to 1024"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(capsys, flag: str, message: str):
    assert app.execute(generate.main, ["benchmark", "--preset=tiny", flag]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_rivals_need_an_interpreter_and_a_name(capsys):
    main = generate_against.main
    assert app.execute(main, ["benchmark"]) == 2
    assert "--rival_torch is missing: expected an interpreter" in capsys.readouterr().err
    assert app.execute(main, ["benchmark", "--rival_torch=/nowhere", "--rivals=x"]) == 2
    assert "--rivals=x: expected transformers or retro-pytorch" in capsys.readouterr().err
