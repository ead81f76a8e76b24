"""A parameter carries how it is split over the mesh, and whether weight decay acts on it."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec


def parameter(value: Any, spec: PartitionSpec, *, decays: bool = True) -> nnx.Param:
    """A parameter of a module.

    Args:
      value: its array, of one layer.
      spec: mesh axes of its axes, as it is stored between steps (retro_jax.sharding names the axes).
      decays: whether weight decay acts on it; not on norms' scales and biases.
    """
    return nnx.Param(value, spec=spec, decays=decays)


def spec_of(param: nnx.Variable) -> PartitionSpec:
    """The PartitionSpec that a parameter was defined with; a stack has one more leading axis.

    Raises:
      ValueError: it was not created by `parameter`.
    """
    spec = param.get_metadata().get("spec")
    if spec is None:
        raise ValueError(f"a parameter of shape {param.shape} has no PartitionSpec")
    return spec


def decays(param: Any) -> bool:
    """Whether weight decay acts on a parameter; it does on bare arrays."""
    return not isinstance(param, nnx.Variable) or param.get_metadata().get("decays", True)


def map_parameters(function: Callable[[Any], Any], params: Any) -> Any:
    """A tree like `params` with function(parameter) in the place of every leaf."""

    def replace(param: Any) -> Any:
        value = function(param)
        return jax.tree.map(lambda _: value, param)

    return jax.tree.map(replace, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
