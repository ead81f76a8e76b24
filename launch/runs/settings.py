"""The settings of a run as gin has them."""

from collections.abc import Mapping
from typing import Any

from launch.common import configurables
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.sharding import MeshConfig
from retro_jax.train.loop import TrainConfig
from retro_jax.train.optimizer import OptimizerConfig
from retro_jax.train.plan import Settings
from retro_jax.train.warm_start import StartConfig


def make_settings(start: Mapping[str, Any] | None = None, **retro: Any) -> Settings:
    """Builds the configurations of a run.

    Args:
      start: values of StartConfig's fields that gin leaves open.
      **retro: values of RetroConfig's.

    Raises:
      UserError: a setting is wrong.
    """
    # Imported here: it brings the data pipelines' libraries along.
    from data_pipelines.batches.batches import (
        BatchConfig,
        check_neighbour_length,
        neighbour_length,
    )

    batches = configurables.make(BatchConfig)
    config = configurables.make(
        RetroConfig, **{"neighbour_length": neighbour_length(batches.neighbour_part), **retro}
    )
    if config.has_retrieval:
        check_neighbour_length(batches, config)
    return Settings(
        retro=config,
        execution=configurables.make(ExecutionConfig),
        optimizer=configurables.make(OptimizerConfig),
        training=configurables.make(TrainConfig),
        start=configurables.make(StartConfig, **(start or {})),
        mesh=configurables.make(MeshConfig),
    )
