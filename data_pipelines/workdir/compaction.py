"""`prepare --compact` and `--purge`: one database again, and removed text gone from the disk.

    W/revisions/00003/compaction.npy      the plan: which documents are left, and in which shards
    W/revisions/00003/documents/train  chunks/train  keys  index    copied without what was removed
    W/revisions/00003/database            published: from now on it is the newest revision
    W/revisions/00003/neighbours/SPLIT    the tables of revision 2 with the new ids

Nothing older is touched until `--purge`. Then every artefact that a compaction replaces is marked by
purged.json, and what it contains is deleted but for its manifest, so that the lineage stays.
"""

import pathlib
import shutil
from collections.abc import Iterator

from data_pipelines.artefacts.manifest import (
    MANIFEST_FILE,
    PURGED_FILE,
    STAGE_FILE,
    Manifest,
    is_purged,
)
from data_pipelines.chunk_database.compacted import (
    CompactionPlan,
    compact_chunks,
    compact_documents,
)
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.corpora import SPLITS
from data_pipelines.documents.documents import SPILL
from data_pipelines.retriever import publishing, revisions
from data_pipelines.retriever.bm25 import KIND as BM25
from data_pipelines.retriever.compacted import compact_keys
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.keys import Keys
from data_pipelines.token_memory.build import prepare_token_memory
from data_pipelines.token_memory.workdir_memory import FOLDER as TOKEN_MEMORY
from data_pipelines.token_memory.workdir_memory import is_built
from data_pipelines.workdir.preparation import Preparation
from data_pipelines.workdir.tables import check_ranking, make_tables
from retro_jax.errors import UserError
from retro_jax.storage import files

# What a compaction replaces of W and of each revision before it.
_REPLACED = (
    *("documents/train", "chunks/train", revisions.KEYS, revisions.QUERY_KEYS, "index"),
    *(BM25, TOKEN_MEMORY),
)
# Which may quote text, or what a model computed of it.
_QUOTING = ("samples", "report.html", "evaluation", "ablations", "states")


def compact(p: Preparation) -> None:
    """Publishes the newest revision as one database, or what is missing of that.

    Args:
      p: W and every setting.

    Raises:
      UserError: there is nothing to compact, the tables of the newest revision or the documents of
        one are missing, or another update was begun.
    """
    newest = revisions.latest(p.directory)
    folder = revisions.folder_of(p.directory, newest + 1)
    revisions.clear_unfinished(p.directory)
    if folder.exists() and not (folder / revisions.COMPACTION_FILE).is_file():
        raise UserError(f"{folder} is unfinished: expected --append, which began it, first")
    if newest and revisions.base_of(p.directory, newest) == newest:
        p.report(f"revision {newest}: compacted already")
        _make_tables(p, newest)
        return
    if not newest:
        raise UserError(
            f"{p.directory} has one database as it is: expected some --append or --remove before"
        )
    if not revisions.open_database(p.directory, newest).live_chunks:
        raise UserError(f"{p.directory}: every document was removed: expected some that are left")
    check_ranking(p)
    make_tables(p, newest)
    _make_database(p, newest, folder)
    manifest = Manifest.read(folder / revisions.KIND)
    p.report(
        f"revision {newest + 1}: one database of {manifest.fact('documents'):,} documents,"
        f" {manifest.fact('chunks'):,} chunks"
    )
    _make_tables(p, newest + 1)


def _make_tables(p: Preparation, revision: int) -> None:
    """Makes what is missing of the tables of a compaction, and removes its plan."""
    plan = revisions.folder_of(p.directory, revision) / revisions.COMPACTION_FILE
    plan.unlink(missing_ok=True)
    make_tables(p, revision)


def _make_database(p: Preparation, newest: int, folder: pathlib.Path) -> None:
    """Copies everything but the tables, and publishes it."""
    database = revisions.open_database(p.directory, newest)
    assert isinstance(database, revisions.JoinedDatabase)
    plan = folder / revisions.COMPACTION_FILE
    if not plan.is_file():
        for part in database.parts:  # before anything is written
            Manifest.open(revisions.beside(part, "documents/train"), "documents")
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        CompactionPlan.of(database, p.config.documents.shard_bytes).write(plan)
    places = {name: folder / name for name in ("documents/train", "chunks/train", "keys/train")}
    documents = compact_documents(
        places["documents/train"], database, database.parts, plan, runner=p.runner
    )
    tokenizer = Tokenizer.open(p.directory / "tokenizer")
    compact_chunks(
        places["chunks/train"],
        database,
        (documents, places["documents/train"]),
        (tokenizer.manifest, tokenizer.directory),
        plan,
        runner=p.runner,
    )
    chunks = ChunkDatabase.open(places["chunks/train"])
    if is_built(database):
        prepare_token_memory(folder / TOKEN_MEMORY, chunks, runner=p.runner)
    added: Keys | ChunkDatabase = chunks
    if p.config.neighbours.ranking.by_keys:
        for place in (revisions.KEYS, revisions.QUERY_KEYS):
            if (p.directory / place).is_dir():
                keys = revisions.open_keys(database, p.directory, place=place)
                compact_keys(folder / place, chunks, keys, plan, runner=p.runner)
        added = Keys.open(places["keys/train"], chunks)
        prepare_index(folder / "index", added, p.config.index, runner=p.runner)
    publishing.publish_compacted(p.directory, newest + 1, added)


