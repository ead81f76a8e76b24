"""The state before the first step as a program of its own, which can be compiled without running."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from retro_jax.train.step import TrainState


def compile_first_state(
    make_model: Callable[[], Any], optimizer: optax.GradientTransformation, abstract: TrainState
) -> Callable[[], TrainState]:
    """A function under jax.jit that makes the state in place, each array where it will be.

    Args:
      make_model: builds the module. optimizer: of the run.
      abstract: its shapes and shardings, as step.abstract_state gives them.

    Returns:
      A function without arguments, to be called (or lowered) under `jax.set_mesh`. Its values are
      those of step.initial_state.
    """

    def make() -> TrainState:
        params = nnx.split(make_model())[1]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            recent_loss=None if abstract.recent_loss is None else jnp.zeros(2),
            average=None if abstract.average is None else jax.tree.map(jnp.copy, params),
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    on_cpu = shardings.step.mesh.devices.flat[0].platform == "cpu"
    # Random draws run once and give the same bits, but LLVM's last level compiles them 3.4 times
    # longer (18 s for a small RETRO).
    quick: dict[str, Any] | None = {"xla_backend_optimization_level": 1} if on_cpu else None
    return jax.jit(make, out_shardings=shardings, compiler_options=quick)
