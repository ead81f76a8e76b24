"""BM25 equals its formula written out, as a retriever of its own and as a judge of dense candidates."""

import math
import shutil

import numpy as np
import pytest

from data_pipelines.artefacts.runner import InProcess, LocalProcesses
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever import bm25, neighbour_facts, postings, publishing, revisions
from data_pipelines.retriever.bm25 import Bm25, Bm25Config, prepare_bm25
from data_pipelines.retriever.index_shard import compare_all
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.neighbours import NeighboursConfig, prepare_neighbours
from data_pipelines.retriever.queries import OwnDocuments, StoredChunks
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Ranking, Retriever
from retro_jax.errors import UserError
from tests.data_pipelines.small import tree
from tests.data_pipelines.synthetic import clustered, retriever, write_database

LENGTHS = [3, 1, 4, 2, 5, 1, 6, 3, 2, 4, 1, 8]
N = sum(LENGTHS)


def fill(database, seed=0):
    """Gives a database chunks whose tokens repeat, some short, one with nothing but eos."""
    rng = np.random.default_rng(seed)
    rows = np.minimum(3 + rng.geometric(0.04, (len(database), 64)), 299).astype(np.uint16)
    for row in range(0, len(rows), 7):
        rows[row, rng.integers(5, 60) :] = database.pad_id
    rows[1, 0], rows[1, 1], rows[1, 2:] = database.bos_id, database.eos_id, database.pad_id
    rows[5] = rows[-1]
    for number, ids in enumerate(database.shards):
        np.save(database.directory / f"chunks-{number:05d}.npy", rows[ids.start : ids.stop])
    return ChunkDatabase.open(database.directory)


def reference(queries, rows, k1=1.5, b=0.75, kept=None):
    """[q, n] scores by the formula, term by term; minus infinity for a chunk that is not kept."""
    terms = [[token for token in row.tolist() if token > 2] for row in rows]
    kept = [n for n in range(len(rows)) if terms[n] and (kept is None or n in kept)]
    mean = sum(len(terms[n]) for n in kept) / len(kept)
    found = np.full((len(queries), len(rows)), -np.inf)
    for q, query in enumerate(queries.tolist()):
        for n in kept:
            total = 0.0
            for token in query:
                held = sum(token in terms[other] for other in kept)
                count = terms[n].count(token)
                if token > 2 and count:
                    idf = math.log(1 + (len(kept) - held + 0.5) / (held + 0.5))
                    total += idf * count / (count + k1 * (1 - b + b * len(terms[n]) / mean))
            found[q, n] = total if total else -np.inf
    return found


def best(scores, k):
    """The k best of each row: scores, minus infinity where there are no more."""
    return -np.sort(-scores, axis=1)[:, :k]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A database with keys, its terms, and the scores of each chunk for each by the formula."""
    folder = tmp_path_factory.mktemp("bm25")
    found = retriever(folder, LENGTHS, clustered(N), shards=3)
    database = fill(found.database)
    prepare_bm25(folder / "bm25", database, Bm25Config())
    rows = database.chunks(np.arange(N))
    return folder, database, reference(rows, rows)


def own(database, scores):
    """Scores without those of the query's document."""
    owners = database.documents(np.arange(N))
    return np.where(owners[:, None] == owners[None], -np.inf, scores)


def open_retriever(made, name, candidates=10):
    folder, database, _ = made
    keys = Keys.open(folder / "keys" / "train", database)
    index = revisions.open_index(keys, folder)
    terms = Bm25.open(folder / "bm25", database)
    source = Database(database, keys=keys, index=index, bm25=terms)
    return Retriever(source, Ranking(name, candidates))


def test_scores_are_those_of_the_formula(made):
    folder, database, expected = made
    terms = Bm25.open(folder / "bm25", database, verify=True)
    every = np.tile(np.arange(N), (N, 1))
    scores = terms.score(database.chunks(np.arange(N)), every)
    np.testing.assert_allclose(scores, np.maximum(expected, 0), rtol=1e-5, atol=1e-6)
    none = terms.score(database.chunks(np.arange(2)), np.array([[3, -1], [-1, -1]]))
    assert np.isneginf(none[[0, 1, 1], [1, 0, 1]]).all() and np.isfinite(none[0, 0])
    assert terms.manifest.fact("indexed") == N - 1


