"""The token memory of a workdir with revisions: each has its own, removed documents do not vote."""

import numpy as np
import pytest

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.trace_sources import DatabaseLibrary
from data_pipelines.retriever import revisions
from data_pipelines.token_memory.workdir_memory import FOLDER, open_existing, prepare_and_open
from tests.conftest_prepared import run_prepare
from tests.data_pipelines.small import tree


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A small W with two revisions: one adds documents and removes one, one removes another."""
    folder = tmp_path_factory.mktemp("token_memory")
    texts = {f"t{i}": f"the harbour of town {i} was quiet {i * 7}" for i in range(12)}
    for part, names in (("old", sorted(texts)[:9]), ("new", sorted(texts)[9:])):
        (folder / part).mkdir()
        for name in names:
            (folder / part / f"{name}.txt").write_text(texts[name] * 3)
    settings = folder / "settings.gin"
    settings.write_text(_settings(folder / "old"))
    assert run_prepare(folder / "W", settings) == 0
    more = folder / "more.gin"
    more.write_text(_settings(folder / "new").replace("'old'", "'new'"))
    assert run_prepare(folder / "W", more, "--append") == 0
    return folder / "W"


def _settings(folder):
    return f"""
text/CorpusConfig.name = '{folder.name}'
text/CorpusConfig.kind = 'text'
text/CorpusConfig.path = '{folder}'
text/CorpusConfig.split = 'train'
DocumentsConfig.corpora = (@text/CorpusConfig(),)
LeakageConfig.threshold = None
TokenizerConfig.vocab_size = 300
NeighboursConfig.retriever = 'bm25'
NeighboursConfig.train = 1
"""


def test_every_revision_has_its_own_and_is_built_once(workdir):
    database = revisions.open_database(workdir)
    assert open_existing(database) is None
    memory = prepare_and_open(database)
    found = open_existing(database)
    assert found is not None and found.hashes == memory.hashes
    assert (workdir / FOLDER).is_dir()
    assert (workdir / "revisions" / "00001" / FOLDER).is_dir()
    before = tree(workdir)
    again = prepare_and_open(database)
    assert tree(workdir) == before and again.hashes == memory.hashes
    newest = database.record(database.num_documents - 1)
    last = database.chunks(np.array([newest.first_chunk]))[0]
    match = memory.match(last[:9], most_votes=0)
    assert match.length == 9 and last[9] in match.tokens
    assert database.num_documents - 1 in match.documents
    older = prepare_and_open(revisions.open_database(workdir, 0))
    assert database.num_documents - 1 not in older.match(last[:9]).documents


def test_a_library_names_documents_of_any_revision_and_gives_their_tokens(workdir):
    database, tokenizer = revisions.open_database(workdir), Tokenizer.open(workdir / "tokenizer")
    library = DatabaseLibrary(tokenizer, database, prepare_and_open(database), "bm25")
    record = database.record(database.num_documents - 1)
    found, none = library.sources(np.array([record.first_chunk, -1]), np.array([2.5, 0]))
    assert none is None
    assert (found.document.id, found.document.corpus) == (record.id, "new")
    assert (found.chunk, found.chunks, found.score, found.kind) == (1, record.chunks, 2.5, "BM25")
    assert found.revision == database.manifest.revision == 1
    tokens = found.document.tokens()
    (path,) = (workdir.parent / "new").glob(f"{record.id.removesuffix('.txt')}.txt")
    assert b"".join(map(library.piece, tokens.tolist())).decode() == path.read_text()
    assert [library.label(int(token)) for token in tokens[[0, -1]]] == ["bos", "eos"]
    votes = library.votes(tokens[:9])
    assert votes is not None and votes.length == 9
    voter = library.document(int(votes.documents[0]))
    assert tokens[9] in votes.tokens and voter.id in {r.id for r in database.records()}
    assert DatabaseLibrary(tokenizer, database).votes(tokens[:9]) is None


def test_removed_documents_do_not_vote(workdir):
    database = revisions.open_database(workdir)
    memory = prepare_and_open(database)
    ending = database.chunks(np.arange(1))[0][:5]
    voters = np.unique(memory.match(ending, most_votes=0).documents)
    memory.database.removed = voters[:1]
    left = memory.match(ending, most_votes=0)
    assert voters[0] not in left.documents
    assert left.length > 0 and np.isin(left.documents, voters[1:]).all()


def test_a_revision_and_a_compaction_of_a_database_with_a_memory_have_theirs(workdir):
    prepare_and_open(revisions.open_database(workdir))
    first = revisions.open_database(workdir).record(0)
    (workdir.parent / "new" / "late.txt").write_text("a lighthouse keeper counted ships\n" * 3)
    settings = workdir.parent / "more.gin"
    assert run_prepare(workdir, settings, "--append", f"--remove={first.corpus}/{first.id}") == 0
    for _ in range(2):
        database = revisions.open_database(workdir)
        memory = open_existing(database)
        late = next(r for r in database.records() if r.id == "late.txt")
        tokens = database.chunks(np.array([late.first_chunk]))[0]
        match = memory.match(tokens[:9], most_votes=0)
        assert match.length == 9 and tokens[9] in match.tokens
        assert run_prepare(workdir, settings, "--compact") == 0
    assert revisions.base_of(workdir, 3) == 3 == database.manifest.revision
