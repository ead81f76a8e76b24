"""Trained runs of a workdir, as evaluation, sampling and the report open them."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from flax import nnx
from jax.sharding import Mesh

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.batches.batches import BatchConfig, check_neighbour_length
from launch.common import configurables
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.sharding import MeshConfig
from retro_jax.storage import files
from retro_jax.train import trained_model
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step
from retro_jax.train.record import CONFIG_FILE, PARENTS_FILE, changed_settings
from retro_jax.train.warm_start import StartConfig


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run and its newest checkpoint.

    Attributes:
      directory: W/retro or W/baseline.
      model, execution, batches, mesh: the run's settings, from its config.gin.
      step: of the newest checkpoint. checkpoint: its identity, a hash.
      averaged: whether the moving average of the parameters is meant.
      base: the existing model whose weights its decoder has, where checkpoints do not; "" for none.
      changed: settings that figures depend on, where bindings gave them another value than the run's.
    """

    directory: pathlib.Path
    model: RetroConfig
    execution: ExecutionConfig
    batches: BatchConfig
    mesh: MeshConfig
    step: int
    checkpoint: str
    averaged: bool = False
    base: str = ""
    changed: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """C, chunks of a training sequence."""
        return self.batches.sequence_length // self.model.chunk_length

    def identity(self) -> dict[str, Any]:
        """The facts that a result records about its run."""
        place = (self.directory, self.step, self.checkpoint)
        return trained_model.identity_of(*place, averaged=self.averaged, changed=self.changed)


def refuse_gin_file() -> None:
    """Refuses flags that a trained run has no use for, rather than ignoring them.

    Raises:
      flags.Error: --gin_file or --print_config was given.
    """
    if configurables.GIN_FILE.value is not None or configurables.PRINT_CONFIG.value:
        raise flags.Error(
            "--gin_file and --print_config are of training: expected none, a trained run's settings "
            f"stand in its {CONFIG_FILE} (--gin_bindings overrides how it is computed)"
        )


def is_trained(directory: pathlib.Path) -> bool:
    """Whether a run has a checkpoint."""
    return latest_step(directory / CHECKPOINTS) is not None


def open_run(
    directory: pathlib.Path, bindings: Sequence[str] = (), *, averaged: bool = False
) -> Run:
    """Reads a run's settings and finds its newest checkpoint; loads no parameters.

    Args:
      directory: of the run.
      bindings: gin bindings that override its config.gin (the computation, not its result).
      averaged: whether the moving average of its parameters is meant.

    Raises:
      UserError: there is no run or no checkpoint, or a setting is bad.
    """
    step = latest_step(directory / CHECKPOINTS)
    if step is None:
        raise UserError(
            f"{directory / CHECKPOINTS} has no checkpoint: expected a trained model (launch.train)"
        )
    configurables.load(str(directory / CONFIG_FILE), bindings)
    model, batches = configurables.make(RetroConfig), configurables.make(BatchConfig)
    if model.has_retrieval:
        check_neighbour_length(batches, model)
    # Figures depend on these too; the batches' other fields are of training, or settings of a result.
    read = ("RetroConfig.", "DecoderForm.", "BatchConfig.neighbour_part")
    return Run(
        directory=directory,
        model=model,
        execution=configurables.make(ExecutionConfig),
        batches=batches,
        mesh=configurables.make(MeshConfig),
        step=step,
        checkpoint=trained_model.checkpoint_digest(directory, step),
        averaged=averaged,
        base=configurables.make(StartConfig).base,
        changed=changed_settings(directory, [model, batches], read) if bindings else {},
    )


def check_data(run: Run, data: pathlib.Path) -> None:
    """Refuses prepared data that a run was not trained on.

    Data with later additions or removals counts as the same: a trained model reads the newest revision
    of its database at once.

    Raises:
      UserError: naming both directories.
    """
    recorded = files.read_json(run.directory / PARENTS_FILE).get("chunks/train", "(none)")
    digest = Manifest.read(data / "chunks" / "train").hash
    if digest != recorded:
        raise UserError(
            f"{run.directory} and {data / 'chunks' / 'train'} do not belong together: "
            f"expected chunks {recorded[:12]}, found {digest[:12]}"
        )


def load_model(run: Run, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """Restores a run's parameters, on a mesh or on the first device.

    Raises:
      UserError: the newest checkpoint is damaged, or belongs to another model.
    """
    step, graphdef, restored = trained_model.load_model(
        run.directory / CHECKPOINTS,
        run.model,
        run.execution,
        mesh=mesh,
        averaged=run.averaged,
        base=run.base,
    )
    if step != run.step:
        raise UserError(
            f"{run.directory / CHECKPOINTS / str(run.step)} is damaged: move it away to use step {step}"
        )
    return graphdef, restored