@pytest.mark.parametrize("k", [1, 4, N + 5])
def test_search_finds_the_best_of_other_documents(made, k):
    folder, database, expected = made
    terms = Bm25.open(folder / "bm25", database)
    tokens, owners = database.chunks(np.arange(N)), database.documents(np.arange(N))
    ids, scores = terms.search(tokens, k, owners)
    truth = np.pad(own(database, expected), ((0, 0), (0, 5)), constant_values=-np.inf)
    np.testing.assert_allclose(scores, best(truth, k), rtol=1e-5)
    np.testing.assert_array_equal(ids >= 0, np.isfinite(scores))
    assert not (database.documents(ids) == owners[:, None])[ids >= 0].any()
    assert (ids[1] == -1).all(), "a chunk without terms"
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)
    free, _ = terms.search(tokens, 2)
    assert free[-1].tolist() == [5, N - 1], "equal chunks by id"


@pytest.mark.parametrize(("part_chunks", "parts"), [(1, 3), (26, 2)])
def test_parts_find_what_the_whole_finds(made, tmp_path, part_chunks, parts):
    folder, database, _ = made
    whole = Bm25.open(folder / "bm25", database)
    runner = LocalProcesses(1) if parts == 2 else InProcess()
    settings = {"part_chunks": part_chunks, "runner": runner}
    manifest = prepare_bm25(tmp_path / "bm25", database, Bm25Config(), **settings)
    cut = Bm25.open(tmp_path / "bm25", database)
    assert len(cut.parts) == len(manifest.fact("parts")) == parts
    tokens, owners = database.chunks(np.arange(N)), database.documents(np.arange(N))
    for k in (1, 3, N):
        for one, other in zip(whole.search(tokens, k, owners), cut.search(tokens, k, owners)):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(cut.containing(), whole.containing())
    terms = bm25.is_term(tokens, database)
    held = [len({row for row in range(N) if t in tokens[row][terms[row]]}) for t in range(300)]
    np.testing.assert_array_equal(cut.containing(), held)
    for name, terms in (("one", whole), ("cut", cut)):
        found = Retriever(Database(database, bm25=terms), Ranking("bm25"))
        prepare_neighbours(tmp_path / name, database, found, k=3, recall_queries=5)
    for name in ("neighbours-00001.npy", "scores-00002.npy"):
        one, more = (np.load(tmp_path / place / name) for place in ("one", "cut"))
        np.testing.assert_array_equal(one, more)


@pytest.mark.parametrize("seed", range(4))
def test_lists_that_are_not_read_have_none_of_the_best(tmp_path, monkeypatch, seed):
    """Many chunks of few terms, so that a search ends before its longest lists."""
    rng = np.random.default_rng(seed)
    database = write_database(tmp_path / "chunks", [5] * 60, shards=2)
    rows = np.minimum(3 + rng.zipf(1.3, (300, 64)), 299).astype(np.uint16)
    copies = rng.integers(0, 300, (2, 80))
    rows[copies[0], :40] = rows[copies[1], :40]
    for number, ids in enumerate(database.shards):
        np.save(database.directory / f"chunks-{number:05d}.npy", rows[ids.start : ids.stop])
    monkeypatch.setattr(postings, "_FEW", 20)
    prepare_bm25(tmp_path / "bm25", database, Bm25Config())
    terms = Bm25.open(tmp_path / "bm25", database)
    tokens, owners = database.chunks(np.arange(300)), database.documents(np.arange(300))
    among = rng.random(300) < 0.7
    every = terms.score(tokens, np.tile(np.arange(300), (300, 1)))
    for k, wanted in ((1, None), (5, None), (5, among)):
        kept = owners[:, None] != owners[None]
        kept &= True if wanted is None else wanted[None]
        truth = best(np.where(kept & (every > 0), every, -np.inf), k)
        np.testing.assert_allclose(terms.search(tokens, k, owners, wanted)[1], truth, rtol=1e-6)
    read = [terms.parts[0].candidates(row[row > 2], 1) for row in tokens]
    assert np.median([len(ids) for ids in read]) <= 21


