"""Positions in attention: distances, their sinusoids, the shift to keys, rotary turns."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.model.layers import largest_divisor
from retro_jax.sharding import target_platform


def frequencies(width: int) -> np.ndarray:
    """[width / 2] float32: radians a token, 10000^(-2t / width), the fastest first."""
    return (10000.0 ** (-2.0 * np.arange(width // 2) / width)).astype(np.float32)


def sinusoids(distances: jax.Array, width: int) -> jax.Array:
    """[n] distances -> [n, width] float32: sines, then cosines, of distance / 10000^(2t / width)."""
    angles = distances.astype(jnp.float32)[:, None] * frequencies(width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def distances(num_queries: int, num_keys: int, offset: int = 0) -> jax.Array:
    """All T + S - 1 distances i - j + offset, the largest first, as `shift` expects its columns."""
    return jnp.arange(num_queries - 1 + offset, offset - num_keys, -1)


def shift(logits: jax.Array, num_keys: int) -> jax.Array:
    """[..., T, T + S - 1] logits by distance -> [..., T, S] logits by key (see the file's head)."""
    *leading, rows, columns = logits.shape
    if rows == 1:
        return logits
    if target_platform() == "tpu":
        return shift_by_slices(logits, num_keys)
    flat = logits.reshape(*leading, rows * columns)
    flat = flat[..., rows - 1 : rows - 1 + rows * (columns - 1)]
    return flat.reshape(*leading, rows, columns - 1)[..., :num_keys]


def shift_by_slices(logits: jax.Array, num_keys: int) -> jax.Array:
    """`shift` in two rounds: about 2 sqrt(T) slices instead of one reshape of uneven widths."""
    *leading, rows, columns = logits.shape
    size = largest_divisor(rows, math.isqrt(rows))
    groups = logits.reshape(*leading, rows // size, size, columns)
    # A group keeps what any of its rows reads, from where its last row begins.
    cut = [
        jax.lax.slice_in_dim(groups[..., group, :, :], start, start + num_keys + size - 1, axis=-1)
        for group, start in enumerate(range(rows - size, -1, -size))
    ]
    logits = jnp.stack(cut, axis=-3)
    cut = [
        jax.lax.slice_in_dim(
            logits[..., row, :], size - 1 - row, size - 1 - row + num_keys, axis=-1
        )
        for row in range(size)
    ]
    return jnp.stack(cut, axis=-2).reshape(*leading, rows, num_keys)


def rotate(x: jax.Array, positions: np.ndarray) -> jax.Array:
    """Rotary positions [T]: turns the pairs (x[t], x[t + head_dim/2]) of [..., T, H, head_dim]."""
    half = x.shape[-1] // 2
    # XLA's CPU backend would make sines anew for every row and head: there they are constants.
    of = np if target_platform() == "cpu" else jnp
    angles = of.asarray(positions, np.float32)[:, None, None] * frequencies(x.shape[-1])
    sine, cosine = of.sin(angles), of.cos(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
