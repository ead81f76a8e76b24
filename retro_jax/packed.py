"""Float arrays in float16, or in 8 bits with a float16 scale for each block of 32 numbers.

A block's largest number is 127 steps of its scale. Blocks are small because a few dimensions of a
decoder's states are hundreds of times larger than the others.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

FORMATS = ("float16", "int8")
_BLOCK = 32
_STEPS = 127

Array = Any  # NumPy on the host, JAX on the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """An array of floats with fewer bits.

    Attributes:
      values: [..., D] float16 or int8. scales: [..., D / 32] float16, rounded up; None with float16.
    """

    values: Array
    scales: Array | None = None

    def unpacked(self) -> jax.Array:
        """[..., D] float32."""
        values = jnp.asarray(self.values, jnp.float32)
        if self.scales is None:
            return values
        scales = jnp.repeat(jnp.asarray(self.scales, jnp.float32), _BLOCK, axis=-1)
        return values * scales[..., : values.shape[-1]]

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def check_packed(values: Array, scales: Array | None, form: str) -> None:
    """Checks arrays that were read from a file.

    Args:
      values, scales: of a `Packed`. form: of FORMATS.

    Raises:
      ValueError: they are of another type, or do not fit each other.
    """
    if values.dtype != form:
        raise ValueError(f"values are {values.dtype} of shape {values.shape}")
    if (scales is None) != (form == "float16"):
        raise ValueError("scales are missing" if scales is None else "there are scales")
    blocks = (*values.shape[:-1], -(-values.shape[-1] // _BLOCK))
    if scales is not None and scales.shape != blocks:
        raise ValueError(f"scales have shape {scales.shape} beside values of {values.shape}")


def pack(x: jax.Array, form: str) -> Packed:
    """Floats [..., D] in one of FORMATS."""
    if form == "float16":
        return Packed(x.astype(jnp.float16))
    width = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % _BLOCK)])
    blocks = padded.reshape(*x.shape[:-1], -1, _BLOCK)
    scales = (jnp.max(jnp.abs(blocks), axis=-1) / _STEPS).astype(jnp.float16)
    step = scales.astype(jnp.float32)[..., None]
    steps = jnp.round(blocks / jnp.where(step == 0, 1, step))
    values = jnp.clip(steps, -_STEPS, _STEPS).astype(jnp.int8)
    return Packed(values.reshape(padded.shape)[..., :width], scales)
