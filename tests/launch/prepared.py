"""A prepared workdir in a second: real documents, tokeniser and chunks, neighbour tables at random.

Training reads a table's tokens whatever they are; what a table should hold is tested where it is
made.
"""

import pathlib

import numpy as np

from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.neighbour_table import IDS, KIND, SCORES
from tests.data_pipelines.small import documents_config, prepare, write_texts

TINY = """
RetroConfig.d_model = 16
RetroConfig.num_layers = 2
RetroConfig.num_heads = 2
RetroConfig.head_dim = 8
RetroConfig.d_ff = 32
RetroConfig.cca_layers = (2,)
RetroConfig.encoder_d_model = 16
RetroConfig.encoder_num_layers = 1
RetroConfig.encoder_num_heads = 2
RetroConfig.encoder_head_dim = 8
RetroConfig.encoder_d_ff = 32
BatchConfig.sequence_length = 128
BatchConfig.batch_size = 8
OptimizerConfig.warmup_steps = 2
OptimizerConfig.max_learning_rate = 0.01
TrainConfig.steps = 28
TrainConfig.log_every = 1
TrainConfig.checkpoint_every = 4
TrainConfig.neighbour_dropout = 0.2
TrainConfig.evaluate_every = 14
TrainConfig.evaluate_batches = 1
"""


def prepare_workdir(root: pathlib.Path) -> pathlib.Path:
    """Fills root/W with chunks and a table, and root/tiny.gin; returns root/W."""
    workdir = root / "W"
    for seed, corpus in enumerate(("letters", "words")):
        write_texts(root / corpus, 30, seed=seed)
    prepare(workdir, documents_config(root / "letters", root / "words"))
    database = ChunkDatabase.open(workdir / "chunks" / "train")
    for split in ("train", "validation"):
        _write_table(workdir, split, database)
    (root / "tiny.gin").write_text(TINY)
    return workdir


def _write_table(workdir: pathlib.Path, split: str, database: ChunkDatabase) -> None:
    """Two neighbours of each chunk of a split, some of them none."""
    chunks = ChunkDatabase.open(workdir / "chunks" / split)
    parents = {
        "chunks": (chunks.manifest, chunks.directory),
        "database": (database.manifest, database.directory),
    }
    settings = {"k": 2, "recall_queries": 0, "score": "squared_l2"}
    stage = Stage(workdir / "neighbours" / split, KIND, settings, parents)
    random = np.random.default_rng(0)
    names = []
    for i, ids in enumerate(chunks.shards):
        table = random.integers(-1, len(database), (len(ids), 2))
        names += [f"{IDS}-{i:05d}.npy", f"{SCORES}-{i:05d}.npy"]
        stage.write_array(names[-2], table)
        stage.write_array(names[-1], np.zeros(table.shape, np.float32))
    stage.finish({"chunks": len(chunks)}, names)
