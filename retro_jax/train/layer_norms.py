"""Norms of gradients or parameters by layer, for curves: where in its depth a run goes wrong."""

from typing import Any

import jax
import jax.numpy as jnp

from retro_jax.train.parameter_names import named_leaves

# Parameters of these have a leading axis of layers; the longer name comes first.
_STACKS = ("encoder.cross_attention", "encoder.layers", "layers", "cca")


def layer_norms(tree: Any) -> dict[str, jax.Array]:
    """The 2-norms of all layers of a tree of parameters, or of their gradients.

    Returns:
      {stack: [layers] float32} as in "layers" or "encoder.layers", and {name: scalar} of what is in no
      stack, as in "embedding.table".
    """
    squares: dict[str, jax.Array] = {}
    for name, leaf in named_leaves(tree).items():
        stack = next((s for s in _STACKS if name.startswith(f"{s}.")), None)
        axes = tuple(range(1 if stack else 0, leaf.ndim))
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
        key = stack or name
        squares[key] = squares[key] + square if key in squares else square
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def as_values(kind: str, norms: dict[str, Any]) -> dict[str, float]:
    """Norms as values of a curve's line: "grad_norm/layers/1", layers counted from 1 in their stack.

    Args:
      kind: "grad_norm" or "param_norm". norms: as `layer_norms` gives them, on the host.
    """
    values: dict[str, float] = {}
    for name, norm in norms.items():
        if norm.ndim:
            values |= {f"{kind}/{name}/{i}": float(x) for i, x in enumerate(norm, 1)}
        else:
            values[f"{kind}/{name}"] = float(norm)
    return values
