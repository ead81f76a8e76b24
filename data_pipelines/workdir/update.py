"""`prepare --append` and `--remove`: a new revision of the retrieval database on top of the newest."""

import itertools
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.chunk_database.database import ChunkDatabase, prepare_chunks
from data_pipelines.corpora import SPLITS, Document
from data_pipelines.documents.documents import KnownDocuments, prepare_documents, read_documents
from data_pipelines.documents.line_ids import ContentNames
from data_pipelines.retriever import publishing, revisions
from data_pipelines.retriever.given_keys import check_added_keys
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.keys import Keys, prepare_keys
from data_pipelines.retriever.queries import Queries
from data_pipelines.token_memory.build import prepare_token_memory
from data_pipelines.token_memory.workdir_memory import FOLDER as TOKEN_MEMORY
from data_pipelines.token_memory.workdir_memory import is_built
from data_pipelines.workdir import leakage_report
from data_pipelines.workdir.preparation import Preparation
from data_pipelines.workdir.tables import check_ranking, make_tables
from retro_jax.errors import UserError
from retro_jax.storage import files

_SHOWN = 3  # documents that a message names


def update(p: Preparation, *, append: bool, remove: Sequence[str]) -> None:
    """Publishes the next revision, then makes its tables; what a killed run left is taken up.

    Removing comes first, so that a document can be replaced: the removed one, and the text that its
    corpus has for it now.

    Args:
      p: W and every setting; with `append`, the database should also contain p.config.documents.
      append: whether to add them.
      remove: CORPUS/ID of documents of the database, or @FILE of such lines.

    Raises:
      UserError: W is not prepared, a document is not there, or another update was begun, which an
        --append with another `remove` is.
    """
    current = revisions.latest(p.directory)
    database = revisions.open_database(p.directory, current)
    for split in SPLITS:  # tables are made from those before: refuse before anything is written
        Manifest.read(p.directory / "neighbours" / split)
    check_ranking(p)
    folder = revisions.folder_of(p.directory, current + 1)
    revisions.clear_unfinished(p.directory, appending=append)
    if (folder / revisions.COMPACTION_FILE).is_file():
        raise UserError(f"{folder} is unfinished: expected --compact, which began it, first")
    if not append and folder.exists():
        raise UserError(f"{folder} is unfinished: expected --append, which began it, first")
    removed = revisions.numbers_of(database, named_documents(remove))
    added = _append(p, folder, database, removed) if append else None
    if added is None and not removed:
        p.report(f"revision {current}: nothing to change")
    else:
        current += 1
        manifest = publishing.publish(p.directory, current, removed, added)
        (folder / revisions.REMOVAL_FILE).unlink(missing_ok=True)
        count = manifest.fact("documents") - manifest.fact("removed")
        p.report(
            f"revision {current}: {manifest.fact('added'):,} documents added, {len(removed):,} removed;"
            f" {count:,} documents, {manifest.fact('chunks'):,} chunk ids"
        )
    make_tables(p, current)


def _append(
    p: Preparation, folder: pathlib.Path, database: ChunkDatabase, removed: Sequence[int]
) -> Queries | None:
    """Makes chunks of the documents that are new, and what the database has of them; None if there are none."""
    _keep_removal(folder, database, removed)
    old_documents = _known_documents(p.directory, database, removed)
    manifests = prepare_documents(
        folder / "documents", p.config.documents, known=old_documents, runner=p.runner
    )
    if not manifests["train"].fact("documents"):
        shutil.rmtree(folder)  # nothing but three empty splits
        return None
    held_out = sum(manifests[split].fact("documents") for split in SPLITS if split != "train")
    if held_out:
        p.report(f"{held_out:,} documents are of held-out splits: left out")
    withdrawn = leakage_report.withdraw(p, folder)
    if withdrawn is not None:
        p.report(leakage_report.told(withdrawn))
        if withdrawn.fact("withdrawn") == withdrawn.fact("documents"):
            shutil.rmtree(folder)
            return None
    tokenizer, chunks = p.directory / "tokenizer", folder / "chunks" / "train"
    prepare_chunks(
        chunks,
        folder / "documents" / "train",
        tokenizer,
        leakage_directory=leakage_report.directory_of(p, folder),
        runner=p.runner,
    )
    leakage_report.count_added(p, folder)
    if is_built(database):
        directory = folder / TOKEN_MEMORY
        prepare_token_memory(directory, ChunkDatabase.open(chunks), runner=p.runner)
    if not p.config.neighbours.ranking.by_keys:
        return ChunkDatabase.open(chunks)
    if p.config.keys.is_given:
        check_added_keys(ChunkDatabase.open(chunks), p.config.keys.model)
    else:
        prepare_keys(folder / revisions.KEYS, chunks, tokenizer, p.config.keys, runner=p.runner)
    if (p.directory / revisions.QUERY_KEYS).is_dir():
        place = folder / revisions.QUERY_KEYS
        prepare_keys(place, chunks, tokenizer, p.config.keys, role="query", runner=p.runner)
    keys = Keys.open(folder / "keys" / "train", ChunkDatabase.open(chunks))
    routed = revisions.open_index(revisions.open_keys(database, p.directory), p.directory).routed
    routes = routed[0].routes if routed else None
    prepare_index(folder / "index", keys, p.config.index, runner=p.runner, routes=routes)
    return keys


