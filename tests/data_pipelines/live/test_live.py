"""Live retrieval: of several databases, without some documents, and fixed neighbours of a file."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest

from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.live.database import LiveDatabase, recorded_bert
from data_pipelines.live.settings import LiveSettings, parse_source
from data_pipelines.live.several import FixedNeighbours, SeveralDatabases
from data_pipelines.token_memory.drafts import MemoryDrafts, memory_votes
from retro_jax.errors import UserError
from tests.data_pipelines.token_memory.test_memory import build, write_documents


@dataclasses.dataclass
class Nearest:
    """Stands for a Retriever: chunk i is i + `far` away from every query."""

    database: ChunkDatabase
    far: float = 0.0
    ranking = types.SimpleNamespace(settings={"score": "squared_l2"})

    def neighbours(self, tokens, k, exclude_documents=None):
        ids = np.arange(len(self.database))[:k]
        missing = k - len(ids)
        row = np.r_[ids, np.full(missing, -1)], np.r_[ids + self.far, np.full(missing, np.inf)]
        return tuple(np.repeat(part[None], len(tokens), axis=0) for part in row)


@pytest.fixture(name="chunks")
def _chunks(tmp_path) -> list[ChunkDatabase]:
    """Two databases of 12 and 3 documents of a chunk each."""
    return [
        write_documents(tmp_path / f"W{i}", [[4 + (i + d) % 8] * 9 for d in range(count)])
        for i, count in enumerate((12, 3))
    ]


QUERIES = np.stack([np.full(64, 4), np.full(64, 5)])


class Letters:
    """Stands for a tokeniser."""

    pad_id = 0

    def encode(self, text):
        return np.array([ord(letter) - 96 for letter in text], np.int32)

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def near(chunks: ChunkDatabase, far: float = 0.0) -> LiveDatabase:
    """A database in which the first chunks are the nearest."""
    return LiveDatabase(Nearest(chunks, far), Letters())


def test_excluded_documents_are_never_found(chunks):
    """Ten of twelve, so that more has to be asked for; then all but one."""
    database = near(chunks[0])
    live = database.without([f"made/d{i}" for i in range(10)])
    ids, _ = live.find(QUERIES, 2)
    assert ids.tolist() == [[10, 11]] * 2
    np.testing.assert_array_equal(live.values(ids)[0], chunks[0].values(np.array([10, 11])))
    assert live.neighbour(11, 2.0).document == "d11"
    ids, _ = live.without(["made/d10"]).find(QUERIES, 2)
    assert ids.tolist() == [[11, -1]] * 2
    assert (live.values(ids)[:, 1] == chunks[0].pad_id).all()
    assert database.find(QUERIES, 2)[0].tolist() == [[0, 1]] * 2
    with pytest.raises(UserError, match="holds no document 'd99' of the corpus 'made'"):
        database.without(["made/d99"])
    with pytest.raises(UserError, match="document 'd9': expected CORPUS/ID"):
        database.without(["d9"])


def test_several_databases_share_the_neighbours(chunks):
    """Ids of the second follow those of the first; what one claims comes first."""
    databases = [near(chunks[0]), near(chunks[1], 0.5)]
    live = SeveralDatabases(databases, [0, 0], 3)
    ids, scores = live.find(QUERIES, 3)
    assert ids.tolist() == [[0, 12, 1]] * 2 and scores[0].tolist() == [0, 0.5, 1]
    assert live.shares(ids) == pytest.approx([2 / 3, 1 / 3])
    values = live.values(np.array([[0, 12, -1]]))[0]
    np.testing.assert_array_equal(values[0], chunks[0].value(0))
    np.testing.assert_array_equal(values[1], chunks[1].value(0))
    assert (values[2] == chunks[0].pad_id).all()
    found, (one, none, other) = (
        live.neighbour(14, 2.5),
        live.library().sources(np.array([13, -1, 2]), np.array([1.0, 0, 2.0])),
    )
    assert (found.document, found.score) == ("d2", 2.5)
    assert (one.document.id, none, other.document.id) == ("d1", None, "d2")
    assert [database["database"] for database in live.identity()] == [
        part.manifest.hash for part in chunks
    ]
    ids, _ = SeveralDatabases(databases, [0, 2], 3).find(QUERIES, 3)
    assert ids.tolist() == [[12, 13, 0]] * 2
    ids, _ = live.without(["made/d0"]).find(QUERIES, 3)
    assert ids.tolist() == [[12, 1, 13]] * 2
    with pytest.raises(UserError, match="the databases claim 4 neighbours: expected 3 in all"):
        SeveralDatabases(databases, [0, 4], 3)
    with pytest.raises(UserError, match="k is 2: expected 3"):
        live.find(QUERIES, 2)


def test_fixed_neighbours_are_those_of_the_file(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"text": "abc"}\n\n{"text": "' + "z" * 200 + '"}\n')
    fixed = FixedNeighbours.open(path, Letters(), 2)
    found = fixed.values(fixed.find(QUERIES, 2)[0])
    assert found.shape == (2, 2, 128)
    assert fixed.neighbour(0, 0.0).text == "abc" and fixed.neighbour(0, 0.0).corpus == "facts.jsonl"
    for refused in (lambda: fixed.without(["a/b"]), fixed.library, lambda: fixed.find(QUERIES, 3)):
        with pytest.raises(UserError, match="expected"):
            refused()
    assert found[1, 0].tolist() == [1, 2, 3] + [0] * 125 and (found[0, 1] == 26).all()
    short = FixedNeighbours.open(path, Letters(), 2, "last_96")
    np.testing.assert_array_equal(short.values(np.array([[0, 1]]))[0], found[0, :, :96])
    half = FixedNeighbours.open(path, Letters(), 2, "chunk").values(np.array([[0, 1]]))[0]
    np.testing.assert_array_equal(half[:, :64], found[0, :, :64])
    assert (half[:, 64:] == Letters().pad_id).all()
    for content, message in (
        ("no json", "line 1: expected"),
        ('{"text": 3}', "line 1: expected"),
        ('{"text": "a"}', "has 1 neighbours: expected at least 2"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            FixedNeighbours.open(path, Letters(), 2)
    with pytest.raises(UserError, match="cannot be read"):
        FixedNeighbours.open(tmp_path / "none", Letters(), 2)


def test_settings_that_do_not_go_together_are_refused():
    for fields, message in (
        ({"stride": 48}, "LiveSettings.stride is 48: expected a divisor of 64"),
        ({"file": "x", "revision": 1}, "LiveSettings.file is 'x': expected"),
    ):
        with pytest.raises(UserError, match=message):
            LiveSettings(**fields)
    with pytest.raises(UserError, match="expected none with retrieval off"):
        LiveSettings(exclude=("a/b",)).check_off()
    LiveSettings().check_off()
    assert parse_source("V=2") == ("V", 2) and parse_source("V") == ("V", 0)
    with pytest.raises(UserError, match="expected DIRECTORY or DIRECTORY=NEIGHBOURS"):
        parse_source("V=x")


def test_the_bert_of_the_preparation_is_found(tmp_path):
    settings = tmp_path / "prepare.gin"
    assert recorded_bert(tmp_path) is None
    settings.write_text("KeysConfig.dtype = 'float32'\nKeysConfig.model = 'minilm'\n")
    assert recorded_bert(tmp_path) is None
    settings.write_text(f"KeysConfig.model = {str(tmp_path)!r}\n")
    assert recorded_bert(tmp_path) == str(tmp_path)


def test_a_token_memory_gives_drafts_and_votes(tmp_path):
    """What followed the longest ending, of the token with most votes, across a chunk's end."""
    long = list(np.random.default_rng(0).integers(4, 9, 90))
    memory = build(pathlib.Path(tmp_path), [[9, 10, 11, 4, 5], [10, 11, 4, 6], [10, 11, 7], long])
    drafts = MemoryDrafts(memory)
    length, tokens = drafts(np.array([3, 10, 11]), 2)
    assert length == 2 and tokens.tolist()[0] == 4 and len(tokens) == 2
    length, tokens = drafts(np.array(long[50:58]), 15)
    assert length == 8 and tokens.tolist() == long[58:73]
    length, tokens = drafts(np.array(long[80:88]), 15)
    assert tokens.tolist() == [*long[88:], 2]  # its end
    assert drafts(np.array([3]), 4)[0] == 0
    length, votes = memory_votes(memory)(np.array([10, 11]))
    assert length == 2 and sorted(votes.tolist()) == [4, 4, 7]
    excluding = MemoryDrafts(memory, np.array([0, 1]))
    assert excluding(np.array([10, 11]), 1)[1].tolist() == [7]


@pytest.mark.parametrize("more", [("V", "V=2"), ("W/../V", "V"), ("W",), ("V", "./W")])
def test_a_database_is_searched_once(more, tmp_path, monkeypatch):
    """Twice its neighbours would take the places of others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "W").mkdir()
    with pytest.raises(UserError, match="is searched already: expected each once"):
        LiveSettings(more=more).open("W", Letters(), 2)
