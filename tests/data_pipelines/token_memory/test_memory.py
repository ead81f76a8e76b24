"""The token memory against a search that compares every ending, on small random documents."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.artefacts.runner import LocalProcesses
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.token_memory import TokenMemory
from data_pipelines.token_memory.build import TokenMemoryConfig, prepare_token_memory
from retro_jax.errors import UserError

PAD, BOS, EOS = 0, 1, 2
Documents = Sequence[Sequence[int]]


def write_documents(
    folder: pathlib.Path, documents: Documents, shards: int = 1, *, vocab_size: int = 12
) -> ChunkDatabase:
    """A chunk database of given tokens: bos, a document's own, eos, padding."""
    stage = Stage(
        folder,
        "chunks",
        {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "vocab_size": vocab_size},
    )
    lines, counts, total = [], [], 0
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    for i, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        rows, owners = [np.zeros((0, 64), dtype)], []
        for d in part:
            tokens = np.array([BOS, *documents[d], EOS])
            padded = np.full(-(-len(tokens) // 64) * 64, PAD, dtype)
            padded[: len(tokens)] = tokens
            rows.append(padded.reshape(-1, 64))
            owners += [d] * len(rows[-1])
            fields = {"id": f"d{d}", "corpus": "made", "first_chunk": total + len(owners)}
            lines.append(json.dumps(fields | {"chunks": 1, "bytes": 0, "words": 0, "lines": 0}))
        stage.write_array(f"chunks-{i:05d}.npy", np.concatenate(rows))
        stage.write_array(f"documents-{i:05d}.npy", np.array(owners, np.int32))
        counts.append(len(owners))
        total += len(owners)
    text = "".join(f"{line}\n" for line in lines).encode()
    stage.write_file("documents.jsonl", lambda file: file.write(text))
    corpora = {"made": {"ranges": [[0, total]]}}
    stage.finish(
        {"documents": len(documents), "chunks": total, "shards": counts, "corpora": corpora}
    )
    return ChunkDatabase.open(folder)


def build(folder: pathlib.Path, documents: Documents, part_tokens: int = 1 << 20) -> TokenMemory:
    """The token memory of documents."""
    database = write_documents(folder / "chunks", documents)
    prepare_token_memory(folder / "memory", database, TokenMemoryConfig(part_tokens))
    return TokenMemory.open([folder / "memory"], database)


def brute_force(
    documents: Documents, text: Sequence[int], longest: int, barred: Sequence[int] = ()
) -> tuple[int, list[tuple[int, int]]]:
    """The length of the longest ending that occurs, and the (document, next token) after each."""
    for length in range(min(longest, len(text)), 0, -1):
        ending, votes = list(text[-length:]), []
        for number, document in enumerate(documents):
            tokens = [BOS, *document, EOS]
            if number in barred:
                continue
            for i in range(length, len(tokens)):
                if tokens[i - length : i] == ending:
                    votes.append((number, tokens[i]))
        if votes:
            return length, sorted(votes)
    return 0, []


tokens = st.integers(3, 6)
documents = st.lists(st.lists(tokens, max_size=150), min_size=1, max_size=6)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents,
    st.lists(tokens, min_size=1, max_size=40),
    st.integers(1, 12),
    st.sampled_from([1, 64, 1 << 20]),
    st.sets(st.integers(0, 5), max_size=3),
)
def test_equals_a_search_of_every_ending(
    tmp_path_factory, documents, text, longest, part_tokens, removed
):
    memory = build(tmp_path_factory.mktemp("memory"), documents, part_tokens)
    memory.database.removed = np.array(sorted(d for d in removed if d % 2), np.int64)
    exclude = np.array(sorted(d for d in removed if not d % 2), np.int64)
    text = [BOS, *text]
    for end in (1, len(text) // 2, len(text)):
        match = memory.match(np.array(text[:end]), longest=longest, most_votes=0, exclude=exclude)
        length, votes = brute_force(documents, text[:end], longest, removed)
        assert match.length == length
        assert sorted(zip(match.documents.tolist(), match.tokens.tolist())) == votes
        chunks = memory.database.chunks(match.chunks)
        np.testing.assert_array_equal(chunks[np.arange(len(chunks)), match.places], match.tokens)


def test_many_occurrences_choose_some_of_documents_that_may_vote(tmp_path):
    documents = [[3, 4, 5] * 40, [3, 4, 6] * 40, [3, 4, 7]]
    memory = build(tmp_path, documents)
    text = np.array([BOS, 8, 3, 4])
    match = memory.match(text, most_votes=10)
    assert (match.length, len(match.tokens), match.occurrences) == (2, 10, 81)
    memory.database.removed = np.array([0, 1])
    alone = memory.match(text, most_votes=1)
    assert (alone.tokens.tolist(), alone.documents.tolist()) == ([7], [2])
    assert alone.share(7) == 1 and alone.share(8) == 0
    assert memory.match(text, exclude=np.array([2])).length == 0  # no document may vote
    memory.database.removed = np.array([0])  # takes no other's place among the votes
    left = memory.match(text, most_votes=10)
    assert len(left.tokens) == 10 and 0 not in left.documents


def test_an_empty_text_and_the_end_of_a_document_have_no_match(tmp_path):
    memory = build(tmp_path, [[3, 4]])
    for text in ([], [BOS, 3, 4, EOS], [9]):
        match = memory.match(np.array(text, np.int64))
        assert (match.length, len(match.tokens)) == (0, 0)


def test_large_vocabularies_have_four_bytes_a_token(tmp_path):
    documents = [[70_000, 256, 70_001], [70_000, 257, 70_002]]
    database = write_documents(tmp_path / "chunks", documents, vocab_size=80_000)
    manifest = prepare_token_memory(tmp_path / "memory", database)
    assert manifest.fact("token_bytes") == 4
    memory = TokenMemory.open([tmp_path / "memory"], database)
    assert memory.match(np.array([5, 70_000, 257])).tokens.tolist() == [70_002]
    assert sorted(memory.match(np.array([5, 70_000])).tokens.tolist()) == [256, 257]


def test_many_shards_and_any_runner_give_the_same_bytes(tmp_path):
    documents = [[3 + d % 5, 4, 5] for d in range(200)]
    database = write_documents(tmp_path / "chunks", documents, shards=200)
    config = TokenMemoryConfig(64 * 60)
    one = prepare_token_memory(tmp_path / "one", database, config)
    two = prepare_token_memory(tmp_path / "two", database, config, runner=LocalProcesses(2))
    assert one == two and len(one.fact("parts")) == 4
    assert one.fact("tokens") == 1000
    memory = TokenMemory.open([tmp_path / "one"], database)
    assert memory.match(np.array([BOS, 3]), most_votes=0).occurrences == 40


def test_an_empty_database_has_no_votes(tmp_path):
    database = write_documents(tmp_path / "chunks", [])
    prepare_token_memory(tmp_path / "memory", database)
    assert TokenMemory.open([tmp_path / "memory"], database).match(np.array([BOS])).length == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other", "do not belong together"),
        ("missing", "expected the token memory of"),
        ("count", "2 token memories for the 1 parts"),
    ],
)
def test_bad_input_is_one_line(tmp_path, change, message):
    memory = build(tmp_path, [[3, 4, 5]])
    folders, database = [tmp_path / "memory"], memory.database
    if change == "other":
        database = write_documents(tmp_path / "others", [[4, 4]])
    elif change == "missing":
        folders = [tmp_path / "nowhere"]
    else:
        folders *= 2
    with pytest.raises(UserError, match=message):
        TokenMemory.open(folders, database)
