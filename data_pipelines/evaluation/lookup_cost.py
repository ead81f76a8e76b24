"""What a look-up costs: operations and bytes of each memory that a text is predicted with.

All figures are counts from sizes on disk and from the plan of an index, none is timed. A product of an
[m, k] and a [k, n] matrix counts 2 m k n operations, as in retro_jax.model.flops. One look-up of
neighbours serves a chunk of 64 tokens:

    embed     the frozen BERT over the chunk's word pieces: products of its layers
    search    brute force: 2 d operations and 4 d bytes a key; codes of 4 bits: one addition and half a
              byte for each block of dimensions, then the best again by brute force; a tree: its leaves'
              centres first, then the codes of those searched; BM25: at most one addition and 8
              bytes for each chunk with a term of the query, and 6 bytes a token of each candidate
    read      k neighbours of 128 tokens

A look-up in a token memory compares no floats. It reads, for each part, three binary searches over its
places, each of which reads the ending found there, and the votes.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.retriever.bert import BertConfig
from data_pipelines.retriever.bm25 import Bm25
from data_pipelines.retriever.embedder import find_model
from data_pipelines.retriever.index_kind import IndexPlan
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Ranking
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.memory import LONGEST, MOST_VOTES, TokenMemory
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from retro_jax.errors import UserError

NEIGHBOUR_LENGTH = 2 * CHUNK_LENGTH
_POSTING = 8  # bytes of a chunk's number and score
_WEIGHTED = 6  # bytes of a token of a candidate and its weight


@dataclasses.dataclass(frozen=True)
class LookupCost:
    """What one memory costs.

    Attributes:
      operations: floating-point operations for a token of the text. bytes_read: of the memory, for it.
      bytes_kept: of the memory, in all. tokens: of the text that it holds.
    """

    operations: float = 0.0
    bytes_read: float = 0.0
    bytes_kept: float = 0.0
    tokens: int = 0

    def __add__(self, other: "LookupCost") -> "LookupCost":
        """Both memories of one database: what is read and kept adds up, the text is the same."""
        return LookupCost(
            self.operations + other.operations,
            self.bytes_read + other.bytes_read,
            self.bytes_kept + other.bytes_kept,
            max(self.tokens, other.tokens),
        )


def condition_cost(
    data: pathlib.Path,
    revision: int | None,
    *,
    neighbours: int = 0,
    share: float = 1.0,
    searched: bool = True,
    states: int = 0,
    tokens: bool = False,
    beside: LookupCost = LookupCost(),
) -> LookupCost | None:
    """The cost of all memories of a condition; None where parts of the database are not there.

    Args:
      data: W. revision: of its database; None for the newest. neighbours: a chunk's.
      share, searched, states: as for `neighbour_cost`.
      tokens: whether a token memory is asked. beside: kNN-LM's part.
    """
    cost = beside
    try:
        if neighbours:
            database, ranking = Database.open(data, revision), Ranking.of(data)
            cost += neighbour_cost(
                database, ranking, neighbours, share=share, searched=searched, states=states
            )
        if tokens:
            cost += token_memory_cost(prepare_and_open(open_database(data, revision)))
    except UserError:
        return None
    return cost


def search_cost(plan: IndexPlan, keys: float, dimension: int) -> tuple[float, float]:
    """Operations and bytes of one query to an index.

    Args:
      plan: of the index. keys: in it. dimension: d.
    """
    if plan.kind in ("brute_force", "exact"):
        return 2.0 * dimension * keys, 4.0 * dimension * keys
    compared = float(plan.num_leaves) + min(plan.reorder, keys)
    share = plan.leaves_to_search / plan.num_leaves if plan.num_leaves else 1.0
    blocks = share * keys * math.ceil(dimension / max(1, plan.dimensions_per_block))
    return 2.0 * dimension * compared + blocks, 4.0 * dimension * compared + blocks / 2


def embedding_operations(config: BertConfig, positions: float) -> float:
    """Operations of a BERT for one text of so many positions."""
    d, f = config.hidden_size, config.intermediate_size
    layer = 2.0 * (4 * d * d + 2 * d * f) + 4.0 * positions * d
    return config.num_hidden_layers * layer * positions


def neighbour_cost(
    database: Database,
    ranking: Ranking,
    k: int,
    *,
    share: float = 1.0,
    searched: bool = True,
    states: int = 0,
) -> LookupCost:
    """The cost of k neighbours a chunk.

    A BERT that is no packaged model is not counted.

    Args:
      database: which is retrieved from. ranking: how. k: neighbours.
      share: of the database's documents that are searched. searched: False for random ones.
      states: bytes that a fitted model keeps of a neighbour and reads; all chunks' are counted as kept.
    """
    chunks, width = database.chunks, _token_bytes(database.chunks)
    operations, read = 0.0, float(k * (NEIGHBOUR_LENGTH * width + states))
    kept = float((CHUNK_LENGTH * width + states) * chunks.live_chunks)
    if searched and ranking.by_keys:
        keys, plan = database.keys, IndexPlan(**database.index.manifest.fact("plan"))
        count, dimension = keys.manifest.fact("keys"), keys.dimension
        found = search_cost(plan, share * count, dimension)
        operations += found[0] + _embedding(keys.manifest)
        read += found[1]
        codes = plan.dimensions_per_block and math.ceil(dimension / plan.dimensions_per_block) / 2
        size = 2 if keys.manifest.settings.get("dtype") == "bfloat16" else 4
        kept += count * (size * dimension + codes)
    if searched and ranking.by_terms:
        added, of_terms = _bm25_cost(database.bm25, ranking, share)
        operations, read = operations + added, read + of_terms
        kept += _size(database.bm25.manifest)
    return LookupCost(
        operations / CHUNK_LENGTH, read / CHUNK_LENGTH, share * kept, _tokens(chunks, share)
    )


def token_memory_cost(memory: TokenMemory) -> LookupCost:
    """The cost of one look-up a token, at most."""
    database, read, kept = memory.database, 0.0, 0.0
    width = _token_bytes(database)
    for manifest in memory.manifests:
        parts = manifest.fact("parts")
        each = manifest.fact("tokens") / max(1, len(parts))
        steps = math.ceil(math.log2(each + 1))
        read += len(parts) * 3 * steps * (4 + LONGEST * width)
        kept += _size(manifest)
    steps = math.ceil(math.log2(len(database) + 1))
    read += MOST_VOTES * (4 + width + 8 * steps + 4)
    return LookupCost(0.0, read, kept, _tokens(database))


def datastore_cost(tokens: int, dimension: int, plan: IndexPlan, text: ChunkDatabase) -> LookupCost:
    """The cost of kNN-LM's look-up: a key of 16-bit floats for each token, and the token.

    Args:
      tokens: in the datastore. dimension: of a key. plan: of its index. text: whose tokens they are.
    """
    operations, read = search_cost(plan, tokens, dimension)
    codes = plan.dimensions_per_block and math.ceil(dimension / plan.dimensions_per_block) / 2
    size = 2 * dimension + _token_bytes(text) + codes
    return LookupCost(operations, read, tokens * size, tokens)


def _embedding(manifest: Manifest) -> float:
    """Operations of embedding a chunk as keys were made; 0 where the BERT is not at hand."""
    settings, facts = manifest.settings.get("embedder", {}), manifest.facts
    try:
        config = BertConfig.open(find_model(settings.get("model", "")))
    except UserError:
        return 0.0
    positions = facts["positions"] / max(1, facts["keys"]) if "positions" in facts else CHUNK_LENGTH
    return embedding_operations(config, positions)


def _bm25_cost(bm25: Bm25, ranking: Ranking, share: float) -> tuple[float, float]:
    """Operations and bytes of BM25 for one query, at most: of candidates, or of its terms' lists."""
    if ranking.by_keys:
        compared = float(ranking.candidates * CHUNK_LENGTH)
        return compared, _WEIGHTED * compared
    times = bm25.containing().astype(np.float64)
    chunks = max(1, bm25.manifest.fact("indexed"))
    # A chunk's terms are drawn as often as they occur, so frequent ones have most of the postings.
    visited = share * float((times**2).sum()) / chunks
    return visited, _POSTING * visited


def _token_bytes(database: ChunkDatabase) -> int:
    """Bytes of a token on disk."""
    return 2 if max(database.vocab_size, database.pad_id + 1) <= 1 << 16 else 4


def _tokens(database: ChunkDatabase, share: float = 1.0) -> int:
    """Tokens of the documents that are not removed; a padded chunk counts whole if none is known."""
    corpora: Mapping[str, Mapping[str, Any]] = database.manifest.fact("corpora")
    whole = CHUNK_LENGTH * database.live_chunks
    known = all("tokens" in corpus for corpus in corpora.values())
    tokens = sum(corpus["tokens"] for corpus in corpora.values()) if known else whole
    return round(share * tokens)


def _size(manifest: Manifest) -> float:
    """Bytes of an artefact's files."""
    return float(sum(shard.size for shard in manifest.shards))
