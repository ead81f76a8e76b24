"""Checks a prepared workdir against itself: files, lineage, and a sample computed again."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE, PURGED_FILE, Manifest, is_purged
from data_pipelines.chunk_database.database import ChunkDatabase, chunk_rows
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.corpora import SPLITS
from data_pipelines.leakage.near_documents import kept_counts, kept_documents
from data_pipelines.retriever.filled_slots import recall_text
from data_pipelines.retriever.neighbour_facts import recall
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.queries import OwnDocuments, Queries, StoredChunks, chunks_of
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.revisions import QUERY_KEYS, folder_of, latest
from data_pipelines.retriever.sampling import sample_ids
from data_pipelines.token_memory.workdir_memory import FOLDER as TOKEN_MEMORY
from data_pipelines.workdir import leakage_report
from data_pipelines.workdir.leakage_report import HELD_OUT
from data_pipelines.workdir.preparation import open_keys, queries_of
from retro_jax.errors import UserError
from retro_jax.storage import files

# Keys of chunks that were embedded in other company differ by rounding, and bfloat16 rounds again.
_KEY_TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-6}
_SCORE_TOLERANCE = 1e-4

# Parents that not every artefact of its kind has: a training table's queries are the database's keys.
_OPTIONAL = ("queries", "chunks", "keys", "base", "leakage", "index", "bm25")

Check = tuple[str, Callable[[], str]]


@dataclasses.dataclass(frozen=True)
class Places:
    """What each directory of a workdir is and what it was made from.

    Attributes:
      kind: of its manifest.
      parents: role in the manifest -> directory in the workdir.
    """

    kind: str
    parents: Mapping[str, str]


def places(revisions: int = 0) -> dict[str, Places]:
    """Every directory of a workdir, each after those that it was made from.

    Args:
      revisions: how many the retrieval database has after the first.
    """
    train, tokenizer = "documents/train", {"tokenizer": "tokenizer"}
    result = {f"documents/{split}": Places("documents", {}) for split in SPLITS}
    held_out = {split: f"documents/{split}" for split in HELD_OUT}
    result["leakage"] = Places("leakage", {"documents": train} | held_out)
    result["tokenizer"] = Places("tokenizer", {"documents": train})
    for split in SPLITS:
        parents = {"documents": f"documents/{split}", **tokenizer}
        if split == "train":
            parents["leakage"] = "leakage"
        result[f"chunks/{split}"] = Places("chunks", parents)
    of_chunks = {split: f"chunks/{split}" for split in HELD_OUT}
    result["duplicates"] = Places("duplicates", {"chunks": "chunks/train"} | of_chunks)
    for split in SPLITS:
        result[f"keys/{split}"] = Places("keys", {"chunks": f"chunks/{split}"})
    result[QUERY_KEYS] = Places("keys", {"chunks": "chunks/train"})
    result["index"] = Places("index", {"keys": "keys/train"})
    result["bm25"] = Places("bm25", {"database": "chunks/train"})
    result[TOKEN_MEMORY] = Places(TOKEN_MEMORY, {"database": "chunks/train"})
    result["materialised"] = Places("batches", {})  # of whichever revision they were made
    database = {"database": "chunks/train"}
    database |= {"keys": "keys/train", "index": "index", "bm25": "bm25"}
    for split in SPLITS:
        queries = QUERY_KEYS if split == "train" else f"keys/{split}"
        sources = {"chunks": f"chunks/{split}", "queries": queries}
        result[f"neighbours/{split}"] = Places("neighbours", sources | database)
    for revision in range(1, revisions + 1):
        result |= _places_of(revision)
    return result


def _places_of(revision: int) -> dict[str, Places]:
    """The directories of a revision of the database."""
    here = f"{folder_of('', revision)}/"
    before = f"{folder_of('', revision - 1)}/" if revision > 1 else ""
    previous = f"{before}database" if revision > 1 else "chunks/train"
    chunks, keys = f"{here}chunks/train", f"{here}keys/train"
    added = {
        "documents": f"{here}documents/train",
        "tokenizer": "tokenizer",
        "leakage": f"{here}leakage",
    }
    held_out = {split: f"documents/{split}" for split in HELD_OUT}
    published = {"previous": previous, "chunks": chunks, "keys": keys}
    result = {
        f"{here}documents/{split}": Places("documents", {"database": previous}) for split in SPLITS
    }
    result[f"{here}leakage"] = Places("leakage", {"documents": f"{here}documents/train"} | held_out)
    result[chunks] = Places("chunks", added)
    of_chunks = {split: f"chunks/{split}" for split in HELD_OUT}
    result[f"{here}duplicates"] = Places("duplicates", {"chunks": chunks} | of_chunks)
    for place in (keys, f"{here}{QUERY_KEYS}"):
        result[place] = Places("keys", {"chunks": chunks})
    result[f"{here}index"] = Places("index", {"keys": keys})
    result[f"{here}database"] = Places("database", published)
    result[f"{here}{TOKEN_MEMORY}"] = Places(TOKEN_MEMORY, {"database": chunks})
    result[f"{here}bm25"] = Places("bm25", {"database": f"{here}database"})
    for split in SPLITS:
        parents = {
            "database": f"{here}database",
            "bm25": f"{here}bm25",
            "base": f"{before}neighbours/{split}",
        }
        result[f"{here}neighbours/{split}"] = Places("neighbours", parents)
    return result


def verify(
    directory: pathlib.Path,
    *,
    sample: int,
    seed: int,
    model: str | None = None,
    report: Callable[[str], None],
) -> None:
    """Checks everything that is there, going on after what is wrong.

    Args:
      directory: W.
      sample: documents, keys and rows of each table that are computed again.
      seed: which ones.
      model: the folder of the BERT that made the keys, where it is not a packaged one.
      report: is given a line about each check.

    Raises:
      UserError: nothing is there, or some check failed; it is the first one's message.
    """
    artefacts = places(latest(directory))
    for path in files.matching(directory / "questions", "*"):
        artefacts[f"questions/{path.name}"] = Places("questions", {"tokenizer": "tokenizer"})
    there = [name for name in artefacts if (directory / name / MANIFEST_FILE).is_file()]
    if not there:
        raise UserError(f"{directory} holds no finished stage: expected what launch.prepare makes")
    failures: list[str] = []
    for name, check in _checks(directory, there, artefacts, sample, seed, model=model):
        try:
            report(f"{name}: {check()}")
        except UserError as error:
            failures.append(str(error))
            report(f"{name}: WRONG: {error}")
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")


def _checks(
    directory: pathlib.Path,
    there: Sequence[str],
    artefacts: Mapping[str, Places],
    sample: int,
    seed: int,
    *,
    model: str | None,
) -> Iterator[Check]:
    """The checks of what is there, with their names."""
    for name in there:
        yield name, functools.partial(check_files, directory, name, artefacts[name])
        path = directory / name
        gone = is_purged(path.parent / "documents" / "train")
        if artefacts[name].kind == "leakage" and not gone:
            again = functools.partial(leakage_report.check, directory, path, sample, seed)
            yield f"{name} again", again
    newest = latest(directory)
    names = (*SPLITS, pathlib.PurePath(QUERY_KEYS).name)
    for revision, split in itertools.product(range(newest + 1), names):
        computed: dict[str, Callable[..., str]] = {
            "chunks": check_chunks,
            "keys": functools.partial(check_keys, model=model),
        }
        if revision == newest:  # older tables are of databases that nobody reads any more
            computed["neighbours"] = check_neighbours
        for kind, check in computed.items():
            name = (folder_of("", revision) / kind / split).as_posix()
            if name in there and not is_purged(directory / name):
                again = functools.partial(check, directory, split, sample, seed, revision=revision)
                yield f"{name} again", again


def check_files(directory: pathlib.Path, name: str, place: Places) -> str:
    """Presence, size, header and hash of every file, and that the parents are those beside it."""
    recorded = Manifest.read(directory / name).parents
    parents = {
        role: (Manifest.read(directory / parent), directory / parent)
        for role, parent in place.parents.items()
        # A base model's tokeniser was made from no documents.
        if role in recorded or (role not in _OPTIONAL and name != "tokenizer")
    }
    if is_purged(directory / name):
        return _check_purged(directory / name)
    manifests = [Manifest.open(directory / name, place.kind, parents, verify=True)]
    for i, digest in enumerate(
        manifests[0].facts.get("shards", []) if name.endswith("index") else []
    ):
        part = directory / name / f"{i:05d}"
        manifests.append(Manifest.open(part, place.kind, parents, verify=True))
        if manifests[-1].hash != digest:
            raise UserError(
                f"{directory / name} and {part} do not belong together: expected its shard"
            )
    shards = [shard for manifest in manifests for shard in manifest.shards]
    made_from = " and ".join(place.parents[role] for role in parents)
    of = f", made from {made_from}" if parents else ""
    return f"{len(shards)} files, {sum(shard.size for shard in shards) / 1e6:,.1f} MB{of}"


def _check_purged(folder: pathlib.Path) -> str:
    """That nothing is left of a purged artefact but its manifest."""
    rest = sorted({path.name for path in folder.iterdir()} - {MANIFEST_FILE, PURGED_FILE})
    if rest:
        raise UserError(f"{folder} was purged and holds {rest[0]!r}: expected --purge again")
    return "purged, nothing but its manifest is left"


def check_chunks(
    directory: pathlib.Path, split: str, sample: int, seed: int, *, revision: int = 0
) -> str:
    """Tokenises some documents of one shard again and compares their chunks."""
    folder = folder_of(directory, revision)
    database = ChunkDatabase.open(folder / "chunks" / split)
    tokenizer = Tokenizer.open(directory / "tokenizer")
    texts = folder / "documents" / split
    documents = Manifest.read(texts)
    leakage = folder / "leakage" if "leakage" in database.manifest.parents else None
    counts = kept_counts(documents, None if leakage is None else Manifest.read(leakage))
    if not counts:
        return "no documents"
    shard = int(np.random.default_rng(seed).integers(len(counts)))
    numbers = set(sample_ids(counts[shard], sample, seed).tolist())
    path = texts / documents.shards[shard].name
    for number, document in enumerate(kept_documents(texts, shard, leakage)):
        if number not in numbers:
            continue
        record = database.record(sum(counts[:shard]) + number)
        ids = np.arange(record.first_chunk, record.first_chunk + record.chunks)
        again = chunk_rows(tokenizer.encode(document.text), tokenizer, "int32")
        if record.id != document.id or not np.array_equal(again, database.chunks(ids)):
            raise UserError(
                f"{database.directory}: the chunks of document {document.id!r} are not those of its"
                f" text in {path}: expected them equal"
            )
    return f"{len(numbers)} documents tokenised, equal"


def check_keys(
    directory: pathlib.Path,
    split: str,
    sample: int,
    seed: int,
    *,
    model: str | None = None,
    revision: int = 0,
) -> str:
    """Embeds some chunks again and compares their keys."""
    keys = open_keys(folder_of(directory, revision), split)
    if keys.are_given:
        return f"{keys.model} is not here, so no chunk is embedded again"
    encoder = Retriever.encoder_of(directory, keys, model=model)
    ids = sample_ids(len(keys), sample, seed)
    if not len(ids):
        return "no chunks"
    stored, again = keys.rows(ids), encoder.keys(keys.database.chunks(ids))
    tolerance = _KEY_TOLERANCE[keys.manifest.settings["dtype"]]
    wrong = ~np.isclose(stored, again, rtol=0, atol=tolerance, equal_nan=True).all(1)
    if wrong.any():
        raise UserError(
            f"{keys.directory}: the key of chunk {ids[wrong][0]} is not that of its text: expected"
            f" it within {tolerance:g}"
        )
    furthest = np.nanmax(np.abs(stored - again), initial=0)
    return f"{len(ids)} chunks embedded, largest difference {furthest:.1g}"


def check_neighbours(
    directory: pathlib.Path, split: str, sample: int, seed: int, *, revision: int = 0
) -> str:
    """Searches for some chunks' neighbours again, by the index and by comparing every key.

    A table that was made from that of an earlier revision is searched for again where every key is
    compared: an approximate index finds others at once than in several parts.
    """
    retriever = Retriever.open(directory, revision=revision)
    queries: Queries = queries_of(directory, split, retriever)
    chunks = chunks_of(queries)
    table = NeighbourTable.of(directory, split, chunks, retriever.database)
    ids = sample_ids(len(queries), sample, seed)
    if not len(ids):
        return "no chunks"
    table_scores = table.scores(ids)
    owners = OwnDocuments(chunks, retriever.database).of(ids)
    search, query_chunks = retriever.search, StoredChunks(queries, ids)
    if "base" not in table.manifest.parents or retriever.index.complete:
        _, again = search.find(query_chunks, table.k, owners)
        _check_scores(table, ids, table_scores, again, "searching again finds")
    scores = search.scores_of(query_chunks, table.ids(ids))
    _check_scores(table, ids, table_scores, scores, "its ids are at")
    _, truth = search.truth(query_chunks, table.k, owners)
    share = recall(table_scores, truth, table.score == "bm25")
    stated = recall_text(table.manifest.fact("recall")["recall"])
    return f"{len(ids)} chunks searched, equal; recall {share:.3f}; the manifest has {stated}"


def _check_scores(
    table: NeighbourTable, ids: np.ndarray, table_scores: np.ndarray, other: np.ndarray, what: str
) -> None:
    """Raises at the first row whose scores are others."""
    wrong = ~np.isclose(table_scores, other, rtol=_SCORE_TOLERANCE, atol=_SCORE_TOLERANCE).all(1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{table.directory}: the neighbours of chunk {ids[row]} have distances"
            f" {table_scores[row].tolist()}: {what} {other[row].tolist()}"
        )
