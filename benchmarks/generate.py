"""Time per token of cached generation, beside one reading of all weights in the same run.

    python -m benchmarks.generate
    python -m benchmarks.generate --preset=tiny --at_once=1 --turns=3
    python -m benchmarks.generate --positions=relative --output=generate.json

A token at batch 1 has to read the decoder's weights once, so the time of one reading is its limit.
It is measured by products of a vector with matrices of as many bytes as all parameters have, the
encoder's too. Steps, readings and uncached forward passes take turns in one run, and the best turn of
each counts, so other work on the machine slows all alike.

    first token     a prompt of `position` tokens, read by whole chunks (neighbours are given)
    step            one token at a position; the text's last chunk is complete, K neighbours are read
    chunk's end     a step that completes a chunk: it encodes K neighbours too
    uncached        one forward pass over the text's chunks, as generation was before the cache

Retrieval's share is measured on a text of 256 tokens with a database of random keys, searched exactly:
one product of the query with all keys, and the largest K. A real database's share depends on its
embedder and index.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks.timing import best, machine, table, timed, write_json
from benchmarks.training import (
    DTYPE,
    NEIGHBOURS,
    OUTPUT,
    POSITIONS,
    PRESET,
    TURNS,
    Work,
    work_from_flags,
)
from launch.common import app
from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.generate.decoder import Completed, Decoder, Window
from retro_jax.generate.generator import Generator, GeneratorOptions
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro

BATCHES = flags.DEFINE_list("at_once", ["1", "8", "32"], "Texts at once.")
AT = flags.DEFINE_list("at", ["64", "256", "500"], "Positions in a window of 512 tokens.")
UNCACHED = flags.DEFINE_bool("uncached", True, "Also one forward pass a token, at batch 1.")
CHUNKS = flags.DEFINE_integer("database", 200_000, "Keys of the random database.", lower_bound=10)

_WINDOW = 512
_KEY_WIDTH = 384

__all__ = [  # flags of other modules that --help shows too
    "DTYPE",
    "NEIGHBOURS",
    "OUTPUT",
    "POSITIONS",
    "PRESET",
    "TURNS",
    "main",
]


class Reading:
    """One reading of as many bytes as all parameters have."""

    def __init__(self, config: RetroConfig, dtype: Any):
        size = 1024
        count = -(-config.num_parameters() // size**2)
        self._weights = [jnp.full((size, size), 1e-3, dtype) for _ in range(count)]
        self.bytes = sum(weight.nbytes for weight in self._weights)

        @jax.jit
        def read(weights: list[jax.Array], x: jax.Array) -> list[jax.Array]:
            return [x @ weight for weight in weights]

        self._read = lambda: read(self._weights, jnp.ones((1, size), dtype))
        jax.block_until_ready(self._read())

    def turn(self) -> float:
        """Seconds of one reading."""
        return timed(self._read).wall


class Case:
    """Texts of one length in a separate cache."""

    def __init__(self, decoder: Decoder, work: Work, rows: int, position: int):
        config, draw = decoder.config, np.random.default_rng(0)
        self._decoder, self._rows, self._k = decoder, rows, work.neighbours
        tokens = draw.integers(1, config.vocab_size, (rows, _WINDOW)).astype(np.int32)
        shape = (rows, position // config.chunk_length, self._k, config.neighbour_length)
        neighbours = draw.integers(1, config.vocab_size, shape).astype(np.int32)
        self._windows = [Window(tokens[row, :position], neighbours[row]) for row in range(rows)]
        self._position = position
        capacity = decoder.capacity_for(position + 1)
        _, self._cache = decoder.prefill(self._windows, neighbours=self._k, capacity=capacity)
        start = position // config.chunk_length * config.chunk_length
        self._chunks = [
            Completed(row, tokens[row, start : start + config.chunk_length], neighbours[row, 0])
            for row in range(rows)
        ]

    def first_token(self) -> float:
        """Seconds of reading the prompts."""
        return timed(lambda: self._decoder.prefill(self._windows, neighbours=self._k)[0]).wall

    def step(self, *, chunk_end: bool = False) -> float:
        """Seconds of one step of every text."""
        length = self._decoder.config.chunk_length
        position = self._position // length * length + length - 1 if chunk_end else self._position
        tokens = np.ones((self._rows, 1), np.int32)
        starts = np.full(self._rows, position, np.int32)

        def run() -> jax.Array:
            logits, self._cache = self._decoder.step(
                self._cache,
                tokens,
                starts,
                live=np.ones(self._rows, bool),
                completed=self._chunks if chunk_end else (),
            )
            return logits

        return timed(run).wall


def uncached(model: Retro, work: Work, position: int) -> Callable[[], float]:
    """Seconds of a forward pass that gives the token after `position` tokens."""
    config = work.retro
    chunks = 1
    while chunks * config.chunk_length < position:
        chunks *= 2
    graph, params = nnx.split(model)

    @jax.jit
    def run(params: nnx.State, tokens: jax.Array, neighbours: jax.Array) -> jax.Array:
        model: Retro = nnx.merge(graph, params)
        return model.read(model.hidden_states(tokens, neighbours)[:, position - 1 : position])

    tokens = np.ones((1, chunks * config.chunk_length), np.int32)
    neighbours = np.ones((1, chunks, work.neighbours, config.neighbour_length), np.int32)
    return lambda: timed(lambda: run(params, tokens, neighbours)).wall


def measure(
    model: Retro, decoder: Decoder, work: Work, reading: Reading, *, rows: int, position: int
) -> dict[str, Any]:
    """A row of the table."""
    case = Case(decoder, work, rows, position)
    sides: dict[str, Callable[[], float]] = {
        "reading": reading.turn,
        "first token": case.first_token,
        "step": case.step,
        "chunk's end": lambda: case.step(chunk_end=True),
    }
    if UNCACHED.value and rows == 1:
        sides["uncached"] = uncached(model, work, position)
    for side in sides.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(TURNS.value):
        for name, side in sides.items():
            times[name].append(side())
    seconds = {name: min(turns) for name, turns in times.items()}
    return {
        "texts": rows,
        "position": position,
        "reading ms": 1e3 * seconds["reading"],
        "step ms": 1e3 * seconds["step"],
        "step / reading": None,  # by the fastest reading of all rows
        "tokens/s": rows / seconds["step"],
        "first token ms": 1e3 * seconds["first token"],
        "chunk's end ms": 1e3 * seconds["chunk's end"],
        "uncached / step": seconds["uncached"] / seconds["step"] if "uncached" in seconds else None,
    }


def retrieval_share(model: Retro, work: Work, rows: int) -> dict[str, float]:
    """Seconds of 256 tokens of each text with live retrieval, and the part of them spent in it."""
    config, draw = work.retro, np.random.default_rng(0)
    keys = draw.normal(size=(CHUNKS.value, _KEY_WIDTH)).astype(np.float32)
    embedding = draw.normal(size=(config.vocab_size, _KEY_WIDTH)).astype(np.float32)
    texts = draw.integers(1, config.vocab_size, (1000, config.neighbour_length))

    def retrieve(chunks: np.ndarray) -> np.ndarray:
        scores = embedding[chunks].mean(axis=1) @ keys.T
        nearest = np.argpartition(-scores, work.neighbours, axis=1)[:, : work.neighbours]
        return texts[nearest % len(texts)]

    generator = Generator(
        model,
        chunks=_WINDOW // config.chunk_length,
        eos_id=config.vocab_size,
        retrieve=retrieve,
        options=GeneratorOptions(work.neighbours),
    )
    prompts = [np.full(1, 1 + row, np.int32) for row in range(rows)]
    sampling = SamplingConfig(max_tokens=256, temperature=0)
    generator.generate(prompts, sampling)
    before = generator.retrieval_seconds
    turn = best([timed(lambda: generator.generate(prompts, sampling))])
    seconds = generator.retrieval_seconds - before
    return {
        "texts": rows,
        "seconds": turn.wall,
        "tokens/s": rows * sampling.max_tokens / turn.wall,
        "retrieval s": seconds,
        "share": seconds / turn.wall,
    }


def numbers(name: str, values: list[str], limit: int) -> list[int]:
    """A list flag's numbers, each from 1 to `limit`.

    Raises:
      UserError: naming the flag and the bad value.
    """
    for value in values:
        if not value.isdecimal() or not 1 <= int(value) <= limit:
            raise UserError(f"--{name}={value}: expected numbers from 1 to {limit}")
    return [int(value) for value in values]


def main() -> None:
    """Times, and prints the table."""
    batches, positions = numbers("at_once", BATCHES.value, 1024), numbers("at", AT.value, 511)
    work = work_from_flags(scan_layers=False)
    model = Retro(work.retro, work.execution, rngs=nnx.Rngs(0))
    decoder = Decoder(model, chunks=_WINDOW // work.retro.chunk_length)
    reading = Reading(work.retro, decoder.layout.dtype)
    print(f"{PRESET.value}, {work.retro.positions}, {work.execution.activation_dtype}: {machine()}")
    rows = [
        measure(model, decoder, work, reading, rows=texts, position=position)
        for texts in batches
        for position in positions
    ]
    fastest = min(row["reading ms"] for row in rows)
    for row in rows:
        row["step / reading"] = row["step ms"] / fastest
    print(table(rows))
    rate = reading.bytes / fastest / 1e6
    print(f"reading: {reading.bytes / 1e6:.0f} MB at {rate:.3g} GB/s")
    shares = [retrieval_share(model, work, texts) for texts in batches]
    print(f"256 tokens of each text, with retrieval among {CHUNKS.value:,} random keys:")
    print(table(shares))
    if OUTPUT.value:
        content = {"machine": machine(), "preset": PRESET.value, "table": rows, "retrieval": shares}
        write_json(pathlib.Path(OUTPUT.value), content)


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
