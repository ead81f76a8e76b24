"""Which of many chunks or keys are looked at where all would take too long."""

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase


def sample_ids(total: int, sample: int, seed: int = 0) -> np.ndarray:
    """Some of range(total), in order; the same ones each time."""
    random = np.random.Generator(np.random.Philox(seed))
    return np.sort(random.choice(total, min(sample, total), replace=False))


def sample_live(database: ChunkDatabase, sample: int, seed: int = 0) -> np.ndarray:
    """Some chunks of documents that were not removed, in order; the same ones each time."""
    if not len(database.removed):
        return sample_ids(len(database), sample, seed)
    return database.live_ids(sample_ids(database.live_chunks, sample, seed))


def is_live(database: ChunkDatabase, ids: np.ndarray) -> np.ndarray:
    """[n] bool: which chunks belong to documents that were not removed."""
    if not len(database.removed):
        return np.ones(len(ids), bool)
    return database.live_documents(ids) >= 0
