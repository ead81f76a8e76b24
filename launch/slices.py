"""Slices: texts that evaluation prepares by itself, beside the splits of the prepared data."""

import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines.chunk_database import ChunkDatabase, prepare_chunks
from data_pipelines.documents import KIND as DOCUMENTS
from data_pipelines.keys import Keys, KeysConfig, prepare_keys
from data_pipelines.manifest import MANIFEST_FILE
from data_pipelines.neighbours import prepare_neighbours
from data_pipelines.retriever import Queries, Retriever
from data_pipelines.revisions import latest
from data_pipelines.slices import SliceConfig, prepare_texts
from launch.prepare import only_one
from launch.splits import slice_table

SLICES = flags.DEFINE_list(
    "slices",
    [],
    "Score these texts instead of a split: wikitext103, wikitext103_detokenised, pile or pile:github, "
    "curation, lambada, or any name for JSON lines with a text field each.",
)
PATHS = flags.DEFINE_list(
    "slice_paths", [], "Where slices are read, as in pile=/data/val.jsonl.zst; needed once."
)

BERT = flags.DEFINE_string(
    "bert_folder", None, "The BERT that made the database's keys, where it is no packaged one."
)

FOLDER = "slices"
_NEIGHBOURS = 40  # of the paper's evaluation; fewer can be used of them
_RECALL_QUERIES = 100


def wanted_slices(max_documents: int | None) -> list[SliceConfig]:
    """What --slices and --slice_paths ask for; subsets of one slice together.

    Raises:
      flags.Error: a value that cannot be read, or a path of no slice.
    """
    subsets: dict[str, list[str]] = {}
    for value in SLICES.value:
        name, colon, subset = value.partition(":")
        if not name.replace("_", "").replace(".", "").isalnum() or (colon and name != "pile"):
            raise flags.Error(f"--slices={value}: expected a name, or pile: and a subset of it")
        subsets.setdefault(name, []).extend([subset] if subset else [])
    paths = _paths(PATHS.value, list(subsets))
    return [
        SliceConfig(name, paths.get(name), tuple(sorted(set(some))), max_documents)
        for name, some in subsets.items()
    ]


def _paths(values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """--slice_paths by slice."""
    paths = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in names or not path:
            known = ", ".join(names) or "one of --slices"
            raise flags.Error(f"--slice_paths={value}: expected NAME=PATH, NAME being {known}")
        paths[name] = path
    return paths


def prepare_slice(data: pathlib.Path, config: SliceConfig) -> str:
    """Prepares a slice with the data's tokeniser and retrieval database, or what is missing of it.

    After an update of the database that is a table against its newest revision.

    Returns:
      The name that open_split knows it by.
    """
    folder = data / FOLDER / config.key
    table = slice_table(folder, latest(data))
    if (table / MANIFEST_FILE).is_file():
        return config.key
    with only_one(data):
        print(f"preparing {config.key} ...", flush=True)
        prepare_texts(folder, config)
        prepare_chunks(folder / "chunks", folder / DOCUMENTS, data / "tokenizer")
        retriever = Retriever.open(data, model=BERT.value)
        chunks = ChunkDatabase.open(folder / "chunks")
        queries: Queries = chunks
        if retriever.ranking.by_keys:
            made = retriever.keys.manifest.settings
            keys = KeysConfig(BERT.value or made["embedder"]["model"], made["dtype"])
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
