"""The loss by tiles of logits that stay in the chip's memory: a block of tokens times a block of ids.

    forward     for each block of ids, for each block of tokens: the logits [T, U], and from them the
                running maximum, sum of exponentials and target's logit of every token
    backward    the same loops compute the logits again. (softmax - target) is multiplied with the ids'
                rows, added up by token, and with the tokens' activations, added up by id, in float32

loss.py has blocks of tokens only: its logits [T, V] are too large for the chip's memory and travel to HBM
and back several times. Here HBM has the table once and the activations once for each block of ids.
Milakov and Gimelshein 2018, arXiv 1805.02867, describe the running maximum.

Letters beside those of the model: G blocks of T tokens, of one device; U ids of a tile.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from retro_jax.sharding import Shardings, lay_out

_LEAST = -1e30
_NONE = -(2**30)  # no id, whatever is subtracted from one

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the loss is cut; static.

    Attributes:
      ids: of the vocabulary in a tile, at most. positions: of every row in a tile; a divisor of N.
      pad_id: of targets without loss. dtype: of the products. shardings: of the arrays.
    """

    ids: int
    positions: int
    pad_id: int
    dtype: Any
    shardings: Shardings


class _Tokens(NamedTuple):
    """One device's tokens in blocks: activations [G, T, D], and targets or other numbers [G, T]."""

    h: Array
    targets: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def tiled_losses(h_BxNxD: Array, table_VxD: Array, targets_BxN: Array, tiling: Tiling) -> Array:
    """Negative log-likelihood of every target in nats, as loss.token_losses gives it.

    Args:
      h_BxNxD: the final activations. table_VxD: the read-out, float32, laid out as a parameter.
      targets_BxN: int32. tiling: see there.

    Returns:
      [B, N] float32; 0 where the target is pad_id.
    """
    return _forward(h_BxNxD, table_VxD, targets_BxN, tiling)[0]


def _forward(
    h_BxNxD: Array, table_VxD: Array, targets_BxN: Array, tiling: Tiling
) -> tuple[Array, Any]:
    """The losses, and what the backward pass reads."""
    rows, table = tiling.shardings.rows, _table_spec(tiling)
    run = _on_devices(
        functools.partial(_local_losses, tiling=tiling),
        tiling,
        in_specs=(rows(3), table, rows(2)),
        out_specs=(rows(2), rows(2)),
    )
    losses_BxN, log_sum_BxN = run(h_BxNxD, _gathered(table_VxD, tiling), targets_BxN)
    return losses_BxN, (h_BxNxD, table_VxD, targets_BxN, log_sum_BxN)


def _backward(tiling: Tiling, residuals: Any, cotangent_BxN: Array) -> tuple[Array, Array, None]:
    """The gradients of activations and table."""
    h_BxNxD, table_VxD, targets_BxN, log_sum_BxN = residuals
    rows, table = tiling.shardings.rows, _table_spec(tiling)
    run = _on_devices(
        functools.partial(_local_gradients, tiling=tiling),
        tiling,
        in_specs=(rows(3), table, rows(2), rows(2), rows(2)),
        out_specs=(rows(3), table),
    )
    kept = jnp.where(targets_BxN == tiling.pad_id, 0.0, cotangent_BxN)
    d_h, d_table = run(h_BxNxD, _gathered(table_VxD, tiling), targets_BxN, log_sum_BxN, kept)
    spec = jax.typeof(table_VxD).sharding.spec if tiling.shardings.active else None
    return d_h, lay_out(d_table, spec), None


def _table_spec(tiling: Tiling) -> Any:
    """The read-out as its product reads it: whole but for the tensor axis."""
    wide = tiling.shardings.wide(2)
    return None if wide is None else jax.sharding.PartitionSpec(wide[1], None)


def _gathered(table_VxD: Array, tiling: Tiling) -> Array:
    """The read-out in the products' dtype, gathered."""
    return lay_out(table_VxD.astype(tiling.dtype), _table_spec(tiling))


