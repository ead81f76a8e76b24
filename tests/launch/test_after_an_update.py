"""Every reader after an update gives what it gives of a W made anew of the same documents.

The same documents have other ids and another order there, so chunks are known by their tokens. No
reader gives a token of a removed document.
"""

import contextlib
import itertools
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from pyarrow import parquet

from data_pipelines import workdir as module
from data_pipelines.artefacts.runner import InProcess
from data_pipelines.batches.batches import BatchConfig
from data_pipelines.batches.training_data import (
    copy_training_data,
    open_training_data,
    revision_of,
)
from data_pipelines.chunk_database.database import ChunkDatabase, prepare_chunks
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.corpora import SourceFile, compression
from data_pipelines.evaluation.export import export_chunks, export_neighbours
from data_pipelines.evaluation.prepare_text import prepare_slice
from data_pipelines.evaluation.splits import open_split, token_counts
from data_pipelines.evaluation.texts import SliceConfig
from data_pipelines.retriever import revisions
from data_pipelines.retriever.bm25 import Bm25, Bm25Config, prepare_bm25
from data_pipelines.retriever.compacted import NewIds
from data_pipelines.retriever.datastore import spread_chunks
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.token_memory.text_votes import votes_on
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from data_pipelines.workdir import compaction, summary, update, verify
from data_pipelines.workdir.preparation import Preparation, materialise
from launch.evaluation.conditions import Condition, neighbour_tokens
from launch.evaluation.scores import compare_results, keep_scores
from retro_jax.errors import UserError
from retro_jax.storage import files
from tests.conftest_prepared import run_prepare
from tests.data_pipelines.chunk_database import base_tokenizers
from tests.data_pipelines.retriever import bert_folder
from tests.data_pipelines.small import tree
from tests.launch.updated_corpora import (
    NEW,
    NEW_TEXT,
    OLD,
    REMOVED,
    REPLACED,
    SPLITS,
    settings,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> types.SimpleNamespace:
    """W after updates, the same compacted and purged, a W made anew, and tokens of what was removed."""
    folder = tmp_path_factory.mktemp("updated")
    base_tokenizers.train(folder / "base")
    bert_folder.write(folder / "bert")
    work, fresh = folder / "W", folder / "fresh"
    module.prepare(work, settings(folder, OLD))
    before = revisions.open_database(work)
    gone = before.chunks(
        np.flatnonzero(
            [before.record(d).id in (*REMOVED, REPLACED) for d in before.documents(every(before))]
        )
    )
    change(work, settings(folder, {name: OLD[name] | NEW[name] for name in OLD}), append=True)
    replaced = {"code": OLD["code"] | NEW["code"] | {REPLACED: NEW_TEXT}}
    replaced["code"] = {n: t for n, t in replaced["code"].items() if n not in REMOVED}
    whole = replaced | {"prose": OLD["prose"] | NEW["prose"]}
    config = settings(folder, whole)
    change(work, config, append=True, remove=[f"code/{n}" for n in (*REMOVED, REPLACED)])
    module.prepare(fresh, config)
    compacted, purged = folder / "compacted", folder / "purged"
    shutil.copytree(work, compacted)
    compaction.compact(Preparation(compacted, config, InProcess(), print))
    shutil.copytree(compacted, purged)
    compaction.purge(Preparation(purged, config, InProcess(), print))
    return types.SimpleNamespace(
        folder=folder,
        works=[work, compacted, purged],
        fresh=fresh,
        config=config,
        gone=set(map(bytes, gone)),
    )


def change(work: pathlib.Path, config: module.PrepareConfig, **what) -> list[str]:
    """Updates W; returns the lines about it."""
    lines: list[str] = []
    p = Preparation(work, config, InProcess(), lines.append)
    update.update(p, append=what.get("append", False), remove=what.get("remove", []))
    return lines


def every(rows) -> np.ndarray:
    """The ids of all chunks."""
    return np.arange(len(rows))


def chunks_of(tokens: np.ndarray) -> list[bytes]:
    """Chunks [..., 64 n] by their tokens."""
    return [row.astype(np.int32).tobytes() for row in tokens.reshape(-1, 64)]


def same(places, read) -> None:
    """Compares what a reader gives of each W, and looks for what was removed."""
    expected = read(places.fresh)
    for work in places.works:
        found = read(work)
        assert found == expected
        assert not places.gone & set(_leaves(found))


def _leaves(value):
    """The bytes inside of nested lists, tuples and dictionaries."""
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value] if isinstance(value, bytes) else []


