"""Muon: the momentum of each matrix, made orthogonal (https://kellerjordan.github.io/posts/muon).

optax.contrib.scale_by_muon is the same on one device (tests/train/test_optimizer.py). It turns and
flattens arrays whatever their layout, which explicit mesh axes refuse; here one layer's matrix at a time
is laid out for the iteration, its longer side split over all devices:

    mu           as the parameter, for all layers
    one layer    gathered, flattened to [m, n] with m <= n, split along n
    X X^T        [m, m] on every device, summed over them; what follows is local

Embeddings, the read-out, norms and biases are no such matrices: AdamW trains them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from retro_jax.sharding import AXES, lay_out
from retro_jax.train.parameter_names import map_named

COEFFICIENTS, ITERATIONS = (3.4445, -4.775, 2.0315), 5
# An update has about the root mean square of Adam's, so that one learning rate fits both
# (arXiv 2502.16982).
CONSISTENT_RMS = 0.2
_EPSILON = 1e-8
# How many axes are summed over, count several matrices, and are the product's; after that of layers.
_MATRICES = {
    "query_key_value": (1, 1, 2),
    "key_value": (1, 1, 2),
    "query": (1, 0, 2),
    "relative": (1, 0, 2),
    "output": (2, 0, 1),
    "widen": (1, 0, 1),
    "narrow": (1, 0, 1),
    "feed_forward.gate": (1, 0, 1),
}


class MuonState(NamedTuple):
    """The momentum, of so many updates."""

    updates: jax.Array
    mu: Any


def is_matrix(name: str) -> bool:
    """Whether Muon trains a parameter, by its name ("layers.attention.output")."""
    return _axes(name) is not None


def scale_by_muon(beta: float, dtype: str | None = None) -> optax.GradientTransformation:
    """Muon's direction, with Nesterov's momentum; every leaf is a stack of matrices.

    Args:
      beta: decay of the momentum. dtype: of the momentum; None for the parameters'.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=dtype))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = optax.safe_increment(state.updates)
        before = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, beta, count)
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, before, now)
        directions = map_named(_orthogonalise, momentum)
        return directions, MuonState(count, optax.tree.cast(mu, dtype))

    return optax.GradientTransformation(init, update)


def _axes(name: str) -> tuple[int, int, int] | None:
    """The kinds of a matrix's axes; None for what is no matrix of a layer."""
    if name == "read_out":
        return None
    found = [axes for end, axes in _MATRICES.items() if f".{name}".endswith(f".{end}")]
    return found[0] if found else None


def _orthogonalise(name: str, stack: jax.Array) -> jax.Array:
    """A stack of matrices [layers, ...], each made orthogonal and scaled, one layer after the other."""
    axes = _axes(name)
    assert axes is not None, name
    inputs, batch, _ = axes
    spec = None if jax.typeof(stack).sharding.mesh.empty else jax.typeof(stack).sharding.spec[1:]

    def one(layer: jax.Array) -> jax.Array:
        whole = layer if spec is None else lay_out(layer, P(*[None] * layer.ndim))
        places = range(inputs, inputs + batch)
        turned = jnp.moveaxis(whole, places, range(batch))
        count = math.prod(turned.shape[:batch])
        rows = math.prod(turned.shape[batch : batch + inputs])
        result = _newton_schulz(turned.reshape(count, rows, -1)).reshape(turned.shape)
        result = jnp.moveaxis(result, range(batch), places)
        return result if spec is None else lay_out(result, P(*spec))

    return jax.lax.map(one, stack)


def _newton_schulz(x_BxMxN: jax.Array) -> jax.Array:
    """Matrices with about the same singular vectors, and singular values of about 1, times the scale."""
    rows, columns = x_BxMxN.shape[1:]
    scale = CONSISTENT_RMS * math.sqrt(max(rows, columns))
    if rows > columns:
        x_BxMxN = x_BxMxN.swapaxes(1, 2)
    meshed = not jax.typeof(x_BxMxN).sharding.mesh.empty
    split = P(None, None, _splitting(max(rows, columns))) if meshed else None
    whole = P(None, None, None) if meshed else None
    x = lay_out(x_BxMxN, split)
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True)) + _EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = jnp.einsum("bmn,bkn->bmk", x, x, out_sharding=whole)
        mixed = b * square + c * jnp.einsum("bmk,bkl->bml", square, square, out_sharding=whole)
        x = a * x + jnp.einsum("bmk,bkn->bmn", mixed, x, out_sharding=split)
    x = lay_out(x * scale, whole)
    return x.swapaxes(1, 2) if rows > columns else x


def _splitting(length: int) -> tuple[str, ...] | None:
    """As many mesh axes as divide a length."""
    sizes = jax.sharding.get_abstract_mesh().shape
    for axes in (AXES, AXES[1:], AXES[1:2]):
        if length % math.prod(sizes[axis] for axis in axes) == 0:
            return axes
    return None
