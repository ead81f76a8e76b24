"""One update of the parameters: pure, and a function of the state, the batch and the seed alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retro_jax.batch import RetroBatch
from retro_jax.config import require
from retro_jax.sharding import parameter_shardings
from retro_jax.train.optimizer import Trainable
from retro_jax.train.trees import map_named


class Model(Protocol):
    """What training needs of a model."""

    def token_losses(self, batch: RetroBatch, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, N] float32 nats, 0 where the target is padding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, updates made so far; step t makes update number t, from 0.
      params: the model's parameters, an nnx.State. opt_state: the optimiser's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one step measured, before its update; scalars float32 unless stated.

    Attributes:
      loss: mean nats a token over the targets of the whole batch that are not padding.
      tokens: int32, how many those are. grad_norm: before clipping. param_norm: global norms.
      corpus_losses: [G] summed nats of each corpus. corpus_tokens: [G] int32.
    """

    loss: jax.Array
    tokens: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array
    corpus_losses: jax.Array
    corpus_tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step needs to know besides model and optimiser.

    Attributes:
      pad_id: RetroConfig.pad_id. num_corpora: G, corpora in the mixture.
      seed: of dropout. neighbour_dropout: part of the sequences trained without neighbours.
    """

    pad_id: int
    num_corpora: int
    seed: int = 0
    neighbour_dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.num_corpora > 0, self, "num_corpora", "a positive number")
        valid = 0 <= self.neighbour_dropout <= 1
        require(valid, self, "neighbour_dropout", "a number from 0 to 1")


TrainStep = Callable[[TrainState, RetroBatch], tuple[TrainState, StepMetrics]]


def train_step(
    state: TrainState,
    batch: RetroBatch,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    trainable: Trainable | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Makes one update.

    Args:
      state: before the update. batch: the global batch.
      graphdef: of a module with `token_losses`, as nnx.split gives it.
      optimizer: made with the same `trainable`.
      config: padding, corpora, seed.
      trainable: which parameters have gradients; None for all.

    Returns:
      The state after the update, and what was measured before it.
    """
    step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    dropout_key, neighbour_key = (jax.random.fold_in(step_key, i) for i in range(2))
    if config.neighbour_dropout:
        batch = drop_neighbours(
            batch, neighbour_key, rate=config.neighbour_dropout, pad_id=config.pad_id
        )
    present_BxN = batch.targets != config.pad_id
    tokens = jnp.sum(present_BxN, dtype=jnp.int32)

    def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        if trainable is not None:  # frozen parameters' gradients are never computed
            params = map_named(
                lambda name, leaf: leaf if trainable(name) else jax.lax.stop_gradient(leaf), params
            )
        model: Model = nnx.merge(graphdef, params)
        losses_BxN = model.token_losses(batch, dropout_key=dropout_key)
        losses_BxN = jnp.where(present_BxN, losses_BxN.astype(jnp.float32), 0.0)
        return jnp.sum(losses_BxN) / jnp.maximum(tokens, 1), losses_BxN

    (loss, losses_BxN), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    of_corpus_BxG = batch.corpus[:, None] == jnp.arange(config.num_corpora)
    metrics = StepMetrics(
        loss=loss,
        tokens=tokens,
        grad_norm=optax.tree.norm(grads),
        param_norm=optax.tree.norm(state.params),
        corpus_losses=_sum_by_corpus(jnp.sum(losses_BxN, axis=1), of_corpus_BxG),
        corpus_tokens=_sum_by_corpus(jnp.sum(present_BxN, axis=1, dtype=jnp.int32), of_corpus_BxG),
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics


def compile_train_step(
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    trainable: Trainable | None = None,
) -> TrainStep:
    """`train_step` under jax.jit; the state that is passed in is donated."""
    step = functools.partial(
        train_step, graphdef=graphdef, optimizer=optimizer, config=config, trainable=trainable
    )
    return jax.jit(step, donate_argnums=0)


def drop_neighbours(batch: RetroBatch, key: jax.Array, *, rate: float, pad_id: int) -> RetroBatch:
    """Takes all neighbours from a part of the sequences, chosen by (key, row).

    Args:
      batch: with or without neighbours. key: of this step.
      rate: the part. pad_id: what an empty slot holds.
    """
    if batch.neighbours is None:
        return batch

    def chosen(row: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, row), rate)

    drop_B = jax.vmap(chosen)(jnp.arange(len(batch.tokens)))
    # Joining with the sharded rows makes the mask sharded as they are.
    drop_B = drop_B | (batch.corpus < 0)
    kept = jnp.where(drop_B[:, None, None, None], pad_id, batch.neighbours)
    return dataclasses.replace(batch, neighbours=kept)


def abstract_state(
    make_model: Callable[[], Any], optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """The shapes, dtypes and shardings of a run's state; nothing is allocated.

    Args:
      make_model: builds the module. optimizer: of the run. mesh: where the state will lie.

    Returns:
      The module's graph definition and a TrainState of jax.ShapeDtypeStruct.
    """
    graphdef, params = nnx.split(nnx.eval_shape(make_model))

    def struct(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(struct, params, parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda p: _first_state(p, optimizer), params)

    def on_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
        # eval_shape's shardings are on an abstract mesh, which Orbax cannot restore to.
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return struct(leaf, NamedSharding(mesh, spec))

    return graphdef, jax.tree.map(on_mesh, state)


def initial_state(
    make_model: Callable[[], Any], optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The state before the first step, made in place on the devices where it will lie."""

    def make() -> TrainState:
        return _first_state(nnx.split(make_model())[1], optimizer)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    mesh = shardings.step.mesh
    # Random draws run once and give the same bits, but LLVM's last level compiles them 3.4 times
    # longer (18 s for a small RETRO).
    quick = (
        {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None
    )
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings, compiler_options=quick)()


def _first_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 of given parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _sum_by_corpus(values_B: jax.Array, of_corpus_BxG: jax.Array) -> jax.Array:
    """[G] sums of the rows of each corpus."""
    return jnp.sum(jnp.where(of_corpus_BxG, values_B[:, None], 0), axis=0)
