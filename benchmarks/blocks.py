"""Time of a block of tokens of several texts, over one token of each: whether drafts pay in a batch.

    python -m benchmarks.blocks
    python -m benchmarks.blocks --preset=tiny --at_once=1,4 --turns=3

A draft of T - 1 tokens is read in a block of T. Where T tokens of a text take as long as one, every
token of a draft that stays is won; where they take T times as long, none is. A step of several texts
waits for arithmetic sooner than one of a single text. Blocks take turns in one run, and the best turn
of each counts.
"""

import numpy as np
from absl import flags
from flax import nnx

from benchmarks.generate import BATCHES, numbers
from benchmarks.timing import machine, table, timed
from benchmarks.training import DTYPE, NEIGHBOURS, POSITIONS, PRESET, TURNS, work_from_flags
from launch.common import app
from retro_jax.generate.decoder import Decoder
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro

LENGTHS = flags.DEFINE_list("blocks", ["2", "4", "8"], "Tokens of a block.")

_WINDOW, _POSITION = 512, 256

__all__ = ["BATCHES", "DTYPE", "NEIGHBOURS", "POSITIONS", "PRESET", "TURNS", "main"]


def measure(decoder: Decoder, rows: int, lengths: list[int], neighbours: int) -> dict[str, object]:
    """A row of the table."""
    cache = decoder.empty(rows, _WINDOW, neighbours)
    starts, live = np.full(rows, _POSITION, np.int32), np.ones(rows, bool)
    times: dict[int, list[float]] = {length: [] for length in lengths}

    def turn(length: int) -> float:
        def run() -> object:
            nonlocal cache
            tokens = np.ones((rows, length), np.int32)
            logits, cache = decoder.step(cache, tokens, starts, live=live, all_logits=length > 1)
            return logits

        return timed(run).wall

    for length in lengths:
        turn(length)
    for _ in range(TURNS.value):
        for length in lengths:
            times[length].append(turn(length))
    best = {length: min(turns) for length, turns in times.items()}
    row: dict[str, object] = {"texts": rows, "one token ms": 1e3 * best[lengths[0]]}
    return row | {f"{n} over 1": best[n] / best[lengths[0]] for n in lengths[1:]}


def main() -> None:
    """Times, and prints the table."""
    batches, lengths = numbers("at_once", BATCHES.value, 1024), numbers("blocks", LENGTHS.value, 32)
    work = work_from_flags(scan_layers=False)
    model = Retro(work.retro, work.execution, rngs=nnx.Rngs(0))
    decoder = Decoder(model, chunks=_WINDOW // work.retro.chunk_length)
    rows = [
        measure(decoder, count, [1, *(n for n in lengths if n > 1)], work.neighbours)
        for count in batches
    ]
    print(f"{PRESET.value}, {work.retro.positions}, {work.execution.activation_dtype}: {machine()}")
    print(table(rows))


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