def by_chunk(database, ids, neighbours):
    """The neighbours of chunks by the tokens of each."""
    pairs = zip(chunks_of(database.chunks(ids)), neighbours, strict=True)
    return {chunk: chunks_of(row) for chunk, row in pairs}


def sequences(work, **options):
    """The chunks of an epoch of batches, each with its neighbours."""
    config = BatchConfig(sequence_length=128, batch_size=1, **options)
    batches = open_training_data(work, config).batches
    rows = [batches.rows(step) for step in range(sum(batches.sequences.values()))]
    pairs = set()
    for row in rows:
        neighbours = row.neighbours.reshape(-1, row.neighbours.shape[2] * 128)
        pairs |= set(zip(chunks_of(row.tokens), (tuple(chunks_of(n)) for n in neighbours)))
    return {pair for pair in pairs if any(pair[0])}


def test_batches_of_training(places):
    same(places, lambda work: sequences(work, neighbours=2))
    same(places, lambda work: sequences(work, neighbours=3, neighbour_part="continuation"))


def test_documents_and_tables(places):
    def tables(work):
        found = {}
        for split in SPLITS:
            opened = open_split(work, split, neighbours=2)
            k = opened.table.k
            found |= by_chunk(opened.database, opened.ids, opened.neighbours(opened.ids, k))
        return found

    def documents(work):
        database = revisions.open_database(work)
        live = database.live_ids(np.arange(database.live_chunks))
        names = [database.record(d) for d in database.documents(live)]
        chunks = zip(
            names, database.corpus_of(live).tolist(), chunks_of(database.values(live)[:, :64])
        )
        return {(r.corpus, r.id, r.bytes, corpus, chunk) for r, corpus, chunk in chunks}

    same(places, tables)
    same(places, documents)


@pytest.mark.parametrize("kind", ["on", "oracle", "random", "database", "ngrams", "k"])
def test_conditions_of_evaluation(places, tmp_path, kind):
    run = types.SimpleNamespace(batches=types.SimpleNamespace(neighbour_part="both"))
    condition = Condition(kind, run, 2, kind, {"database": 0.5, "ngrams": 0.1, "k": 2}.get(kind, 0))

    def neighbours(work):
        split = open_split(work, "test", neighbours=2)
        tokens = neighbour_tokens(split, condition, tmp_path / work.name, work)(split.ids)
        found = by_chunk(split.database, split.ids, tokens)
        return set(found) if kind == "random" and not places.gone & set(_leaves(found)) else found

    same(places, neighbours)


def test_token_memory_and_datastore_of_knn(places):
    def votes(work):
        split, memory = (
            open_split(work, "test", neighbours=0),
            prepare_and_open(revisions.open_database(work)),
        )
        mask = split.text_mask(np.ones(1000, np.int64))
        found = votes_on(memory, split.database, split.ids, mask, most_votes=0)
        numbers = (found.lengths, found.counts, found.agreements, found.shares)
        names = [memory.database.record(d).id if d >= 0 else "" for d in found.documents]
        assert not set(names) & set(REMOVED)
        owners = np.repeat(chunks_of(split.database.chunks(split.ids)), mask.sum(1))
        return sorted(zip(owners.tolist(), *(column.tolist() for column in numbers)))

    def datastore(work):
        split = open_split(work, "train", neighbours=0)
        return set(chunks_of(split.database.chunks(spread_chunks(split.database, 1 << 30))))

    same(places, votes)
    same(places, datastore)
    same(places, lambda work: token_counts(revisions.open_database(work)).tolist())


