"""The benchmark of token memories, on a small text of its own."""

import numpy as np

from benchmarks import token_memory
from data_pipelines.token_memory import TokenMemory
from data_pipelines.token_memory.build import TokenMemoryConfig, prepare_token_memory


def test_look_ups_are_of_edited_copies(tmp_path):
    tokens = np.random.default_rng(3).integers(3, 8000, 3000).astype(np.uint16)
    database = token_memory.write_chunks(tmp_path / "chunks", tokens, 64 * 200)
    assert len(database) == 200
    prepare_token_memory(tmp_path / "memory", database, TokenMemoryConfig(64 * 100))
    memory = TokenMemory.open([tmp_path / "memory"], database)
    found = token_memory.look_ups(memory, tokens, 50)
    assert 0 < found["median_us"] <= found["p99_us"]
    assert 4 < found["mean_length"] < 32  # cut by the edits, one token in twenty on both sides