def test_terms_from_before_there_were_parts_are_still_read(made, tmp_path):
    folder, database, _ = made
    new = Bm25.open(folder / "bm25", database)
    places, scores, ends, _ = postings.mapped_lists(folder / "bm25", 0)
    old = tmp_path / "bm25"
    stage = Stage(
        old, "bm25", new.manifest.settings, {"database": (database.manifest, database.directory)}
    )
    indexed = np.flatnonzero(new.has_terms(database.chunks(np.arange(N))))
    arrays = {"chunk-ids": indexed, "scores": scores, "ends": ends}
    arrays["places"] = np.searchsorted(indexed, places).astype(np.int32)
    for name, array in arrays.items():
        stage.write_array(f"{name}.npy", array)
    weights = [f"weights-{shard:05d}.npy" for shard in range(3)]
    for name in weights:
        stage.write_array(name, np.load(folder / "bm25" / name))
    facts = {"chunks": N, "indexed": len(indexed), "postings": len(scores)}
    stage.finish(facts, [*(f"{name}.npy" for name in arrays), *weights])
    found = Bm25.open(old, database)
    tokens, owners = database.chunks(np.arange(N)), database.documents(np.arange(N))
    for one, other in zip(found.search(tokens, 3, owners), new.search(tokens, 3, owners)):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.containing(), new.containing())


def test_so_many_terms_that_counts_do_not_fit_are_counted_in_parts(made, monkeypatch):
    folder, database, _ = made
    terms = Bm25.open(folder / "bm25", database)
    tokens, ids = database.chunks(np.arange(N)), np.arange(2 * N).reshape(N, 2) % N
    whole = terms.score(tokens, ids)
    monkeypatch.setattr(bm25, "_COUNTS", 1000)
    np.testing.assert_array_equal(terms.score(tokens, ids), whole)


@pytest.mark.parametrize("name", ["bm25", "dense+bm25"])
def test_a_table_is_what_live_retrieval_finds_and_the_formula(made, tmp_path, name):
    _, database, expected = made
    found = open_retriever(made, name)
    queries = found.keys if name == "dense+bm25" else database
    settings = {"k": 4, "recall_queries": N}
    manifest = prepare_neighbours(tmp_path / "table", queries, found, **settings)
    table = NeighbourTable.open(tmp_path / "table", database, database)
    ids, owners = np.arange(N), database.documents(np.arange(N))
    truth = own(database, expected)
    if name == "dense+bm25":  # among the ten nearest keys
        near, _ = compare_all(found.keys, found.keys.rows(ids), 10, owners)
        among = np.zeros((N, N), bool)
        among[ids[:, None], near] = True
        truth = np.where(among, np.maximum(truth, 0), -np.inf)
        np.testing.assert_array_equal(manifest.settings["candidates"], 10)
        assert {"keys", "index", "bm25"} < set(manifest.parents)
    else:
        assert set(manifest.parents) == {"chunks", "database", "bm25"}
    np.testing.assert_allclose(table.scores(ids), best(truth, 4), rtol=1e-5, atol=1e-6)
    assert (table.retriever, table.score) == (name, "bm25")
    assert manifest.fact("retriever") == manifest.settings["retriever"] == name
    assert manifest.fact("recall")["recall"] == 1.0
    assert manifest.fact("queries") == (N - 1 if name == "bm25" else N)
    asked = StoredChunks(queries, ids)
    live, scores = found.search.find(asked, 4, owners)
    np.testing.assert_array_equal(live, table.ids(ids))
    np.testing.assert_array_equal(scores, table.scores(ids))
    np.testing.assert_allclose(
        found.search.scores_of(asked, live), np.where(live < 0, -np.inf, scores), rtol=1e-6
    )


def test_tables_are_the_same_over_processes_and_index_shards(made, tmp_path):
    _, database, _ = made
    found = open_retriever(made, "bm25")
    settings = {"k": 3, "recall_queries": 5}
    prepare_neighbours(tmp_path / "a", database, found, **settings)
    prepare_neighbours(tmp_path / "b", database, found, **settings, runner=LocalProcesses(1))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    for place, most in (("one", 0), ("more", 20)):
        folder = tmp_path / place
        dense = retriever(folder, LENGTHS, clustered(N), shards=3, shard_keys=most)
        database = fill(dense.database)
        prepare_bm25(folder / "bm25", database, Bm25Config())
        judged = open_retriever((folder, database, None), "dense+bm25")
        assert len(judged.search.parts) == (1 if place == "one" else 2)
        prepare_neighbours(folder / "table", judged.keys, judged, **settings)
    for name in ("neighbours-00001.npy", "scores-00002.npy"):
        one, more = (np.load(tmp_path / place / "table" / name) for place in ("one", "more"))
        np.testing.assert_array_equal(one, more)


def test_recall_counts_scores_from_above():
    found = np.array([[9.0, 5.0], [3.0, -np.inf], [-np.inf, -np.inf]])
    truth = np.array([[9.0, 7.0], [3.0, -np.inf], [-np.inf, -np.inf]])
    assert neighbour_facts.recall(found, truth, True) == 2 / 3
    assert neighbour_facts.recall(truth, truth, True) == 1.0


