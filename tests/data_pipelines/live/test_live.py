"""Live retrieval: of several databases, without some documents, and fixed neighbours of a file."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest

from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.retriever.live import (
    FixedNeighbours,
    LiveRetrieval,
    SearchedDatabase,
    Source,
    recorded_bert,
)
from data_pipelines.retriever.live_settings import LiveSettings
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


def test_excluded_documents_are_never_found(chunks):
    """Ten of twelve, so that more has to be asked for; then all but one."""
    excluded = [("made", f"d{i}") for i in range(10)]
    live = LiveRetrieval([SearchedDatabase(Nearest(chunks[0]), exclude=excluded)], 2)
    np.testing.assert_array_equal(
        live(QUERIES), np.stack([chunks[0].values(np.array([10, 11]))] * 2)
    )
    assert [place.chunk for place in live.found(QUERIES[0])] == [10, 11]
    excluded.append(("made", "d10"))
    live = LiveRetrieval([SearchedDatabase(Nearest(chunks[0]), exclude=excluded)], 2)
    found = live(QUERIES)
    assert [place.chunk for place in live.found(QUERIES[1])] == [11]
    assert (found[:, 1] == chunks[0].pad_id).all()
    with pytest.raises(UserError, match="holds no document 'd99' of the corpus 'made'"):
        SearchedDatabase(Nearest(chunks[0]), exclude=[("made", "d99")])


def test_several_databases_share_the_neighbours(chunks):
    near, far = SearchedDatabase(Nearest(chunks[0])), SearchedDatabase(Nearest(chunks[1], 0.5))
    live = LiveRetrieval([near, far], 3)
    live(QUERIES)
    places = [(place.source, place.chunk) for place in live.found(QUERIES[0])]
    assert places == [(0, 0), (1, 0), (0, 1)]
    assert live.shares() == pytest.approx([2 / 3, 1 / 3])
    far.claimed = 2
    live = LiveRetrieval([near, far], 3)
    live(QUERIES)
    places = [(place.source, place.chunk) for place in live.found(QUERIES[0])]
    assert places == [(1, 0), (1, 1), (0, 0)]
    far.claimed = 4
    with pytest.raises(UserError, match="the databases claim 4 neighbours: expected 3 in all"):
        LiveRetrieval([near, far], 3)


class Letters:
    """Stands for a tokeniser."""

    pad_id = 0

    def encode(self, text):
        return np.array([ord(letter) - 96 for letter in text], np.int32)


def test_fixed_neighbours_are_those_of_the_file(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"text": "abc"}\n\n{"text": "' + "z" * 200 + '"}\n')
    fixed = FixedNeighbours.open(path, Letters(), 2)
    found = fixed(QUERIES)
    assert found.shape == (2, 2, 128)
    assert found[1, 0].tolist() == [1, 2, 3] + [0] * 125 and (found[0, 1] == 26).all()
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
    assert Source.parse("V=2") == Source("V", neighbours=2)
    with pytest.raises(UserError, match="expected DIRECTORY or DIRECTORY=NEIGHBOURS"):
        Source.parse("V=x")


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
