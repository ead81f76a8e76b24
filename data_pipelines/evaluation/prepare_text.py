"""Prepares a text for evaluation: chunks, keys and neighbours beside those of the splits."""

import functools
import logging
import pathlib
from collections.abc import Callable, Sequence

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest
from data_pipelines.chunk_database.database import ChunkDatabase, prepare_chunks
from data_pipelines.documents.documents import KIND as DOCUMENTS
from data_pipelines.evaluation.splits import slice_table
from data_pipelines.evaluation.texts import SliceConfig, check_source, prepare_texts
from data_pipelines.live.database import recorded_bert
from data_pipelines.retriever.bm25 import KIND as BM25
from data_pipelines.retriever.bm25 import Bm25Config, prepare_bm25
from data_pipelines.retriever.keys import Keys, KeysConfig, prepare_keys
from data_pipelines.retriever.neighbour_table import KIND as NEIGHBOURS
from data_pipelines.retriever.neighbours import prepare_neighbours
from data_pipelines.retriever.prefixes import Prefixes
from data_pipelines.retriever.queries import Queries
from data_pipelines.retriever.retriever import Ranking, Retriever
from data_pipelines.retriever.revisions import checked, folder_of, latest, open_database
from data_pipelines.workdir.stages import only_one
from retro_jax.distributed import processes
from retro_jax.errors import UserError

FOLDER = "slices"
_NEIGHBOURS = 40  # of the paper's evaluation; fewer can be used of them
_RECALL_QUERIES = 100


def prepare_slice(
    data: pathlib.Path,
    config: SliceConfig,
    *,
    revision: int | None = None,
    bert_folder: str | None = None,
    neighbours: int = 0,
    report: Callable[[str], object] = logging.getLogger(__name__).info,
) -> str:
    """Prepares a slice with the data's tokeniser and retrieval database, or what is missing of it.

    For another revision of the database that is another table.

    Args:
      data: W.
      config: the text. revision: of the database; None for the newest.
      bert_folder: the BERT that made the database's keys, where it is neither packaged nor where W's
        preparation found it.
      neighbours: how many will be read.
      report: receives a line when there is anything to do.

    Returns:
      The name that open_split knows it by.

    Raises:
      UserError: a path where nothing is, or other files than those that were prepared by this name,
        no such BERT, or more neighbours than the table has or will have. Nothing is made then.
    """
    folder = data / FOLDER / config.key
    revision = latest(data) if revision is None else revision
    table = slice_table(folder, revision)
    if (table / MANIFEST_FILE).is_file():
        check_source(folder, config)
        return config.key
    _check_count(table, _NEIGHBOURS, neighbours)
    with only_one(data):
        model = bert_folder or recorded_bert(data)
        retriever = Retriever.open(data, model=model, revision=revision)
        retriever.check_model()
        report(f"preparing {config.key} ...")
        prepare_texts(folder, config)
        prepare_chunks(folder / "chunks", folder / DOCUMENTS, data / "tokenizer")
        chunks = ChunkDatabase.open(folder / "chunks")
        queries: Queries = chunks
        if retriever.ranking.by_keys:
            settings = retriever.keys.manifest.settings
            prefixes = Prefixes.recorded(settings["embedder"])
            bert = model or settings["embedder"]["model"]
            keys = KeysConfig(bert, settings["dtype"], prefixes.query, prefixes.passage)
            prepare_keys(folder / "keys", folder / "chunks", data / "tokenizer", keys, role="query")
            queries = Keys.open(folder / "keys", chunks)
        prepare_neighbours(
            table,
            queries,
            retriever,
            k=_NEIGHBOURS,
            recall_queries=_RECALL_QUERIES,
        )
    return config.key


def _check_count(table: pathlib.Path, holds: int, wanted: int) -> None:
    """Raises where a table that is made now would have fewer neighbours than are read."""
    if wanted > holds:
        raise UserError(f"{table} gets {holds} neighbours a chunk: expected {wanted} at least")


def prepare_split(
    data: pathlib.Path,
    name: str,
    revision: int,
    *,
    neighbours: int = 0,
    report: Callable[[str], object] = logging.getLogger(__name__).info,
) -> None:
    """Finds the neighbours of a held-out split in a revision of the database, if no table has them.

    Args:
      data: W. name: of the split. revision: of the database. neighbours, report: as for
        `prepare_slice`.

    Raises:
      UserError: the database has no such revision, or the split no table of revision 0, or one of
        fewer neighbours.
    """
    folder = folder_of(data, checked(data, revision))
    table = folder / NEIGHBOURS / name
    if (table / MANIFEST_FILE).is_file():
        return
    settings = Manifest.read(data / NEIGHBOURS / name).settings
    _check_count(table, settings["k"], neighbours)
    with only_one(data):
        report(f"finding the neighbours of {name} in revision {revision} ...")
        ranking = Ranking.of(data)
        if ranking.by_terms and not (folder / BM25 / MANIFEST_FILE).is_file():
            terms = Manifest.read(data / BM25).settings
            prepare_bm25(
                folder / BM25, open_database(data, revision), Bm25Config(terms["k1"], terms["b"])
            )
        chunks = ChunkDatabase.open(data / "chunks" / name)
        queries = Keys.open(data / "keys" / name, chunks) if ranking.by_keys else chunks
        retriever = Retriever.open(data, revision=revision)
        k, sample = settings["k"], settings["recall_queries"]
        prepare_neighbours(table, queries, retriever, k=k, recall_queries=sample)


def prepare_tables(
    data: pathlib.Path,
    split: str,
    texts: Sequence[SliceConfig],
    revisions: Sequence[int],
    *,
    bert_folder: str | None,
    neighbours: int,
) -> None:
    """The first process makes the missing tables of texts, or of a split, against revisions.

    The validation split has one too: mixtures are tuned on it.

    Args:
      data: of the prepared data. split: scored where there are no texts. texts: beside the splits.
      revisions: of the database; none for the newest. bert_folder: of a BERT that is not packaged.
      neighbours: how many of what is scored will be read.

    Raises:
      UserError: a revision that is gone, or as for `prepare_slice` and `prepare_split`.
    """
    report = functools.partial(print, flush=True)
    slice_of = functools.partial(
        prepare_slice, data, bert_folder=bert_folder, neighbours=neighbours, report=report
    )

    def prepare() -> str:
        for revision in revisions:
            checked(data, revision)
        for text in texts:
            for revision in revisions or [latest(data)]:
                slice_of(text, revision=revision)
        held_out = {"validation", *([] if texts else [split])} - {"train"}
        for name in sorted(held_out, key=lambda name: name != split):  # that is checked first
            count = neighbours if name == split and not texts else 0
            for revision in revisions if (data / NEIGHBOURS / name).is_dir() else ():
                prepare_split(data, name, revision, neighbours=count, report=report)
        return ""

    processes.from_first(prepare)