def _keep_removal(folder: pathlib.Path, database: ChunkDatabase, removed: Sequence[int]) -> None:
    """Records what an --append removes, or raises where it was begun with something else.

    Its documents depend on that: of a removed one its corpus's text is taken, of others it is not.
    """
    path = folder / revisions.REMOVAL_FILE
    if not revisions.is_begun(folder):
        files.write_array(path, np.array(removed, np.int64))
        return
    if not path.is_file():  # an earlier version began it
        return
    before = np.load(path).tolist()
    if before != list(removed):
        records = [database.record(number) for number in before[:_SHOWN]]
        names = ", ".join(f"{record.corpus}/{record.id}" for record in records)
        more = f" and {len(before) - _SHOWN:,} more" if len(before) > _SHOWN else ""
        began = f"--remove of {names}{more}" if before else "no --remove"
        raise UserError(
            f"{folder} is an --append that was begun with {began}: expected the same, or that folder"
            " removed"
        )


def _known_documents(
    directory: pathlib.Path, database: ChunkDatabase, removed: Sequence[int]
) -> KnownDocuments:
    """The documents that an update need not take again: of the database, but for removed ones."""
    gone = set(removed) | set(database.removed.tolist())

    def record_name(number: int) -> tuple[str, str]:
        record = database.record(number)
        return record.corpus, record.id

    newest = database.manifest.revision
    places = [revisions.folder_of(directory, r) for r in range(newest + 1)]
    folders = [path / "documents" for path in places if (path / "documents").is_dir()]
    compacted = places[: revisions.base_of(directory, newest)]  # of their documents, held-out ones

    def read(split: pathlib.Path) -> Iterator[Document]:
        if split.name == "train" and split.parent.parent in compacted:
            return iter(())
        return read_documents(split, Manifest.read(split))

    by_text = ContentNames(
        folders,
        read,
        without={record_name(number) for number in gone},
    )
    first = database.num_documents
    names = ((number, r.id) for number, r in enumerate(database.records()) if number not in gone)
    texts = ((first + number, name) for number, name in enumerate(by_text.ids()))
    return KnownDocuments(
        itertools.chain(names, texts),
        lambda number: record_name(number) if number < first else by_text.name(number - first),
        {"database": (database.manifest, database.directory)},
    )


def named_documents(values: Sequence[str]) -> list[tuple[str, str]]:
    """(corpus, id) of what --remove names: CORPUS/ID, or @FILE with one in each line.

    Raises:
      UserError: a file that cannot be read, or a name of another form, with its line.
    """
    names = []
    for value in values:
        lines, place = [value], f"--remove={value}"
        if value.startswith("@"):
            lines = files.read_text_lines(
                pathlib.Path(value[1:]), "a line CORPUS/ID for each document"
            )
        for number, line in enumerate(lines, 1):
            corpus, slash, name = line.partition("/")
            if (line or line == value) and not (corpus and slash and name):
                place = f"{value[1:]}:{number} is {line!r}" if value.startswith("@") else place
                raise UserError(f"{place}: expected CORPUS/ID of a document, or @FILE of them")
            names += [(corpus, name)] if line else []
    return names
