"""A run's settings, and its plan: all that can be checked before anything is written or allocated."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.model.attention_kernels import check_attention
from retro_jax.model.copying_init import begin_with_copying
from retro_jax.model.ending_init import begin_with_endings
from retro_jax.retrofit import open_base
from retro_jax.retrofit.adapter import Adapter, open_adapter
from retro_jax.retrofit.decoder import check_decoder
from retro_jax.retrofit.kept_states import check_kept
from retro_jax.sharding import (
    MESH_SHARDINGS,
    MeshConfig,
    abstract_parameters,
    check_mesh,
    make_mesh,
)
from retro_jax.train import step
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.loop import TrainConfig
from retro_jax.train.optimizer import OptimizerConfig, make_optimizer
from retro_jax.train.warm_start import StartConfig, known_from_base, trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Every configuration of a run besides that of its batches."""

    retro: RetroConfig
    training: TrainConfig
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    start: StartConfig = dataclasses.field(default_factory=StartConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that has been checked and not yet begun: nothing is written or allocated.

    Attributes:
      settings: its configurations. shape: of its batches. mesh: of its devices.
      optimizer: of all its steps. graphdef: of its model.
      abstract: its state's shapes and shardings.
      first_state: builds the state before the first step, under jax.jit.
      step: the train step, under jax.jit.
      left_out: arrays of the state that checkpoints need not have, as the base has them; None for none.
    """

    settings: Settings
    shape: BatchShape
    mesh: Mesh
    optimizer: optax.GradientTransformation
    graphdef: nnx.GraphDef
    abstract: step.TrainState
    first_state: Callable[[], step.TrainState]
    step: step.TrainStep
    left_out: Callable[[str], bool] | None = None


def make_plan(
    settings: Settings, shape: BatchShape, devices: list[jax.Device] | None = None
) -> Plan:
    """Everything that can be known, and refused, before anything is written or allocated.

    Args:
      settings: of the run. shape: of its batches.
      devices: of the mesh, present or described by a topology; None for all that are present.

    Raises:
      UserError: the mesh, the model, the batch and the schedule do not fit together.
    """
    mesh, training = make_mesh(settings.mesh, devices), settings.training
    _check_fit(settings, shape, mesh)
    make_model = model_maker(settings)
    trained = trainable(settings.start, abstract_parameters(make_model)[1])
    optimizer = make_optimizer(settings.optimizer, training.steps, trained)
    config = step.StepConfig(
        pad_id=settings.retro.pad_id,
        num_corpora=shape.num_corpora,
        seed=training.seed,
        neighbour_dropout=training.neighbour_dropout,
        noise_target=training.noise_target,
        noise_weight=training.noise_weight,
        noise_unlearning=training.noise_unlearning,
        accumulate=training.accumulate,
        loss_jump=training.loss_jump,
        skip_bad_batches=training.skip_bad_batches,
        average_decay=training.average_decay,
        layer_norms=training.layer_norms,
    )
    graphdef, abstract = step.abstract_state(make_model, optimizer, mesh, config)
    return Plan(
        settings=settings,
        shape=shape,
        mesh=mesh,
        optimizer=optimizer,
        graphdef=graphdef,
        abstract=abstract,
        first_state=step.compile_first_state(make_model, optimizer, abstract),
        step=step.compile_train_step(
            graphdef=graphdef,
            optimizer=optimizer,
            config=config,
            trainable=trained,
            platform=mesh.devices.flat[0].platform,
        ),
        left_out=known_from_base(settings.start, settings.retro, trained),
    )


def _check_fit(settings: Settings, shape: BatchShape, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch, a mesh or a base that the model cannot take.

    Raises:
      UserError: as make_plan.
    """
    training = settings.training
    if shape.sequence_length % settings.retro.chunk_length:
        raise UserError(
            f"sequence_length {shape.sequence_length}: expected a multiple of chunk_length "
            f"{settings.retro.chunk_length}"
        )
    if shape.batch_size % training.accumulate:
        raise UserError(
            f"TrainConfig.accumulate is {training.accumulate}: expected a divisor of the batch size "
            f"{shape.batch_size}"
        )
    if training.noise_target == "off" and not (shape.noise and settings.retro.has_retrieval):
        raise UserError(
            "TrainConfig.noise_target is 'off': expected 'text', or a model with cca_layers and"
            " BatchConfig.neighbour_noise above 0 with neighbours of a chunk database (not of questions or"
            " written batches)"
        )
    check_mesh(settings.retro, mesh, shape.batch_size // training.accumulate)
    check_attention(
        settings.retro,
        settings.execution,
        platform=mesh.devices.flat[0].platform,
        length=shape.sequence_length,
    )
    if settings.start.base:
        check_decoder(settings.retro, open_base(settings.start.base))
    if settings.start.base and settings.start.adapter:
        open_adapter_of(settings).check_config(settings.retro)
    if settings.execution.kept_states:
        _check_kept(settings)


def _check_kept(settings: Settings) -> None:
    """Refuses kept states where a step could change what they are computed from.

    Raises:
      UserError: names the setting.
    """
    form, start = settings.execution.kept_states, settings.start
    check_kept(settings.retro, form)
    changed = (*start.trained, *start.fresh)
    if not start.base or not all(pattern.startswith("cca.") for pattern in changed):
        raise UserError(
            f"ExecutionConfig.kept_states is {form!r}: expected '', or a StartConfig.base of which"
            " StartConfig.trained and StartConfig.fresh leave all but cca.* as it is"
        )


def model_maker(settings: Settings) -> Callable[[], Retro]:
    """A function that builds the run's module with its first parameters, on a mesh; it reads all neighbours."""
    retro = dataclasses.replace(settings.retro, min_shared_tokens=0.0)

    def make() -> Retro:
        rngs = nnx.Rngs(settings.training.seed)
        model = Retro(retro, settings.execution, shardings=MESH_SHARDINGS, rngs=rngs)
        training = settings.training
        if training.initial_retrieval == "copying":
            begin_with_copying(model)
        begin_with_endings(
            model,
            neighbours=training.initial_retrieval == "endings",
            text=training.initial_attention == "endings",
        )
        return model

    return make


def run_parents(settings: Settings, data: Mapping[str, str]) -> dict[str, str]:
    """Hashes of all that a run depends on: of its data, and as "base" and "adapter" of what it begins with."""
    parents, base = dict(data), settings.start.base
    if base:
        parents["base"] = open_base(base).fingerprint()
    if base and settings.start.adapter:
        parents["adapter"] = open_adapter_of(settings).digest
    return parents


def open_adapter_of(settings: Settings) -> Adapter:
    """The adapter that a run begins with; a run that goes on needs it too, as it needs its base."""
    if not pathlib.Path(settings.start.adapter).is_dir():
        raise UserError(
            f"StartConfig.adapter is {settings.start.adapter!r}: expected the directory of an adapter"
        )
    return open_adapter(settings.start.adapter, open_base(settings.start.base))