def _on_devices(run: Any, tiling: Tiling, *, in_specs: Any, out_specs: Any) -> Any:
    """A function of one device's arrays as one of whole arrays."""
    if not tiling.shardings.active:
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local_losses(
    h_BxNxD: Array, table_VxD: Array, targets_BxN: Array, *, tiling: Tiling
) -> tuple[Array, Array]:
    """One device's losses [B, N], and logarithms of the sums of exponentials over the whole vocabulary."""
    tokens = _Tokens(_blocks(h_BxNxD, tiling), _blocks(targets_BxN, tiling))
    first, axis = _first_id(table_VxD, tiling)
    least = jnp.full(tokens.targets.shape, _LEAST, jnp.float32)
    zero = jnp.zeros_like(least)

    def tile(sums: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
        start, table_UxD = part

        def block(inputs: Any) -> tuple[Array, ...]:
            (h_TxD, targets_T), (most_T, total_T, hit_T) = inputs
            ids_U = _ids(start, table_UxD.shape[0], table_VxD.shape[0])
            logits_TxU = _logits(h_TxD, table_UxD, ids_U)
            now_T = jnp.maximum(most_T, jnp.max(logits_TxU, axis=1))
            terms_T = jnp.sum(jnp.exp(logits_TxU - now_T[:, None]), axis=1)
            is_target_TxU = ids_U == (targets_T - first)[:, None]
            target_T = jnp.sum(jnp.where(is_target_TxU, logits_TxU, 0.0), axis=1)
            return now_T, total_T * jnp.exp(most_T - now_T) + terms_T, hit_T + target_T

        return jax.lax.map(block, (tokens, sums)), None

    (most, total, hit), _ = jax.lax.scan(tile, (least, zero, zero), _tiles(table_VxD, tiling))
    if axis is not None:
        of_all = jax.lax.pmax(most, axis)
        total = jax.lax.psum(total * jnp.exp(most - of_all), axis)
        most, hit = of_all, jax.lax.psum(hit, axis)
    log_sum = most + jnp.log(total)
    losses = jnp.where(tokens.targets == tiling.pad_id, 0.0, log_sum - hit)
    return _rows(losses, h_BxNxD), _rows(log_sum, h_BxNxD)


def _local_gradients(
    h_BxNxD: Array,
    table_VxD: Array,
    targets_BxN: Array,
    log_sum_BxN: Array,
    cotangent_BxN: Array,
    *,
    tiling: Tiling,
) -> tuple[Array, Array]:
    """The gradients of one device's activations, and of the table, summed over all devices."""
    tokens = _Tokens(_blocks(h_BxNxD, tiling), _blocks(targets_BxN, tiling))
    log_sum, cotangent = _blocks(log_sum_BxN, tiling), _blocks(cotangent_BxN, tiling)
    first, axis = _first_id(table_VxD, tiling)

    def tile(d_h_GxTxD: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        start, table_UxD = part

        def block(d_table_UxD: Array, inputs: Any) -> tuple[Array, Array]:
            (h_TxD, targets_T), log_sum_T, cotangent_T, d_h_TxD = inputs
            ids_U = _ids(start, table_UxD.shape[0], table_VxD.shape[0])
            logits_TxU = _logits(h_TxD, table_UxD, ids_U)
            is_target_TxU = ids_U == (targets_T - first)[:, None]
            error_TxU = jnp.exp(logits_TxU - log_sum_T[:, None]) - is_target_TxU
            d_logits_TxU = (error_TxU * cotangent_T[:, None]).astype(tiling.dtype)
            d_table_UxD += _product("tu,td->ud", d_logits_TxU, h_TxD)
            return d_table_UxD, d_h_TxD + _product("tu,ud->td", d_logits_TxU, table_UxD)

        none = jnp.zeros(table_UxD.shape, jnp.float32)
        inputs = (tokens, log_sum, cotangent, d_h_GxTxD)
        d_table_UxD, d_h_GxTxD = jax.lax.scan(block, none, inputs)
        return d_h_GxTxD, d_table_UxD

    nothing = jnp.zeros(tokens.h.shape, jnp.float32)
    d_h, d_tiles = jax.lax.scan(tile, nothing, _tiles(table_VxD, tiling))
    d_table = d_tiles.reshape(-1, d_tiles.shape[-1])[: table_VxD.shape[0]]
    if tiling.shardings.active:
        d_table = jax.lax.psum(d_table, tiling.shardings.batch)
        d_h = d_h if axis is None else jax.lax.psum(d_h, axis)
    return _rows(d_h, h_BxNxD).astype(h_BxNxD.dtype), d_table


def _first_id(table_VxD: Array, tiling: Tiling) -> tuple[Any, str | None]:
    """The id of this device's first row of the read-out, and the axis along which rows are split."""
    axis = tiling.shardings.tensor
    if not tiling.shardings.active or axis is None:
        return 0, None
    return jax.lax.axis_index(axis) * table_VxD.shape[0], axis


def _tiles(table_VxD: Array, tiling: Tiling) -> tuple[Array, Array]:
    """The first row of each tile, [tiles], and its rows, [tiles, U, D]; zeros fill the last one."""
    rows, width = table_VxD.shape
    count = -(-rows // tiling.ids)
    size = -(-rows // count)
    padded = jnp.pad(table_VxD, ((0, count * size - rows), (0, 0)))
    return jnp.arange(count) * size, padded.reshape(count, size, width)


def _ids(start: Array, size: int, rows: int) -> Array:
    """The rows [U] of the read-out in a tile, and _NONE for what fills the last tile."""
    ids_U = start + jnp.arange(size)
    return ids_U if rows % size == 0 else jnp.where(ids_U < rows, ids_U, _NONE)


def _logits(h_TxD: Array, table_UxD: Array, ids_U: Array) -> Array:
    """[T, U] float32, the least where there is no id."""
    return jnp.where(ids_U == _NONE, _LEAST, _product("td,ud->tu", h_TxD, table_UxD))


def _product(letters: str, a: Array, b: Array) -> Array:
    """A product in float32."""
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _blocks(x_BxNxX: Array, tiling: Tiling) -> Array:
    """[B, N, ...] -> [G, T, ...], T = B * positions."""
    batch, length, *inner = x_BxNxX.shape
    blocks = length // tiling.positions
    by_block = x_BxNxX.reshape(batch, blocks, tiling.positions, *inner)
    return jnp.moveaxis(by_block, 1, 0).reshape(blocks, batch * tiling.positions, *inner)


def _rows(x_GxTxX: Array, like_BxNxD: Array) -> Array:
    """[G, T, ...] -> [B, N, ...]: the inverse of `_blocks`."""
    batch, length = like_BxNxD.shape[:2]
    blocks, inner = x_GxTxX.shape[0], x_GxTxX.shape[2:]
    by_block = x_GxTxX.reshape(blocks, batch, length // blocks, *inner)
    return jnp.moveaxis(by_block, 0, 1).reshape(batch, length, *inner)


tiled_losses.defvjp(_forward, _backward)
