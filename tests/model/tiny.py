"""Small models and batches for the model's tests: every width differs from every other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.batch import RetroBatch
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.model import Retro

TINY = RetroConfig(
    vocab_size=30,
    d_model=12,
    num_layers=3,
    num_heads=2,
    head_dim=8,
    d_ff=20,
    cca_layers=(2, 3),
    chunk_length=4,
    neighbour_length=8,
    encoder_d_model=10,
    encoder_num_layers=2,
    encoder_num_heads=3,
    encoder_head_dim=4,
    encoder_d_ff=14,
    encoder_cca_layers=(1,),
)


def make_model(
    config: RetroConfig, execution: ExecutionConfig = ExecutionConfig(), seed: int = 0
) -> Retro:
    """A model none of whose parameters is zero or small: biases and scales are tested too.

    Drawn by NumPy: compiling JAX's generator for every shape takes longer than all of a test.
    """
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Retro(config, execution, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(mean + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, shapes))


def make_batch(
    config: RetroConfig,
    *,
    rows: int = 2,
    chunks: int = 4,
    k: int = 2,
    documents: bool = False,
    padding: bool = False,
    seed: int = 0,
) -> RetroBatch:
    """Random tokens and neighbours; optionally document boundaries inside and partial padding."""
    rng = np.random.default_rng(seed)
    m, r = config.chunk_length, config.neighbour_length
    ids = np.array([i for i in range(config.vocab_size) if i != config.pad_id])
    tokens = rng.choice(ids, size=(rows, chunks * m)).astype(np.int32)
    targets = rng.choice(ids, size=(rows, chunks * m)).astype(np.int32)
    neighbours = rng.choice(ids, size=(rows, chunks, k, r)).astype(np.int32)
    owners = np.zeros((rows, chunks), np.int32)
    if documents:
        owners = (np.arange(chunks) >= 1 + np.arange(rows)[:, None] % (chunks - 1)).astype(np.int32)
    if padding:
        tokens[0, m - 1] = tokens[-1, 2 * m - 2 : 2 * m] = config.pad_id  # ends of chunks
        targets[0, m - 2 : m] = targets[-1, 2 * m - 3 : 2 * m] = config.pad_id
        neighbours[0, 0, -1] = config.pad_id  # an empty slot
        neighbours[0, 1, 0, r // 2 :] = config.pad_id  # no continuation
        neighbours[-1, 1] = config.pad_id  # no neighbour at all
        neighbours[-1, 2, 0, 3:] = config.pad_id
    arrays: dict[str, Any] = {"tokens": tokens, "targets": targets, "neighbours": neighbours}
    arrays |= {"documents": owners, "corpus": np.zeros(rows, np.int32)}
    return RetroBatch(**arrays)


def logits(model: Retro, batch: RetroBatch) -> np.ndarray:
    """[B, N, V] of the compiled model."""
    graph, params = nnx.split(model)

    @jax.jit
    def apply(params: nnx.State, batch: Any) -> jax.Array:
        return nnx.merge(graph, params)(batch.tokens, batch.neighbours, batch.documents)

    return np.asarray(apply(params, batch))


def token_losses(
    model: Retro, batch: RetroBatch, dropout_key: jax.Array | None = None
) -> np.ndarray:
    """[B, N] of the compiled model."""
    graph, params = nnx.split(model)

    @jax.jit
    def apply(params: nnx.State, batch: RetroBatch, key: jax.Array | None) -> jax.Array:
        return nnx.merge(graph, params).token_losses(batch, key)

    return np.asarray(apply(params, batch, dropout_key))


def with_neighbours(batch: RetroBatch, neighbours: Any) -> RetroBatch:
    """The same sequences with other neighbours."""
    return dataclasses.replace(batch, neighbours=neighbours)


def without_documents(batch: RetroBatch) -> Any:
    """The same sequences, told nothing of documents."""
    return dataclasses.replace(batch, documents=None)


def assert_close(actual: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest wanted absolute value."""
    assert actual.shape == wanted.shape
    largest = np.abs(wanted).max()
    assert largest > 0
    difference = np.abs(actual - wanted).max()
    assert difference <= tolerance * largest, f"{difference / largest:.2e} of the largest value"
