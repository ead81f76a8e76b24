"""Credit by document: what is divided, what is nobody's, and which documents go first."""

import numpy as np

from data_pipelines.evaluation.credit import (
    Credit,
    least_useful,
    neighbour_credit,
    removal_list,
    vote_credit,
    write_credit,
)
from data_pipelines.evaluation.splits import open_split
from data_pipelines.retriever import revisions
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.neighbours import prepare_neighbours
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.workdir.update import named_documents
from retro_jax.storage import files
from tests.data_pipelines.synthetic import clustered, write_database, write_keys


def test_a_gain_is_divided_among_the_documents_that_were_read():
    gains = np.array([6.0, -2.0, 5.0, 1.0])
    documents = np.array([[0, 1, 0], [1, -1, -1], [-1, -1, -1], [3, 3, 3]])
    credit = neighbour_credit(gains, documents, 5)
    np.testing.assert_allclose(credit, [4.0, 2.0 - 2.0, 0.0, 1.0, 0.0])
    assert credit.sum() == gains[[0, 1, 3]].sum()  # without what nothing was read for


def test_a_vote_has_its_token_s_gain():
    credit = vote_credit(np.array([1.0, 2.0, -0.5, 4.0]), np.array([2, 0, -1, 2]), 3)
    np.testing.assert_allclose(credit, [2.0, 0.0, 5.0])
    np.testing.assert_allclose(Credit(np.ones(3), credit).total, [3.0, 1.0, 6.0])


def test_the_least_useful_go_and_removed_ones_are_not_named_again():
    credit = np.array([5.0, 0.0, 0.0, -1.0, 0.0, 9.0])
    sizes = np.array([1, 2, 7, 1, 0, 1])  # document 4 is gone
    assert least_useful(credit, sizes, 0.6).tolist() == [1, 2, 3]
    assert least_useful(credit, sizes, 0.4).tolist() == [2, 3]  # of equal credit the larger
    assert least_useful(credit, sizes, 0).tolist() == []
    assert least_useful(credit, sizes, 1).tolist() == [0, 1, 2, 3, 5]


def test_a_list_names_what_its_lines_can_name(tmp_path):
    lines, listed = removal_list(["c/a", "c/b\r", "c/two\nlines", "c/d\r\r", "c/"])
    assert listed.tolist() == [True, True, False, True, False]
    (tmp_path / "ids").write_bytes("".join(lines).encode())
    names = named_documents([f"@{tmp_path / 'ids'}"])
    assert names == [("c", "a"), ("c", "b\r"), ("c", "d\r\r")]


def test_ids_that_are_no_line_are_left_out_of_the_list(tmp_path):
    ids = ["plain", "two\nlines", "cr\r", "a\u2028b", "in\rside"]
    database = write_database(tmp_path / "chunks" / "train", [1, 2, 1, 1, 1], names=ids)
    keys = write_keys(tmp_path / "keys" / "train", database, clustered(6))
    prepare_index(tmp_path / "index", keys, IndexConfig(kind="exact"))
    queries = write_database(tmp_path / "chunks" / "test", [2], names=["held-out"], seed=1)
    stored = write_keys(tmp_path / "keys" / "test", queries, clustered(2, seed=1))
    place, retriever = tmp_path / "neighbours" / "test", Retriever(Database.open(tmp_path))
    prepare_neighbours(place, stored, retriever, k=2, recall_queries=0)
    split = open_split(tmp_path, "test", neighbours=2)
    text = np.ones((2, 64), bool)
    results = {n: {"nll": f"{n}.npy", "settings": {"neighbours": 2}} for n in ("on", "off")}
    for name in results:
        files.write_array(tmp_path / f"{name}.npy", np.ones((2, 64), np.float32))
    database = revisions.open_database(tmp_path)
    told = write_credit(tmp_path, database, split, text, results, None, share=1.0)
    path = tmp_path / "test-remove.txt"
    assert "; 4 of least credit, 4 of 6 chunks, without 1 whose id is no line of text:" in told
    assert named_documents([f"@{path}"]) == [("made", ids[i]) for i in (0, 2, 3, 4)]
    assert revisions.numbers_of(database, named_documents([f"@{path}"]))
    about = files.read_json(tmp_path / "test-credit.json")
    assert about["nll"] == {"on": "on.npy", "off": "off.npy"}
    assert about["database"] == database.manifest.hash and about["share"] == 1.0
    assert {name: files.measure(tmp_path / name)[1] for name in about["sha256"]} == about["sha256"]
    assert path.name in about["sha256"] and told.endswith("expected --split=validation or train.)")
