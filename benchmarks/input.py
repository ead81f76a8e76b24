"""Input tokens per second with neighbours attached, for databases larger than any cache.

    python -m benchmarks.input [--chunks=4000000] [--neighbours=2] [--sequence_length=2048]

Writes a database of random tokens and a table of random neighbours into a temporary folder (640 MB
for 4,000,000 chunks), the worst case for reading. Reads batches of it by random access in one thread,
and through the iterator with its prefetching thread.

On 2 cores that others used too (NumPy 2.4, Grain 0.2.18): 16.7 M tokens per second of processor, 6 M
per second of wall time at a load of 7; every token came with eight of its neighbours'. docs/performance.md
compares 8 and 4,000 shards.
"""

import itertools
import pathlib
import tempfile
import time

from absl import app, flags

from benchmarks.tables import write_database, write_table
from data_pipelines.batches.batches import BatchConfig, Batches

_CHUNKS = flags.DEFINE_integer("chunks", 4_000_000, "Chunks of the database.", lower_bound=1)
_SHARDS = flags.DEFINE_integer("shards", 8, "Shards that they lie in.", lower_bound=1)
_NEIGHBOURS = flags.DEFINE_integer("neighbours", 2, "Neighbours a chunk.", lower_bound=0)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens a sequence.", lower_bound=64)
_BATCH = flags.DEFINE_integer("batch_size", 32, "Sequences a batch.", lower_bound=1)
_SECONDS = flags.DEFINE_integer("seconds", 10, "How long each measurement takes.", lower_bound=1)


def measure(name: str, batches: Batches, seconds: int, *, prefetch: bool) -> None:
    """Makes batches for some seconds and prints the rates."""
    tokens = count = 0
    iterator = batches.iterate() if prefetch else map(batches.rows, itertools.count())
    next(iterator)
    wall, processor = time.perf_counter(), time.process_time()
    for batch in iterator:
        tokens, count = tokens + batch.tokens.size, count + 1
        if time.perf_counter() - wall > seconds:
            break
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(
        f"{name:14} {count:5,} batches: {tokens / wall / 1e6:6.2f} M tokens/s,"
        f" {tokens / processor / 1e6:6.2f} M tokens a second of processor"
    )


def main(_: list[str]) -> None:
    """Writes the artefacts and measures both ways of reading them."""
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        start = time.perf_counter()
        database = write_database(work / "chunks", _CHUNKS.value, _SHARDS.value)
        table = write_table(work / "neighbours", database, max(1, _NEIGHBOURS.value))
        print(f"{len(database):,} chunks written in {time.perf_counter() - start:.1f} s")
        config = BatchConfig(
            sequence_length=_LENGTH.value, batch_size=_BATCH.value, neighbours=_NEIGHBOURS.value
        )
        batches = Batches(config, database, table, database)
        measure("random access", batches, _SECONDS.value, prefetch=False)
        measure("with prefetch", batches, _SECONDS.value, prefetch=True)


if __name__ == "__main__":
    app.run(main)
