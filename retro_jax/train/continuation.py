"""Whether a run that is asked for more steps can go on from where it ended."""

import ast
import dataclasses
import os
import pathlib

import jax.numpy as jnp
import numpy as np

from retro_jax.errors import UserError
from retro_jax.train import record
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step
from retro_jax.train.optimizer import OptimizerConfig, learning_rate

_STEPS, _RESTARTS = "TrainConfig.steps", "OptimizerConfig.restarts"


def longer(directory: str | os.PathLike, settings: OptimizerConfig, steps: int) -> tuple[str, ...]:
    """Settings that may differ from those recorded, because the run only becomes longer.

    The updates made so far have to be those that the longer run would have made: its learning rates
    up to there must be the same. A constant schedule has them. A cosine has them with a restart.

    Args:
      directory: the run's. settings, steps: those that it is asked for now.

    Returns:
      Names of settings, as `record.claim` has them free; none where the run is new or no longer.

    Raises:
      UserError: the learning rates so far would differ.
    """
    directory = pathlib.Path(directory)
    path, reached = directory / record.CONFIG_FILE, latest_step(directory / CHECKPOINTS)
    if reached is None or not path.is_file():
        return ()
    old = record.parse_settings(path.read_text(encoding="utf-8"))
    before = ast.literal_eval(old.get(_STEPS, "0"))
    if not 0 < before < steps:
        return ()
    restarts = ast.literal_eval(old.get(_RESTARTS, "()"))
    made = jnp.arange(reached)
    rates = [
        np.asarray(learning_rate(config, length)(made))
        for config, length in (
            (dataclasses.replace(settings, restarts=restarts), before),
            (settings, steps),
        )
    ]
    if (rates[0] != rates[1]).any():
        raise UserError(
            f"{_STEPS} is {steps}, and {directory} was begun with {before}: expected {_RESTARTS} = "
            f"{(*restarts, before)}, so that its learning rates up to step {reached} stay the same"
        )
    return (_STEPS, _RESTARTS)
