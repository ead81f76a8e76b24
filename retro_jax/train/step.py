"""One update of the parameters: pure, and a function of the state, the batch and the seed alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retro_jax.batch import RetroBatch
from retro_jax.config import require
from retro_jax.model import Retro
from retro_jax.model.backend import options_for_one_use, options_for_overlap
from retro_jax.model.noise_target import NOISE_TARGETS, losses_toward_off
from retro_jax.sharding import parameter_shardings
from retro_jax.train.layer_norms import layer_norms
from retro_jax.train.optimizer import Trainable
from retro_jax.train.parameter_names import map_named, named_leaves

_RECENT = 0.99  # decay of the mean that a loss is compared with
_WEIGHT_TO_JUDGE = 1 - _RECENT**20  # none is compared before 20 good ones


class Model(Protocol):
    """The methods that training needs of a model; of a Retro losses_toward_off needs more."""

    def token_losses(self, batch: RetroBatch, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, N] float32 nats, 0 where the target is padding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, updates made so far; step t makes update number t, from 0.
      params: the model's parameters, an nnx.State. opt_state: the optimiser's state.
      recent_loss: [2] float32, from which `recent_mean` computes the mean of the last good
        losses; None unless StepConfig.loss_jump asks for it.
      average: the moving average of the parameters; None unless StepConfig.average_decay asks for it.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    recent_loss: Any = None
    average: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """The measurements of one step, before its update; scalars float32 unless stated.

    Attributes:
      loss: mean nats per token over the targets of the whole batch that are not padding.
      tokens: int32, how many those are. grad_norm: before clipping. param_norm: global norms.
      corpus_losses: [G] summed nats of each corpus. corpus_tokens: [G] int32.
      bad: bool, whether loss or gradient is not finite, or the loss jumps by more than
        StepConfig.loss_jump. recent_loss: mean of the losses before it; 0 where none is kept.
      grad_norms, param_norms: by layer, as layer_norms gives them; None without
        StepConfig.layer_norms.
    """

    loss: jax.Array
    tokens: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array
    corpus_losses: jax.Array
    corpus_tokens: jax.Array
    bad: jax.Array
    recent_loss: jax.Array
    grad_norms: Any = None
    param_norms: Any = None


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The settings of a step besides model and optimiser.

    Attributes:
      pad_id: RetroConfig.pad_id. num_corpora: G, corpora in the mixture.
      seed: of dropout. neighbour_dropout: part of the sequences trained without neighbours.
      noise_target: of model/noise_target.py's NOISE_TARGETS; "off" needs a Retro, and batches with noise.
      noise_weight, noise_unlearning: of the gradients there, with "off".
      accumulate: parts that a batch is computed in, one after the other; B is a multiple of it.
      loss_jump: nats by which a loss may exceed the mean of the last 100 or so; 0 for any.
      skip_bad_batches: whether a bad batch (StepMetrics.bad) leaves parameters and moments as they
        are; it counts as a step, in the schedule too.
      average_decay: of the moving average of the parameters, below 1; 0 keeps none.
      layer_norms: whether the metrics have norms by layer.
    """

    pad_id: int
    num_corpora: int
    seed: int = 0
    neighbour_dropout: float = 0.0
    noise_target: str = "text"
    noise_weight: float = 1.0
    noise_unlearning: float = 0.0
    accumulate: int = 1
    loss_jump: float = 0.0
    skip_bad_batches: bool = False
    average_decay: float = 0.0
    layer_norms: bool = False

    def __post_init__(self) -> None:
        require(self.num_corpora > 0, self, "num_corpora", "a positive number")
        valid = 0 <= self.neighbour_dropout <= 1
        require(valid, self, "neighbour_dropout", "a number from 0 to 1")
        known = self.noise_target in NOISE_TARGETS
        require(known, self, "noise_target", f"one of {NOISE_TARGETS}")
        require(self.accumulate > 0, self, "accumulate", "a positive number of parts")
        require(self.loss_jump >= 0, self, "loss_jump", "a number of nats, or 0 for any")
        valid = 0 <= self.average_decay < 1
        require(valid, self, "average_decay", "a number from 0 to below 1")


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
      optimizer: built with the same `trainable`.
      config: padding, corpora, seed.
      trainable: which parameters have gradients; None for all.

    Returns:
      The state after the update, and the metrics before it.
    """
    step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    dropout_key, neighbour_key = (jax.random.fold_in(step_key, i) for i in range(2))
    if config.neighbour_dropout:
        batch = drop_neighbours(
            batch, neighbour_key, rate=config.neighbour_dropout, pad_id=config.pad_id
        )
    trained = _trained(state.params, trainable)

    def model(parameters: Mapping[str, jax.Array]) -> Model:
        return nnx.merge(graphdef, _with(state.params, parameters))

    sums, grads = _gradients(trained, batch, dropout_key, model=model, config=config)
    # The optimiser's zeros for the rest are never allocated: it does not read them.
    every = map_named(
        lambda name, leaf: grads[name] if name in grads else jnp.zeros_like(leaf), state.params
    )
    updates, opt_state = optimizer.update(every, state.opt_state, state.params)
    # Adding 0 to the rest would change the bits of -0.
    updated = optax.apply_updates(trained, _trained(updates, trainable))
    params = _with(state.params, updated)
    tokens = _count(batch, config)
    grad_norm = optax.tree.norm(every if trainable is None else grads)
    loss = sums.loss / jnp.maximum(tokens, 1)
    bad, recent, recent_loss = _judge(loss, grad_norm, state.recent_loss, config)
    metrics = StepMetrics(
        loss=loss,
        tokens=tokens,
        grad_norm=grad_norm,
        param_norm=optax.tree.norm(state.params),
        corpus_losses=sums.corpus_losses,
        corpus_tokens=sums.corpus_tokens,
        bad=bad,
        recent_loss=recent,
        grad_norms=layer_norms(grads) if config.layer_norms else None,
        param_norms=layer_norms(state.params) if config.layer_norms else None,
    )
    after = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        recent_loss=recent_loss,
        average=_averaged(state, params, config.average_decay),
    )
    return (_unless(bad, after, state) if config.skip_bad_batches else after), metrics


def _trained(tree: Any, trainable: Trainable | None) -> dict[str, jax.Array]:
    """The leaves of trained parameters by name: gradients of others are neither computed nor allocated."""
    leaves = named_leaves(tree)
    return {n: leaf for n, leaf in leaves.items() if trainable is None or trainable(n)}


def _with(params: Any, parameters: Mapping[str, jax.Array]) -> Any:
    """A tree of parameters with some of them replaced by name."""
    return map_named(lambda name, leaf: parameters.get(name, leaf), params)


def _gradients(
    params: Mapping[str, jax.Array],
    batch: RetroBatch,
    key: jax.Array,
    *,
    model: Callable[[Mapping[str, jax.Array]], Model],
    config: StepConfig,
) -> tuple["_Sums", dict[str, jax.Array]]:
    """The sums of a batch, and the gradients of its mean loss by some parameters.

    Both are computed in config.accumulate parts.
    """
    tokens = _count(batch, config)

    def part(batch: RetroBatch, key: jax.Array) -> tuple[_Sums, Any]:
        def objective(params: Any) -> tuple[jax.Array, _Sums]:
            sums = _sums(model(params), batch, key, config)
            return sums.loss / jnp.maximum(tokens, 1), sums

        return jax.grad(objective, has_aux=True)(params)[::-1]

    zero_G = jnp.zeros(config.num_corpora)
    zero = _Sums(jnp.zeros(()), zero_G, zero_G.astype(jnp.int32))
    no_grads = jax.tree.map(jnp.zeros_like, params)
    return _accumulated(part, batch, key, parts=config.accumulate, zero=(zero, no_grads))


def _count(batch: RetroBatch, config: StepConfig) -> jax.Array:
    """int32: the targets of a batch that are not padding."""
    return jnp.sum(batch.targets != config.pad_id, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
    """Summed nats of a batch, [] and by corpus [G], and the tokens of each corpus [G] int32."""

    loss: jax.Array
    corpus_losses: jax.Array
    corpus_tokens: jax.Array


def _sums(model: Model, batch: RetroBatch, key: jax.Array, config: StepConfig) -> _Sums:
    """Runs the model on a batch, or on a part of one."""
    present_BxN = batch.targets != config.pad_id
    if config.noise_target == "off":
        losses_BxN = losses_toward_off(
            cast(Retro, model),
            batch,
            key,
            weight=config.noise_weight,
            unlearning=config.noise_unlearning,
        )
    else:
        losses_BxN = model.token_losses(batch, dropout_key=key)
    losses_BxN = jnp.where(present_BxN, losses_BxN.astype(jnp.float32), 0.0)
    of_corpus_BxG = batch.corpus[:, None] == jnp.arange(config.num_corpora)
    count_B = jnp.sum(present_BxN, axis=1, dtype=jnp.int32)
    return _Sums(
        loss=jnp.sum(losses_BxN),
        corpus_losses=_sum_by_corpus(jnp.sum(losses_BxN, axis=1), of_corpus_BxG),
        corpus_tokens=_sum_by_corpus(count_B, of_corpus_BxG),
    )


def _accumulated(
    part: Callable[[RetroBatch, jax.Array], tuple[_Sums, Any]],
    batch: RetroBatch,
    key: jax.Array,
    *,
    parts: int,
    zero: tuple[_Sums, Any],
) -> tuple[_Sums, Any]:
    """Sums and gradients of a batch, in one go or in parts one after the other.

    Part a has the rows r with r % parts == a, so that each device keeps its own rows.
    """
    if parts == 1:
        return part(batch, key)

    def split(x: jax.Array) -> jax.Array:
        rows, *inner = jax.typeof(x).sharding.spec
        laid_out = PartitionSpec(rows, None, *inner)
        spec = None if jax.sharding.get_abstract_mesh().empty else laid_out
        shape = (len(x) // parts, parts, *x.shape[1:])
        return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=spec), 1, 0)

    def add(total: Any, item: tuple[jax.Array, RetroBatch]) -> tuple[Any, None]:
        number, rows = item
        return jax.tree.map(jnp.add, total, part(rows, jax.random.fold_in(key, number))), None

    return jax.lax.scan(add, zero, (jnp.arange(parts), jax.tree.map(split, batch)))[0]


def _judge(
    loss: jax.Array, grad_norm: jax.Array, recent_loss: Any, config: StepConfig
) -> tuple[jax.Array, jax.Array, Any]:
    """Whether a step is bad, the mean of the good losses before it, and the recent losses after it."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    if recent_loss is None:
        return bad, jnp.zeros(()), None
    mean = recent_loss[0] / jnp.maximum(recent_loss[1], 1e-9)
    bad = bad | ((recent_loss[1] > _WEIGHT_TO_JUDGE) & (loss > mean + config.loss_jump))
    new_loss = recent_loss + (1 - _RECENT) * (jnp.stack([loss, jnp.ones(())]) - recent_loss)
    return bad, mean, jnp.where(bad, recent_loss, new_loss)