def purge(p: Preparation) -> None:
    """Compacts if anything changed since, then deletes what that replaces; it may be repeated.

    Args:
      p: W and every setting.

    Raises:
      UserError: as `compact`; nothing is deleted then.
    """
    newest = revisions.latest(p.directory)
    revisions.clear_unfinished(p.directory)  # a refused --append may have read removed text
    if not newest or revisions.base_of(p.directory, newest) < newest:
        compact(p)
        newest = revisions.latest(p.directory)
    _make_tables(p, newest)
    ranges = range(newest)
    for place in _replaced(p.directory, newest):
        if is_purged(place):
            continue
        manifest = Manifest.read(place)
        mark = {"kind": manifest.kind, "replaced_by_revision": newest}
        files.write_atomically(place / PURGED_FILE, files.to_json(mark))
    size = 0
    for place in _replaced(p.directory, newest):
        size += _delete(place, (MANIFEST_FILE, PURGED_FILE))
    for place in _unfinished(p.directory, newest):
        size += _delete(place, ())
        place.rmdir()
    database = Manifest.read(revisions.folder_of(p.directory, newest) / revisions.KIND)
    size += _delete_derived(p.directory, database.hash)
    p.report(
        f"revision {newest}: {size / 1e6:,.1f} MB of revisions {ranges.start} to {ranges[-1]} deleted"
    )
    quoting = [name for name in _QUOTING if (p.directory / name).exists()]
    if quoting:
        p.report(
            f"not touched: {', '.join(str(p.directory / name) for name in quoting)}; they may quote"
            " documents that were removed"
        )


def _replaced(directory: pathlib.Path, newest: int) -> Iterator[pathlib.Path]:
    """The finished artefacts that the compaction at the newest revision replaces."""
    for revision in range(newest):
        folder = revisions.folder_of(directory, revision)
        for name in (*_REPLACED, *(f"neighbours/{split}" for split in SPLITS)):
            if (folder / name / MANIFEST_FILE).is_file():
                yield folder / name


def _unfinished(directory: pathlib.Path, newest: int) -> Iterator[pathlib.Path]:
    """What killed commands left of such artefacts, and the text that a documents stage spilled."""
    for revision in range(newest + 1):
        folder = revisions.folder_of(directory, revision)
        places = [folder / name for name in _REPLACED if revision < newest]
        places = [path for path in places if not (path / MANIFEST_FILE).is_file()]
        places += [*folder.glob(f"{files.TEMPORARY}*"), folder / "documents" / SPILL]
        yield from (path for path in places if path.is_dir())


def _delete_derived(directory: pathlib.Path, digest: str) -> int:
    """Deletes batches, questions and datastores made of another database than one; returns their bytes."""
    size, batches = 0, directory / "materialised"
    manifest = batches / MANIFEST_FILE
    if manifest.is_file() and Manifest.read(batches).parents.get("chunks") != digest:
        manifest.unlink()  # first: without it the directory is unfinished
    if batches.is_dir() and not manifest.is_file():
        size += _delete(batches, ())
    for place in (directory / "questions").glob("*"):
        if _has_other_passages(place, digest):
            size += _delete(place, (MANIFEST_FILE, STAGE_FILE))  # by these a killed purge goes on
            shutil.rmtree(place)
    for path in (directory / "evaluation").glob("*knn-*.npy"):
        of_this = digest[:12] in path.name and not path.name.startswith(files.TEMPORARY)
        if not of_this:
            size += path.stat().st_size
            path.unlink()
    return size


def _has_other_passages(place: pathlib.Path, digest: str) -> bool:
    """Whether questions were found, or begun to be found, in another database than one.

    What is neither finished nor begun is no artefact, and its owner's.
    """
    if (place / MANIFEST_FILE).is_file():
        return Manifest.read(place).parents.get("database", digest) != digest
    return (place / STAGE_FILE).is_file()


def _delete(folder: pathlib.Path, kept: tuple[str, ...]) -> int:
    """Deletes the content of a directory but for some files; returns how many bytes that was."""
    size = 0
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            size += sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
            shutil.rmtree(path)
        else:
            size += path.lstat().st_size
            path.unlink()
    return size
