"""Prepares a text for evaluation: chunks, keys and neighbours beside those of the splits."""

import logging
import pathlib
from collections.abc import Callable

from data_pipelines.artefacts.manifest import MANIFEST_FILE
from data_pipelines.chunk_database.database import ChunkDatabase, prepare_chunks
from data_pipelines.documents.documents import KIND as DOCUMENTS
from data_pipelines.evaluation.splits import slice_table
from data_pipelines.evaluation.texts import SliceConfig, check_source, prepare_texts
from data_pipelines.retriever.keys import Keys, KeysConfig, prepare_keys
from data_pipelines.retriever.neighbours import prepare_neighbours
from data_pipelines.retriever.queries import Queries
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.revisions import latest
from data_pipelines.workdir.stages import only_one

FOLDER = "slices"
_NEIGHBOURS = 40  # of the paper's evaluation; fewer can be used of them
_RECALL_QUERIES = 100


def prepare_slice(
    data: pathlib.Path,
    config: SliceConfig,
    *,
    bert_folder: str | None = None,
    report: Callable[[str], object] = logging.getLogger(__name__).info,
) -> str:
    """Prepares a slice with the data's tokeniser and retrieval database, or what is missing of it.

    After an update of the database that is a table against its newest revision.

    Args:
      data: W.
      config: the text.
      bert_folder: the BERT that made the database's keys, where it is no packaged one.
      report: receives a line when there is anything to do.

    Returns:
      The name that open_split knows it by.

    Raises:
      UserError: a path where nothing is, or other files than those that were prepared by this name.
    """
    folder = data / FOLDER / config.key
    table = slice_table(folder, latest(data))
    if (table / MANIFEST_FILE).is_file():
        check_source(folder, config)
        return config.key
    with only_one(data):
        report(f"preparing {config.key} ...")
        prepare_texts(folder, config)
        prepare_chunks(folder / "chunks", folder / DOCUMENTS, data / "tokenizer")
        retriever = Retriever.open(data, model=bert_folder)
        chunks = ChunkDatabase.open(folder / "chunks")
        queries: Queries = chunks
        if retriever.ranking.by_keys:
            settings = retriever.keys.manifest.settings
            keys = KeysConfig(bert_folder or settings["embedder"]["model"], settings["dtype"])
            prepare_keys(folder / "keys", folder / "chunks", data / "tokenizer", keys)
            queries = Keys.open(folder / "keys", chunks)
        prepare_neighbours(
            table,
            queries,
            retriever,
            k=_NEIGHBOURS,
            recall_queries=_RECALL_QUERIES,
        )
    return config.key