def test_removed_documents_and_the_same_document_elsewhere_are_left_out(made, tmp_path):
    folder, _, _ = made
    workdir = shutil.copytree(folder, tmp_path / "W")
    base = ChunkDatabase.open(workdir / "chunks" / "train")
    publishing.publish(workdir, 1, [4, 6])
    database = revisions.open_database(workdir)
    manifest = prepare_bm25(workdir / "revisions/00001/bm25", database, Bm25Config(k1=1.2, b=0.5))
    assert manifest.revision == 1
    terms = Bm25.open(workdir / "revisions/00001/bm25", database)
    names = ["document-2", "elsewhere"]
    queries = fill(write_database(tmp_path / "queries", [3, 3], names=names), seed=1)
    tokens, ids = queries.chunks(np.arange(6)), np.arange(N)
    kept = set(np.flatnonzero(~np.isin(base.documents(ids), [4, 6])).tolist())
    truth = reference(tokens, base.chunks(ids), 1.2, 0.5, kept)
    truth[:3, base.documents(ids) == 2] = -np.inf
    found, scores = terms.search(tokens, 6, OwnDocuments(queries, database).of(np.arange(6)))
    np.testing.assert_allclose(scores, best(truth, 6), rtol=1e-5)
    assert not database.is_removed(database.documents(found)).any()


def test_is_made_once_and_other_settings_or_databases_are_refused(made, tmp_path):
    folder, database, _ = made
    again = prepare_bm25(tmp_path / "again", database, Bm25Config())
    assert tree(tmp_path / "again") == tree(folder / "bm25")
    assert prepare_bm25(tmp_path / "again", database, Bm25Config()) == again
    with pytest.raises(UserError, match=r"other settings: k1: 1\.5 -> 2\.0; expected"):
        prepare_bm25(tmp_path / "again", database, Bm25Config(k1=2.0))
    other = write_database(tmp_path / "other", [2, 2], seed=3)
    with pytest.raises(UserError, match="do not belong together: expected database"):
        Bm25.open(folder / "bm25", other)


def test_a_database_without_terms_finds_nothing(tmp_path):
    database = write_database(tmp_path / "chunks", [1, 1])
    np.save(tmp_path / "chunks" / "chunks-00000.npy", np.zeros((2, 64), np.uint16))
    manifest = prepare_bm25(tmp_path / "bm25", database, Bm25Config())
    assert (manifest.fact("indexed"), manifest.fact("postings")) == (0, 0)
    ids, scores = Bm25.open(tmp_path / "bm25", database).search(np.full((1, 64), 7), 2)
    assert ids.tolist() == [[-1, -1]] and np.isneginf(scores).all()


def test_the_ranking_is_that_of_the_tables(made, tmp_path):
    _, database, _ = made
    assert Ranking.of(tmp_path) == Ranking()
    for name in ("bm25", "dense+bm25", "dense"):
        found = open_retriever(made, name, candidates=7)
        queries = database if name == "bm25" else found.keys
        place = tmp_path / name / "neighbours" / "train"
        manifest = prepare_neighbours(place, queries, found, k=2, recall_queries=0)
        assert Ranking.of(tmp_path / name).settings == found.ranking.settings
        assert ("retriever" in manifest.settings) == (name != "dense")
    with pytest.raises(UserError, match=r"score: \"bm25\" -> \"squared_l2\""):
        prepare_neighbours(
            tmp_path / "bm25/neighbours/train", found.keys, found, k=2, recall_queries=0
        )


def test_keys_that_are_not_there_are_one_line(made):
    found = Retriever(Database(made[1], bm25=made[2]), Ranking("bm25"))
    with pytest.raises(
        UserError, match="is searched by BM25 alone: expected the retriever 'dense'"
    ):
        _ = found.keys


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever": "bm26"}, r"NeighboursConfig.retriever is 'bm26': expected one of \('dense'"),
        ({"candidates": 0}, "NeighboursConfig.candidates is 0: expected a positive number"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        NeighboursConfig(**settings)


def test_bad_numbers_are_one_line():
    for settings, message in (({"k1": -1.0}, "k1 is -1.0"), ({"b": 2.0}, "b is 2.0: expected a")):
        with pytest.raises(UserError, match=f"Bm25Config.{message}"):
            Bm25Config(**settings)
