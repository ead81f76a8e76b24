"""The datastore of kNN-LM: which training text it contains, and the search among its keys.

ScaNN searches a large datastore, with the index that a retrieval database of as many keys would have.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.exact import ExactSearcher
from data_pipelines.retriever.index_config import KINDS, IndexConfig, plan_index
from data_pipelines.retriever.index_kind import IndexPlan

LookUp = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # places and distances
_REORDERED = 4  # candidates that ScaNN compares again exactly, for each neighbour


def plan_datastore(tokens: int, dimension: int, neighbours: int, *, exact: bool) -> IndexPlan:
    """The index of a datastore of so many keys.

    Args:
      tokens: keys. dimension: of each. neighbours: wanted of each query. exact: compare every key.
    """
    plan = plan_index(tokens, dimension, IndexConfig("brute_force" if exact else "auto"))
    return dataclasses.replace(plan, reorder=_REORDERED * neighbours)


def search_datastore(keys: np.ndarray, neighbours: int, *, exact: bool) -> tuple[LookUp, str]:
    """Finds the k nearest of keys [S, d]: places [n, k], -1 for none, and distances; its name."""
    plan = plan_datastore(len(keys), keys.shape[1], neighbours, exact=exact)
    if plan.kind == "brute_force":
        return ExactSearcher(keys, on_devices=False).search, "exact"
    sample = IndexConfig.training_sample
    built = KINDS[plan.kind].build(keys.astype(np.float32), plan, sample)
    return built.search, f"ScaNN ({plan.kind})"


def search_recall(look_up: LookUp, queries: np.ndarray, keys: np.ndarray, k: int) -> float:
    """The share of the k nearest keys that the search returns."""
    true = ExactSearcher(keys, on_devices=False).search(queries, k)[0]
    pairs = zip(look_up(queries, k)[0], true, strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in pairs]))


def spread_chunks(database: ChunkDatabase, tokens: int) -> np.ndarray:
    """Ids of the first chunks of each corpus, in proportion, of about so many tokens in all."""
    corpora = database.manifest.fact("corpora")  # which revisions of a database state too
    share = min(1.0, tokens / max(1, sum(corpus["tokens"] for corpus in corpora.values())))
    ranges = [part for parts in database.corpora.values() for part in parts]
    ids = [np.arange(part.start, part.start + round(share * len(part))) for part in ranges]
    return functools.reduce(np.union1d, ids, np.zeros(0, np.int64)).astype(np.int64)