def test_live_retrieval_and_bm25(places, tmp_path):
    def live(work):
        retriever = Retriever.open(work, model=str(places.folder / "bert"))
        queries = open_split(work, "validation", neighbours=0)
        tokens = queries.database.chunks(queries.ids)
        return by_chunk(queries.database, queries.ids, retriever.retrieve(tokens, 3))

    def by_terms(work):
        database, folder = revisions.open_database(work), tmp_path / work.name
        prepare_bm25(folder, database, Bm25Config())
        queries = open_split(work, "validation", neighbours=0)
        tokens = queries.database.chunks(queries.ids)
        ids, scores = Bm25.open(folder, database).search(tokens, 2)
        assert not places.gone & set(chunks_of(database.chunks(ids)))
        return sorted(zip(chunks_of(tokens), np.round(scores[:, 0], 4).tolist()))

    same(places, live)
    same(places, by_terms)


def test_materialised_batches_and_slices(places):
    config = BatchConfig(sequence_length=128, batch_size=1, neighbours=2)
    path = places.folder / "text.jsonl"
    path.write_text(json.dumps({"text": "the lobster lay under the boats while gulls return"}))

    def materialised(work):
        steps = sum(open_training_data(work, config).batches.sequences.values())
        materialise(work, config, steps, InProcess())
        written = open_training_data(work / "materialised", config).batches
        rows = [written.rows(step) for step in range(steps)]
        return set(chunks_of(np.concatenate([row.tokens for row in rows]))) - {bytes(256)}

    def of_slice(work):
        bert = str(places.folder / "bert")
        prepare_slice(work, SliceConfig("mine", str(path)), bert_folder=bert)
        split = open_split(work, "mine", neighbours=4)
        return by_chunk(split.database, split.ids, split.neighbours(split.ids, 4))

    same(places, materialised)
    same(places, of_slice)


def test_comparisons_and_exports(places, tmp_path):
    def compared(work):
        """Losses that depend on the neighbours, summed by document and by what they share with the text."""
        folder, data = tmp_path / work.name, ("test", Tokenizer.open(work / "tokenizer"))
        split, lengths = open_split(work, data[0], neighbours=2), data[1].byte_lengths
        text, near = split.text_mask(lengths), split.neighbours(split.ids, 2)
        losses = {"off": np.ones(text.shape, np.float32)}
        losses["on"] = losses["off"] * (near.sum(axis=(1, 2)) % 97)[:, None]
        results = {}
        for name, array in losses.items():
            files.write_array(folder / f"{name}.npy", array)
            facts = {"settings": {"split": "test", "max_documents": None}, "model": "retro"}
            facts |= {"manifests": {"chunks": split.database.manifest.hash}}
            results[name] = facts | {"condition": name, "nll": f"{name}.npy"}
        sums = keep_scores(folder, results, split=split, text=text, lengths=lengths)
        found = compare_results(work, [(folder, results[name]) for name in ("on", "off")])
        assert sums.overlap is not None
        return found, sums.corpora.tolist(), str(vars(sums.overlap))

    def exported(work):
        rows = set()
        for write, split in itertools.product((export_chunks, export_neighbours), SPLITS):
            write(work, split, tmp_path / "x.parquet")
            table = parquet.read_table(tmp_path / "x.parquet")
            columns = [c for c in table.column_names if c not in ("chunk", "neighbour", "score")]
            rows |= set(map(str, table.select(columns).to_pylist()))
        assert not any(name in row for row in rows for name in REMOVED)
        return rows

    same(places, compared)
    same(places, exported)


def test_stats_and_verify(places):
    def stats(work):
        rows = {row[0]: row[1:] for row in summary.table(work).rows}
        extra = ("revision", "chunk ids of all revisions", "removed documents", "index")
        return {name: row for name, row in rows.items() if name not in extra}

    def checks(work):
        lines: list[str] = []
        bert = str(places.folder / "bert")
        verify.verify(work, sample=1000, seed=0, model=bert, report=lines.append)
        return {line.split(": ")[0] for line in lines}

    same(places, stats)
    assert "neighbours/train again" in checks(places.fresh)
    for work in places.works:
        again = {name for name in checks(work) if name.endswith(" again")}
        newest = f"revisions/{revisions.latest(work):05d}"
        kinds = ("chunks", "keys", "neighbours")
        assert {f"{newest}/{kind}/train again" for kind in kinds} <= again


