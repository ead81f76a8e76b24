"""What the Pallas kernels of attention share: products in float32, turned rows, shifted distances."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30
_VMEM_BYTES = 64 * 2**20

Array = jax.Array


def product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """A product of two matrices over an axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision, preferred_element_type=jnp.float32
    )


def shifted(t_TxS: Array, *, left: bool, period: int = 0) -> Array:
    """Row a of [T, S] rotated by T - 1 - a, to the left or back to the right.

    A shift of each row by its own amount is log2(T) rotations by a power of two, each for the rows whose
    amount has that bit.

    Args:
      t_TxS: the rows. left: the way. period: after how many rows the amounts begin again; 0 for T.
    """
    rows, columns = t_TxS.shape
    period = period or rows
    row = jax.lax.broadcasted_iota(jnp.int32, t_TxS.shape, 0)
    amount = period - 1 - (row if period == rows else row % period)
    bit = 1
    while bit < period:
        turned = pltpu.roll(t_TxS, columns - bit if left else bit, 1)
        t_TxS = jnp.where((amount & bit) != 0, turned, t_TxS)
        bit *= 2
    return t_TxS


def as_column(row_1xT: Array) -> Array:
    """[1, T] -> [T, 1]."""
    return jnp.broadcast_to(row_1xT, (8, row_1xT.shape[1])).T[:, :1]


def as_row(column_Tx1: Array) -> Array:
    """[T, 1] -> [1, T]."""
    return jnp.broadcast_to(column_Tx1, (column_Tx1.shape[0], 8)).T[:1]


def parameters(axes: Sequence[Any]) -> Any:
    """What the compiler is told: the grid's axes and how much of the chip's memory may be used."""
    return pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=_VMEM_BYTES)
