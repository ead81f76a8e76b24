"""Texts read by a cached decoder, beside the same texts in one uncached forward pass."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import RetroConfig
from retro_jax.generate.decoder import Completed, Decoder, Window
from retro_jax.model import Retro

K = 2


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokens [B, N] and neighbours [B, C, K, R], or None for retrieval off."""

    tokens: np.ndarray
    neighbours: np.ndarray | None


def make_texts(config: RetroConfig, rows: int, chunks: int, *, retrieval: bool) -> Texts:
    """Random texts; some neighbours have no continuation, and one chunk has no neighbour at all."""
    rng = np.random.default_rng(0)
    length = config.chunk_length
    ids = np.array([i for i in range(config.vocab_size) if i != config.pad_id])
    tokens = rng.choice(ids, (rows, chunks * length)).astype(np.int32)
    if not retrieval:
        return Texts(tokens, None)
    shape = (rows, chunks, K, config.neighbour_length)
    neighbours = rng.choice(ids, shape).astype(np.int32)
    neighbours[0, 0, 1, length:] = config.pad_id
    neighbours[-1, 1] = config.pad_id
    return Texts(tokens, neighbours)


def uncached(model: Retro, texts: Texts) -> np.ndarray:
    """[B, N, V] by one forward pass."""
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    return np.asarray(run(params, texts.tokens, texts.neighbours))


def cached(
    model: Retro,
    texts: Texts,
    prompts: list[int],
    *,
    mesh: Mesh | None = None,
    scan: bool | None = None,
) -> np.ndarray:
    """[B, N, V]: each row prefilled with its prompt's length, then token by token; else NaN.

    The cache grows at the ends of chunks, as the generator's does.
    """
    config = model.config
    rows, length = texts.tokens.shape
    decoder = Decoder(model, chunks=length // config.chunk_length, mesh=mesh, scan=scan)
    out = np.full((rows, length, config.vocab_size), np.nan, np.float32)
    windows = [window(config, texts, row, end) for row, end in enumerate(prompts)]
    logits, cache = decoder.prefill(windows, neighbours=0 if texts.neighbours is None else K)
    for row, end in enumerate(prompts):
        out[row, end - 1] = np.asarray(logits)[row]
    for step in range(length - min(prompts)):
        positions = np.zeros(cache.rows, np.int32)
        positions[:rows] = np.array(prompts) + step
        live = np.zeros(cache.rows, bool)
        live[:rows] = positions[:rows] < length
        positions = np.minimum(positions, length - 1)
        tokens = np.zeros((cache.rows, 1), np.int32)
        tokens[:rows, 0] = texts.tokens[np.arange(rows), positions[:rows]]
        capacity = decoder.capacity_for(int(positions.max()) + 1)
        if capacity > cache.capacity:
            cache = decoder.grow(cache, capacity)
        done = [
            completed(config, texts, row, int(positions[row]))
            for row in np.flatnonzero(live)
            if texts.neighbours is not None and (positions[row] + 1) % config.chunk_length == 0
        ]
        logits, cache = decoder.step(cache, tokens, positions, live=live, completed=done)
        for row in np.flatnonzero(live):
            out[row, positions[row]] = np.asarray(logits)[row]
    return out


def window(config: RetroConfig, texts: Texts, row: int, end: int) -> Window:
    """The first `end` tokens of a text."""
    neighbours = texts.neighbours
    complete = end // config.chunk_length
    return Window(
        texts.tokens[row, :end], None if neighbours is None else neighbours[row, :complete]
    )


def completed(config: RetroConfig, texts: Texts, row: int, position: int) -> Completed:
    """The chunk that is complete with a position."""
    assert texts.neighbours is not None
    chunk = position // config.chunk_length
    start = chunk * config.chunk_length
    return Completed(
        row,
        texts.tokens[row, start : start + config.chunk_length],
        texts.neighbours[row, chunk],
    )
