"""docs/python.md, section "Prepare": its code runs, and prepares what it says."""

import pathlib
import re

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.neighbour_table import NeighbourTable

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "python.md"


def code_of(section):
    """The Python of one section."""
    text = PAGE.read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))


def test_the_code_prepares_a_workdir(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = code_of("Prepare")
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(PAGE), "exec"), {})
    out = capsys.readouterr().out
    stages = ["documents", "leakage", "tokenizer", "chunks", "duplicates", "bm25", "neighbours"]
    for name in stages:
        assert f"{name}: ...\n{name}: " in out
    database = ChunkDatabase.open("W/chunks/train")
    table = NeighbourTable.of(tmp_path / "W", "train", database, database)
    assert (table.k, table.retriever) == (2, "bm25")
    assert sum(int(n) for n in re.findall(r"(\d+) (?:train|validation|test)[,;]", out)[:3]) == 200
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.count("(there already)") == len(stages)
