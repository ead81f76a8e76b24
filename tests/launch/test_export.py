"""retro export: tables that pandas reads, with the values of the artefacts themselves."""

import numpy as np
import pytest
from flax import nnx
from pyarrow import feather, parquet

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.export import export_chunks, export_neighbours
from data_pipelines.retriever.neighbour_table import NeighbourTable
from launch import export
from retro_jax.errors import UserError
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.portable import open_portable
from retro_jax.train.trained_model import open_trained
from tests.launch.trained import call


def test_chunks(prepared_workdir, tmp_path):
    database = ChunkDatabase.open(prepared_workdir / "chunks" / "test")
    tokenizer = Tokenizer.open(prepared_workdir / "tokenizer")
    flags = [f"--workdir={prepared_workdir}", "--what=chunks", f"--to={tmp_path / 'x.parquet'}"]
    assert call(export.main, *flags) == 0
    rows = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["chunk"] for row in rows] == list(range(len(database)))
    every = np.arange(len(database))
    np.testing.assert_array_equal([row["tokens"] for row in rows], database.chunks(every))
    assert sum(row["first"] for row in rows) == database.num_documents
    owners = database.documents(every).tolist()
    for row, owner in zip(rows, owners, strict=True):
        record = database.record(owner)
        assert (row["document"], row["corpus"]) == (record.id, record.corpus)
    text = "".join(row["text"] for row, owner in zip(rows, owners) if owner == owners[0])
    assert text == tokenizer.decode(database.chunks(every[np.array(owners) == owners[0]]).ravel())


def test_neighbours(prepared_workdir, tmp_path):
    table = NeighbourTable.open(prepared_workdir / "neighbours" / "test")
    database = ChunkDatabase.open(prepared_workdir / "chunks" / "train")
    path = tmp_path / "x.feather"
    count = export_neighbours(prepared_workdir, "test", path)
    columns = feather.read_table(path).to_pydict()
    ids, scores = table.ids(np.arange(len(table))), table.scores(np.arange(len(table)))
    assert count == len(columns["chunk"]) == (ids >= 0).sum()
    np.testing.assert_array_equal(ids[columns["chunk"], columns["rank"]], columns["neighbour"])
    np.testing.assert_array_equal(scores[columns["chunk"], columns["rank"]], columns["score"])
    record = database.record(int(database.documents(np.array(columns["neighbour"][:1]))[0]))
    assert columns["neighbour_document"][0] == record.id


def test_scores(evaluated, trained, tmp_path):
    flags = [*trained, "--what=scores", f"--to={tmp_path / 'x.parquet'}"]
    assert call(export.main, *flags) == 0
    columns = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    for condition, result in evaluated.items():
        mine = np.array(columns["condition"]) == condition
        assert np.array(columns["tokens"])[mine].sum() == result["all"]["tokens"]
        np.testing.assert_allclose(
            np.array(columns["nats"])[mine].sum(), result["all"]["nats"], rtol=1e-6
        )


def test_a_model(trained, workdir, tmp_path):
    assert call(export.main, *trained, "--what=model", f"--to={tmp_path / 'm'}") == 0
    ours = named_leaves(nnx.split(open_trained(workdir / "retro").model)[1])
    theirs = named_leaves(nnx.split(open_portable(tmp_path / "m"))[1])
    for name, leaf in ours.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]))


def test_what_cannot_be_written(prepared_workdir, tmp_path, capsys):
    with pytest.raises(UserError, match=r"x.csv has no known form: expected a name with one of"):
        export_chunks(prepared_workdir, "test", tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"--split=none: there is no"):
        export_chunks(prepared_workdir, "none", tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())
    flags = [f"--workdir={prepared_workdir}", "--what=scores", "--to=x.parquet"]
    assert call(export.main, *flags) == 1
    assert "test.json is missing: expected the result of launch.evaluate" in capsys.readouterr().err