def test_a_compaction_is_one_database_of_the_same_bytes(places, tmp_path):
    updated, compacted, _ = places.works
    assert (revisions.latest(updated), revisions.latest(compacted)) == (2, 3)
    folder = revisions.folder_of(compacted, 3)
    names = [record.id for record in revisions.open_database(compacted).records()]
    expected = [record.id for record in revisions.open_database(places.fresh).records()]
    assert sorted(names) == sorted(expected)
    prepare_chunks(tmp_path / "chunks", folder / "documents" / "train", compacted / "tokenizer")
    assert tree(tmp_path / "chunks") == tree(folder / "chunks" / "train")
    old, new = (Database.open(work) for work in (updated, compacted))
    ids = np.arange(new.chunks.live_chunks)
    before = NewIds(old.chunks).old(ids)
    np.testing.assert_array_equal(new.keys.stored(ids), old.keys.stored(before))
    for name in ("chunks", "keys", "index", "neighbours", "revisions/00002"):
        assert prepared(compacted / name) == prepared(updated / name), "nothing older is touched"


def test_runs_go_on_with_the_same_batches(places, tmp_path):
    config = BatchConfig(sequence_length=256, batch_size=3, neighbours=2, mixture={"code": 1.0})
    first = open_training_data(places.works[0], config)
    for work in places.works:
        revision = revision_of(work, first.parents)
        assert revision == (3 if work == places.works[2] else 2)
        for opened in (
            open_training_data(work, config, revision),
            open_training_data(work, config),
        ):
            assert opened.parents == first.parents
            for step in (0, 7):
                a, b = first.batches.rows(step), opened.batches.rows(step)
                for field in ("tokens", "targets", "neighbours", "corpus"):
                    np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
                same_document = [x[:, :, None] == x[:, None] for x in (a.documents, b.documents)]
                np.testing.assert_array_equal(*same_document)
    oldest = open_training_data(places.works[0], config, 1).parents
    assert revision_of(places.works[1], oldest) == 1
    with pytest.raises(
        UserError, match=r"revision 1 of .* was purged: expected a run of revision 2"
    ):
        revision_of(places.works[2], oldest)
    with pytest.raises(UserError, match="train was purged, only its manifest is left: expected"):
        revisions.open_database(places.works[2], 1)
    copied = copy_training_data(
        f"file://{places.works[2]}", config, tmp_path, held_out=False, parents=first.parents
    )
    assert copied.parents == first.parents
    np.testing.assert_array_equal(copied.batches.rows(5).tokens, first.batches.rows(5).tokens)


def test_purged_text_is_in_no_file(places):
    texts = {name: OLD["code"][name] for name in (*REMOVED, REPLACED)}
    tokenizer = Tokenizer.open(places.fresh / "tokenizer")
    tokens = {name: tokenizer.encode(text)[:20] for name, text in texts.items()}
    keys = Keys.open(
        *(lambda w: (w / "keys/train", ChunkDatabase.open(w / "chunks/train")))(places.works[0])
    )
    names = [keys.database.record(d).id for d in keys.database.documents(every(keys))]
    vectors = keys.rows(np.flatnonzero(np.isin(names, list(texts))))

    def quoting(work):
        """The files that have some of it, in whatever form."""
        prepare_and_open(revisions.open_database(work))
        for path in filter(pathlib.Path.is_file, work.rglob("*")):
            data = [path.read_bytes()]
            if path.suffix in (".gz", ".zst"):
                data.append(compression.read_whole(SourceFile(path.name, str(path), len(data[0]))))
            probes = [json.dumps(text)[1:60].encode() for text in texts.values()]
            for ids, dtype in itertools.product(
                tokens.values(), ("<u2", "<i4", "<i8", ">u2", ">u4")
            ):
                probes += [ids.astype(dtype).tobytes(), ids[::-1].astype(dtype).tobytes()]
            probes += [row.astype(np.float32).tobytes()[:32] for row in vectors]
            if any(probe in part for probe in probes for part in data):
                yield path.relative_to(work).as_posix()

    found = set(quoting(places.works[0]))
    kinds = {"documents/train", "chunks/train", "keys/train", "token_memory"}
    assert {kind for kind in kinds if any(name.startswith(kind) for name in found)} == kinds
    assert not list(quoting(places.works[2]))


