"""The settings of a run as gin has them."""

from typing import Any

from launch.common import configurables
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.sharding import MeshConfig
from retro_jax.train.loop import TrainConfig
from retro_jax.train.optimizer import OptimizerConfig
from retro_jax.train.run import Settings
from retro_jax.train.warm_start import StartConfig


def make_settings(**retro: Any) -> Settings:
    """Builds the configurations of a run.

    Args:
      **retro: values of RetroConfig's fields that gin leaves open.

    Raises:
      UserError: a setting is wrong.
    """
    return Settings(
        retro=configurables.make(RetroConfig, **retro),
        execution=configurables.make(ExecutionConfig),
        optimizer=configurables.make(OptimizerConfig),
        training=configurables.make(TrainConfig),
        start=configurables.make(StartConfig),
        mesh=configurables.make(MeshConfig),
    )