def _averaged(state: TrainState, params: Any, decay: float) -> Any:
    """The moving average with the new parameters; it follows them faster in the first steps."""
    if state.average is None:
        return None
    step = state.step.astype(jnp.float32)
    weight = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda mean, new: mean + weight * (new - mean), state.average, params)


def _unless(bad: jax.Array, after: TrainState, before: TrainState) -> TrainState:
    """The state before a bad batch, with its counts moved on."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(bad, old, new)

    return jax.tree.map(choose, after, before)


def compile_train_step(
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    trainable: Trainable | None = None,
    platform: str = "",
) -> TrainStep:
    """`train_step` under jax.jit for a platform; the state that is passed in is donated."""
    step = functools.partial(
        train_step, graphdef=graphdef, optimizer=optimizer, config=config, trainable=trainable
    )
    return jax.jit(step, donate_argnums=0, compiler_options=options_for_overlap(platform))


def drop_neighbours(batch: RetroBatch, key: jax.Array, *, rate: float, pad_id: int) -> RetroBatch:
    """Takes all neighbours from a part of the sequences, chosen by (key, row).

    Args:
      batch: with or without neighbours. key: of this step.
      rate: the part. pad_id: the content of an empty slot.
    """
    if batch.neighbours is None:
        return batch

    def drops(row: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, row), rate)

    drop_B = jax.vmap(drops)(jnp.arange(len(batch.tokens)))
    # Joining with the sharded rows makes the mask sharded as they are.
    drop_B = drop_B | (batch.corpus < 0)
    neighbours_BxCxKxR = jnp.where(drop_B[:, None, None, None], pad_id, batch.neighbours)
    return dataclasses.replace(batch, neighbours=neighbours_BxCxKxR)


def abstract_state(
    make_model: Callable[[], Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: StepConfig | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """The shapes, dtypes and shardings of a run's state; nothing is allocated.

    Args:
      make_model: builds the module. optimizer: of the run. mesh: for the state.
      config: of the step: whether the state has recent losses and averaged parameters.

    Returns:
      The module's graph definition and a TrainState of jax.ShapeDtypeStruct.
    """
    graphdef, params = nnx.split(nnx.eval_shape(make_model))

    def struct(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(struct, params, parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        judged = config is not None and config.loss_jump > 0
        averaged = config is not None and config.average_decay > 0
        state = jax.eval_shape(lambda p: _first_state(p, optimizer, judged, averaged), params)

    def on_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
        # eval_shape's shardings are on an abstract mesh, which Orbax cannot restore to.
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return struct(leaf, NamedSharding(mesh, spec))

    return graphdef, jax.tree.map(on_mesh, state)


def compile_first_state(
    make_model: Callable[[], Any], optimizer: optax.GradientTransformation, abstract: TrainState
) -> Callable[[], TrainState]:
    """A function under jax.jit that builds the state before the first step, each array in its place.

    Args:
      make_model: builds the module. optimizer: of the run.
      abstract: its shapes and shardings, as `abstract_state` gives them.

    Returns:
      A function without arguments, to be called (or lowered) under `jax.set_mesh`.
    """

    def make() -> TrainState:
        judged, averaged = abstract.recent_loss is not None, abstract.average is not None
        return _first_state(nnx.split(make_model())[1], optimizer, judged, averaged)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    options = options_for_one_use(shardings.step.mesh.devices.flat[0].platform)
    return jax.jit(make, out_shardings=shardings, compiler_options=options)


def _first_state(
    params: Any, optimizer: optax.GradientTransformation, judged: bool, averaged: bool
) -> TrainState:
    """Step 0 of given parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        recent_loss=jnp.zeros(2) if judged else None,
        average=jax.tree.map(jnp.copy, params) if averaged else None,
    )


def _sum_by_corpus(values_B: jax.Array, of_corpus_BxG: jax.Array) -> jax.Array:
    """[G] sums of the rows of each corpus."""
    return jnp.sum(jnp.where(of_corpus_BxG, values_B[:, None], 0), axis=0)
