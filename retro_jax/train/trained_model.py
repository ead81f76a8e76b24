"""The model of a trained run, as its newest checkpoint has it."""

import os
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.model import Retro
from retro_jax.sharding import MESH_SHARDINGS, Shardings, parameter_shardings
from retro_jax.train.checkpoint import restore_params


def load_model(
    checkpoints: str | os.PathLike,
    retro: RetroConfig,
    execution: ExecutionConfig,
    *,
    mesh: Mesh | None = None,
    averaged: bool = False,
) -> tuple[int, nnx.GraphDef, nnx.State]:
    """Restores the parameters of a run's newest undamaged checkpoint.

    Args:
      checkpoints: the run's directory of them. retro, execution: of the model.
      mesh: where the parameters go; None for the first device.
      averaged: whether to restore the moving average of the parameters.

    Returns:
      The checkpoint's step, the model's graph definition and its parameters, for nnx.merge.

    Raises:
      UserError: there is no such checkpoint, or it belongs to another model.
    """
    layout = Shardings() if mesh is None else MESH_SHARDINGS
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Retro(retro, execution, shardings=layout, rngs=nnx.Rngs(0)))
    )
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), params)
    else:
        shardings = parameter_shardings(params, mesh)

    def struct(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    part = "average" if averaged else "params"
    step, restored = restore_params(checkpoints, jax.tree.map(struct, params, shardings), part=part)
    return step, graphdef, restored
