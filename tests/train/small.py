"""A stand-in for the model, small enough to train in milliseconds, and batches for it."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from retro_jax.batch import RetroBatch
from retro_jax.parameters import parameter
from retro_jax.sharding import FSDP, TENSOR, MeshConfig, batch_sharding, make_mesh
from retro_jax.train.checkpoint import Checkpoints
from retro_jax.train.optimizer import OptimizerConfig, Trainable, make_optimizer
from retro_jax.train.step import (
    StepConfig,
    TrainState,
    abstract_state,
    compile_first_state,
    compile_train_step,
)

ROWS = 8
VOCABULARY, WIDTH, CHUNKS, CHUNK, SLOTS, NEIGHBOUR = 24, 8, 2, 4, 2, 8
PAD = 0
_OPTIMIZER = OptimizerConfig(max_learning_rate=0.01, warmup_steps=2)


class Bigram(nnx.Module):
    """Predicts the next token from this one and the mean of the chunk's neighbours.

    Its parameters are split and decay as the model's: a table, a stack of matrices, a stacked scale
    and a stacked bias.
    """

    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.0):
        normal = functools.partial(jax.random.normal, dtype=jnp.float32)
        self.table = parameter(normal(rngs.params(), (VOCABULARY, WIDTH)), P(TENSOR, FSDP))
        self.widen = parameter(0.3 * normal(rngs.params(), (2, WIDTH, WIDTH)), P(FSDP, TENSOR))
        self.scale = parameter(jnp.ones((2, WIDTH)), P(None), decays=False)
        self.content_bias = parameter(jnp.zeros((2, 2, WIDTH // 2)), P(TENSOR, None), decays=False)
        self.dropout = dropout

    def token_losses(self, batch: RetroBatch, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, N] float32 nats."""
        table, widen, scale, bias = map(
            _gather, (self.table, self.widen, self.scale, self.content_bias)
        )
        h = _embed(batch.tokens, table)
        if batch.neighbours is not None:
            present = (batch.neighbours != PAD)[..., None]
            near = jnp.where(present, _embed(batch.neighbours, table), 0.0).mean((2, 3))
            h = h + jnp.repeat(near, CHUNK, axis=1)
        for i in range(2):
            h = jnp.tanh(jnp.einsum("bnd,de->bne", h * scale[i], widen[i]))
            h = h + bias[i].reshape(WIDTH)
        if self.dropout and dropout_key is not None:
            kept = jax.random.bernoulli(dropout_key, 1 - self.dropout, h.shape[1:])
            h = jnp.where(kept, h, 0.0)
        logits = jnp.einsum("bnd,vd->bnv", h, table)
        hit = jnp.arange(VOCABULARY) == batch.targets[..., None]
        return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def _gather(parameter: nnx.Param) -> jax.Array:
    """The whole parameter on every device; nothing to do where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return parameter[...]
    return jax.sharding.reshard(parameter[...], P())


def _embed(tokens: jax.Array, table: jax.Array) -> jax.Array:
    """Rows of the table."""
    return jnp.einsum("...v,vd->...d", jax.nn.one_hot(tokens, VOCABULARY), table)


def host_batch(step: int, rows: int = ROWS, neighbours: bool = True) -> RetroBatch:
    """A batch of NumPy arrays, a function of the step, with padding in every part."""
    random = np.random.default_rng(step)
    shape = (rows, CHUNKS * CHUNK)
    tokens = random.integers(1, VOCABULARY, shape).astype(np.int32)
    targets = ((tokens * 7 + 3) % (VOCABULARY - 1) + 1).astype(np.int32)
    targets[random.random(shape) < 0.2] = PAD
    near = random.integers(0, VOCABULARY, (rows, CHUNKS, SLOTS, NEIGHBOUR)).astype(np.int32)
    return RetroBatch(
        tokens=tokens,
        targets=targets,
        documents=np.zeros((rows, CHUNKS), np.int32),
        corpus=random.integers(0, 2, rows).astype(np.int32),
        neighbours=near if neighbours else None,
    )


def host_rows(step: int, rows: list[int]) -> RetroBatch:
    """Some rows of host_batch(step)."""
    return jax.tree.map(lambda array: array[rows], host_batch(step))


class Trainer:
    """Model, optimiser and compiled step on a mesh."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        dropout: float = 0.0,
        neighbour_dropout: float = 0.0,
        seed: int = 0,
        trainable: Trainable | None = None,
        optimizer: OptimizerConfig = _OPTIMIZER,
        **options: Any,
    ):
        self.mesh = mesh
        self.optimizer = make_optimizer(optimizer, 50, trainable)

        def make() -> Bigram:
            return Bigram(nnx.Rngs(seed), dropout)

        config = StepConfig(PAD, 2, seed=seed, neighbour_dropout=neighbour_dropout, **options)
        self.graphdef, self.abstract = abstract_state(make, self.optimizer, mesh, config)
        with jax.set_mesh(mesh):
            self.state = compile_first_state(make, self.optimizer, self.abstract)()
        self.step = compile_train_step(
            graphdef=self.graphdef, optimizer=self.optimizer, config=config, trainable=trainable
        )

    def run(self, steps: range, **batch_options):
        """Makes steps; returns their metrics."""
        metrics = []
        for step in steps:
            batch = jax.device_put(host_batch(step, **batch_options), batch_sharding(self.mesh))
            with jax.set_mesh(self.mesh):
                self.state, measured = self.step(self.state, batch)
            metrics.append(jax.device_get(measured))
        return metrics


def one_device_state(checkpoints: str | os.PathLike) -> TrainState:
    """The state that a run of Bigrams ended with, on one device."""
    trainer = Trainer(make_mesh(MeshConfig(), jax.devices()[:1]))
    state = Checkpoints(checkpoints).restore(trainer.abstract)
    assert state is not None
    return state