class Killed(BaseException):
    """In place of SIGKILL."""


def test_kills_lose_nothing_and_readers_never_see_a_part(places, tmp_path, monkeypatch):
    """Files are renamed into place one by one: each run ends before its 18th, until one is through."""
    work = shutil.copytree(places.works[0], tmp_path / "W")
    p = Preparation(work, places.config, InProcess(), lambda line: None)
    replace, expected = files.replace, sequences(work, neighbours=2)
    runs = 0
    while True:
        runs, count = runs + 1, itertools.count()

        def killed(*arguments, count=count):
            if next(count) == 17:
                raise Killed
            replace(*arguments)

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(files, "replace", killed)
            compaction.purge(p)
            break
        unfinished = revisions.folder_of(work, 3) / revisions.COMPACTION_FILE
        if unfinished.is_file():
            with pytest.raises(UserError, match="unfinished: expected --compact, which began it"):
                change(work, places.config, remove=["prose/nobody"])
        if not (revisions.latest(work) == 3 and places_missing(work)):
            assert sequences(work, neighbours=2) == expected
    assert runs > 3
    for name in ("revisions", "chunks", "documents", "keys", "index", "neighbours"):
        assert prepared(work / name) == prepared(places.works[2] / name)


def prepared(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder but those of token memories, which are built when they are asked for."""
    return {name: data for name, data in tree(folder).items() if "token_memory" not in name}


def places_missing(work: pathlib.Path) -> bool:
    """Whether the newest revision has no table of the training split yet."""
    folder = revisions.folder_of(work, revisions.latest(work))
    return not (folder / "neighbours" / "train" / "manifest.json").is_file()


def test_updates_and_preparations_of_a_purged_workdir(places, tmp_path, capsys):
    work = shutil.copytree(places.works[2], tmp_path / "W")
    lines: list[str] = []
    config = places.config
    assert module.prepare(work, config, report=lines.append) == []
    assert lines == ["there already: revision 3, and those before 3 are purged"]
    gone = sorted(NEW["prose"])[0]
    assert "revision 3: nothing to change" in change(work, config, append=True)
    change(work, config, remove=[f"prose/{gone}"])
    database = revisions.open_database(work)
    assert database.manifest.revision == 4
    assert gone not in [
        database.record(d).id for d in database.live_documents(every(database)) if d >= 0
    ]
    verify.verify(work, sample=9, seed=0, model=str(places.folder / "bert"), report=lines.append)
    p = Preparation(work, config, InProcess(), lines.append)
    shutil.rmtree(work / "materialised", ignore_errors=True)
    materialise(work, BatchConfig(sequence_length=128, batch_size=1, neighbours=2), 2, InProcess())
    left = [
        revisions.folder_of(work, 1) / "bm25" / ".tmp-x",
        work / "documents" / ".spill" / "code",
    ]
    for folder in left:  # by commands that were killed
        folder.mkdir(parents=True)
        (folder / "text").write_text("some text")
    compaction.purge(p)
    assert not any(folder.parent.exists() for folder in left)
    assert revisions.latest(work) == 5
    assert not list((work / "materialised").iterdir()), "batches of what was there before"
    assert len(revisions.open_database(work)) == database.live_chunks
    compaction.purge(p)
    assert lines[-1] == "revision 5: 0.0 MB of revisions 0 to 4 deleted"
    capsys.readouterr()
    assert run_prepare(work, None, "--purge") == 0
    assert capsys.readouterr().out == f"{lines[-1]}\n"
    assert run_prepare(places.fresh, None, "--compact") == 1
    error = capsys.readouterr().err
    assert "has one database as it is: expected some --append or --remove before" in error
    assert error.count("\n") == 1
