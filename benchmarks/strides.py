"""Bits per byte by retrieval stride: neighbours found again after every 64, 32, 16 or 4 tokens.

    python -m benchmarks.strides --workdir=W
    python -m benchmarks.strides --workdir=W --strides=64,16 --documents=20

Scores the first window of each of W's first test documents, from its first token on, with W/retro and
W's database. The model was trained with the stride 64 alone.
"""

import math
import pathlib
import time
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from benchmarks.timing import machine, table, write_json
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.live.settings import LiveSettings
from launch.common import app
from launch.runs import trained_run
from retro_jax.evaluate.strided_score import strided_losses
from retro_jax.generate.decoder import Decoder
from retro_jax.generate.live_database import Lookup
from retro_jax.host_memory import keep_freed_memory

STRIDES = flags.DEFINE_list("strides", ["64", "32", "16", "4"], "Tokens between retrievals.")
DOCUMENTS = flags.DEFINE_integer("documents", 40, "Of each corpus.", lower_bound=1)
AT_ONCE = flags.DEFINE_integer("texts_at_once", 16, "Texts that are read together.", lower_bound=1)
TO = flags.DEFINE_string("strides_output", None, "Also write everything to this file, as JSON.")


def texts_of(workdir: pathlib.Path, window: int) -> dict[str, list[np.ndarray]]:
    """Corpus -> the first tokens of its first documents in the test split."""
    database = ChunkDatabase.open(workdir / "chunks" / "test")
    texts = {}
    for corpus, ranges in database.corpora.items():
        ids = np.concatenate([np.arange(part.start, part.stop) for part in ranges])
        records = map(
            database.record, np.unique(database.documents(ids))[: DOCUMENTS.value].tolist()
        )
        rows = [
            database.chunks(
                record.first_chunk + np.arange(min(record.chunks, window // 64))
            ).reshape(-1)
            for record in records
        ]
        texts[corpus] = [row[row != database.pad_id] for row in rows]
    return texts


def main() -> None:
    """Scores, and prints the table."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "a workdir with a trained RETRO"))
    run = trained_run.open_run(workdir / "retro")
    tokenizer = Tokenizer.open(workdir / "tokenizer")
    model = nnx.merge(*trained_run.load_model(run))
    k, part = run.batches.neighbours, run.batches.neighbour_part
    live = Lookup(LiveSettings().open(workdir, tokenizer, k, part), k)
    texts = texts_of(workdir, run.batches.sequence_length)
    rows = []
    for name in ["off", *STRIDES.value]:
        stride = None if name == "off" else int(name)
        decoder = Decoder(model, chunks=run.chunks, stride=stride)
        row: dict[str, Any] = {"stride": name}
        start = time.perf_counter()
        for corpus, own in texts.items():
            nats, size = 0.0, 0
            for first in range(0, len(own), AT_ONCE.value):
                group = own[first : first + AT_ONCE.value]
                for losses in strided_losses(decoder, group, None if name == "off" else live):
                    nats += float(losses.sum())
            size = sum(tokenizer.num_bytes(text[1:]) for text in own)
            row[f"{corpus} bits per byte"] = nats / math.log(2) / size
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
    sizes = {corpus: (len(own), sum(map(len, own))) for corpus, own in texts.items()}
    print(f"strides: {run.model.num_parameters():,} parameters, {machine()}")
    print("documents and tokens:", sizes)
    print(table(rows))
    if TO.value:
        content = {"model": run.identity(), "texts": sizes, "table": rows}
        write_json(pathlib.Path(TO.value), content)


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
