"""Positions in attention: what each kind adds to queries, keys and logits, and the parameters it needs.

An attention asks its positions, an object of one of these kinds; a further kind is a further class.

    Relative       the paper's: four terms in the logits, computed for every distance and then shifted
    Rotary         queries and keys turned by their positions; logits stay plain products
    NoPositions    nothing

Relative positions (Transformer-XL; paper, appendix B.1.1):

    logits_ij = (q_i.k_j + u.k_j + q_i.R(d_ij) + v.R(d_ij)) / sqrt(head_dim)

The distance d_ij = i - j + offset takes only T + S - 1 values: q.R is computed once per distance.
Each query's row is then shifted into place. With T = 3, S = 4, offset 0 and columns from the
largest distance down, row i must begin at column T - 1 - i:

    columns d:    2  1  0 -1 -2 -3          row 0 reads  0 -1 -2 -3   (from column 2)
                                            row 1 reads  1  0 -1 -2   (from column 1)
                                            row 2 reads  2  1  0 -1   (from column 0)

Read as one flat array of rows of width W = 6, dropping the first T - 1 values and cutting rows of
width W - 1 moves each row's beginning one further to the left than the row before: the shift. libtpu
takes hours over a reshape of such widths, so TPUs are given slices: of groups of rows, then of the
rows of a group.

Shape letters beside those of the model: I any leading axes, T queries, S keys, W head width
(head_dim), Q = T + S - 1 distances.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from retro_jax.config import RetroConfig
from retro_jax.model.backend import constants
from retro_jax.model.layers import largest_divisor, normal
from retro_jax.parameters import parameter
from retro_jax.sharding import FSDP, TENSOR, target_platform

# A parameter of the attention by its name, as products read it.
Weight = Callable[[str], jax.Array]


@dataclasses.dataclass(frozen=True)
class Positions:
    """A kind of positions. This base changes nothing; each kind overrides the parts it needs.

    Attributes:
      name: in RetroConfig.positions and in messages.
      kernels: platforms with a fused kernel for this kind.
      flops_per_distance: operations for each query, distance and unit of heads x head width.
    """

    name = "no"
    kernels: ClassVar[tuple[str, ...]] = ("gpu", "tpu")
    flops_per_distance = 0

    def parameters(
        self, rngs: nnx.Rngs, width: int, heads: tuple[int, int]
    ) -> dict[str, nnx.Param]:
        """Parameters of an attention whose queries have a width; heads: (H, head_dim)."""
        return {}

    def turn(self, x_IxTxHxW: jax.Array, positions: np.ndarray | jax.Array) -> jax.Array:
        """Queries or keys [*I, T, H, W] at integer positions [T], or [*I, T] of a traced array."""
        return x_IxTxHxW

    def distance_table(self, weight: Weight, distances_Q: jax.Array) -> jax.Array | None:
        """The logits' values for every distance, [Q, ...], or None where they need none."""
        return None

    def biased(self, weight: Weight, query_IxTxHxW: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The queries for the products with keys, and those for the products with the table."""
        raise TypeError(f"{type(self).__name__} has no table of distances")

    def logits(
        self,
        weight: Weight,
        query_IxTxHxW: jax.Array,
        table: jax.Array,
        num_keys: int,
    ) -> tuple[jax.Array, jax.Array]:
        """The queries for the products with keys, and the terms added to these products.

        Args:
          weight: reads a parameter by name.
          query_IxTxHxW: the queries.
          table: `distance_table` of T + S - 1 distances, the largest first.
          num_keys: S.

        Returns:
          Queries [*I, T, H, W] and an addend [*I, H, T, S].
        """
        raise TypeError(f"{type(self).__name__} has no table of distances")


@dataclasses.dataclass(frozen=True)
class NoPositions(Positions):
    """Attention in which the order of keys has no meaning."""


@dataclasses.dataclass(frozen=True)
class Rotary(Positions):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864).

    Attributes:
      base, width, divisors: DecoderForm's rotary_base, rotary_dim and rotary_divisors.
    """

    name = "rotary"

    base: float = 10_000.0
    width: int = 0
    divisors: tuple[float, ...] = ()

    def turn(self, x_IxTxHxW: jax.Array, positions: np.ndarray | jax.Array) -> jax.Array:
        """Turns pairs of values by an angle that grows with the position."""
        turned = self.width or x_IxTxHxW.shape[-1]
        of_pair = frequencies(turned, self.base, self.divisors)
        if turned == x_IxTxHxW.shape[-1]:
            return rotate(x_IxTxHxW, positions, of_pair)
        first = rotate(x_IxTxHxW[..., :turned], positions, of_pair)
        return jnp.concatenate([first, x_IxTxHxW[..., turned:]], axis=-1)

    def angles(self, positions_T: np.ndarray, width: int) -> jax.Array:
        """[T, W] radians by which each number of a head of W turns with its partner; 0 for none."""
        turned = self.width or width
        of_pair = frequencies(turned, self.base, self.divisors)
        each = np.concatenate([of_pair, of_pair, np.zeros(width - turned, np.float32)])
        return jnp.asarray(positions_T, jnp.float32)[:, None] * each


@dataclasses.dataclass(frozen=True)
class Relative(Positions):
    """Transformer-XL's relative positions (this file's head)."""

    name = "relative"
    kernels = ("tpu",)
    flops_per_distance = 2

    def parameters(
        self, rngs: nnx.Rngs, width: int, heads: tuple[int, int]
    ) -> dict[str, nnx.Param]:
        """The map R of sinusoids, and the biases u and v."""

        def bias() -> nnx.Param:
            return parameter(jnp.zeros(heads, jnp.float32), P(TENSOR, None), decays=False)

        spec = P(FSDP, TENSOR, None)
        return {
            "relative": normal(rngs, (width, *heads), spec, fan_in=width),
            "content_bias": bias(),
            "position_bias": bias(),
        }

    def distance_table(self, weight: Weight, distances_Q: jax.Array) -> jax.Array:
        """R(d): [Q] distances -> [Q, H, W], the learned map of the distances' sinusoids."""
        weight_DxHxW = weight("relative")
        table_QxD = sinusoids(distances_Q, weight_DxHxW.shape[0]).astype(weight_DxHxW.dtype)
        # With a product that rounds to bfloat16, a TPU sums the table's gradient over devices in it.
        exact = jax.lax.Precision.HIGHEST if weight_DxHxW.dtype == jnp.float32 else None
        return jnp.einsum("nd,dhk->nhk", table_QxD, weight_DxHxW, precision=exact)

    def biased(self, weight: Weight, query_IxTxHxW: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q + u and q + v."""
        content, position = (query_IxTxHxW + weight(f"{n}_bias") for n in ("content", "position"))
        return content.astype(query_IxTxHxW.dtype), position.astype(query_IxTxHxW.dtype)

    def logits(
        self,
        weight: Weight,
        query_IxTxHxW: jax.Array,
        table: jax.Array,
        num_keys: int,
    ) -> tuple[jax.Array, jax.Array]:
        """q + u, and (q + v).R(d) shifted from distances to keys."""
        content_IxTxHxW, position_IxTxHxW = self.biased(weight, query_IxTxHxW)
        by_distance_IxHxTxQ = jnp.einsum(
            "...thk,nhk->...htn",
            position_IxTxHxW,
            table.astype(position_IxTxHxW.dtype),
            preferred_element_type=jnp.float32,
        )
        return content_IxTxHxW, shift(by_distance_IxHxTxQ, num_keys)


_KINDS: dict[str, Positions] = {kind.name: kind for kind in (Relative(), Rotary())}


def positions_of(name: str) -> Positions:
    """The kind of positions that RetroConfig.positions names."""
    return _KINDS[name]


def decoder_positions(config: RetroConfig) -> Positions:
    """The kind of positions in the decoder's attention; NoPositions where a table of them is learned."""
    form = config.form
    if form.learned_positions:
        return NoPositions()
    if config.positions == Rotary.name:
        return Rotary(form.rotary_base, form.rotary_dim, form.rotary_divisors)
    return positions_of(config.positions)


def kinds_with_kernel(platform: str) -> list[str]:
    """Names of the kinds that a platform's fused kernels compute."""
    return [name for name, kind in _KINDS.items() if platform in kind.kernels]


def frequencies(width: int, base: float = 10_000.0, divisors: tuple[float, ...] = ()) -> np.ndarray:
    """[width / 2] float32: radians per token, base^(-2t / width), the fastest first.

    Args:
      width: of the part that turns. base: theta. divisors: one for each pair, or ().
    """
    plain = base ** (-2.0 * np.arange(width // 2) / width)
    return (plain / np.array(divisors) if divisors else plain).astype(np.float32)


def sinusoids(distances_Q: jax.Array, width: int) -> jax.Array:
    """[Q] distances -> [Q, width] float32: sines, then cosines, of distance / 10000^(2t / width)."""
    angles = distances_Q.astype(jnp.float32)[:, None] * frequencies(width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def distances(num_queries: int, num_keys: int, offset: int = 0) -> jax.Array:
    """All T + S - 1 distances i - j + offset, the largest first, as `shift` expects its columns."""
    return jnp.arange(num_queries - 1 + offset, offset - num_keys, -1)


def shift(logits_IxTxQ: jax.Array, num_keys: int) -> jax.Array:
    """[*I, T, Q] logits by distance -> [*I, T, S] logits by key (see the file's head)."""
    *leading, rows, columns = logits_IxTxQ.shape
    if rows == 1:
        return logits_IxTxQ
    if target_platform() == "tpu":
        return shift_by_slices(logits_IxTxQ, num_keys)
    flat = logits_IxTxQ.reshape(*leading, rows * columns)
    flat = flat[..., rows - 1 : rows - 1 + rows * (columns - 1)]
    return flat.reshape(*leading, rows, columns - 1)[..., :num_keys]


def shift_by_slices(logits_IxTxQ: jax.Array, num_keys: int) -> jax.Array:
    """`shift` in two rounds: about 2 sqrt(T) slices instead of one reshape of uneven widths."""
    *leading, rows, columns = logits_IxTxQ.shape
    size = largest_divisor(rows, math.isqrt(rows))
    groups = logits_IxTxQ.reshape(*leading, rows // size, size, columns)
    # A group keeps the columns that any of its rows reads, from where its last row begins.
    slices = [
        jax.lax.slice_in_dim(groups[..., group, :, :], start, start + num_keys + size - 1, axis=-1)
        for group, start in enumerate(range(rows - size, -1, -size))
    ]
    by_group = jnp.stack(slices, axis=-3)
    slices = [
        jax.lax.slice_in_dim(
            by_group[..., row, :], size - 1 - row, size - 1 - row + num_keys, axis=-1
        )
        for row in range(size)
    ]
    return jnp.stack(slices, axis=-2).reshape(*leading, rows, num_keys)


def _rotate_whole(x_IxTxHxW: jax.Array, sine: jax.Array, cosine: jax.Array) -> jax.Array:
    """`rotate` without halves of a head, which a TPU writes as arrays of their own, padded to 128 numbers.

    Every number gets its partner by a product with ones and minus ones.
    """
    half = np.eye(sine.shape[-1], dtype=np.float32)
    partner_WxW = np.block([[0 * half, half], [-half, 0 * half]])
    partner = jnp.einsum(
        "...w,wv->...v",
        x_IxTxHxW,
        jnp.asarray(partner_WxW, x_IxTxHxW.dtype),
        precision=jax.lax.Precision.HIGHEST if x_IxTxHxW.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    sine, cosine = (jnp.concatenate([part, part], axis=-1) for part in (sine, cosine))
    return (x_IxTxHxW * cosine + partner * sine).astype(x_IxTxHxW.dtype)


def rotate(
    x_IxTxHxW: jax.Array,
    positions_T: np.ndarray | jax.Array,
    of_pair: np.ndarray | None = None,
) -> jax.Array:
    """Turns the pairs (x[t], x[t + W / 2]) of [*I, T, H, W] by their positions.

    Args:
      x_IxTxHxW: queries or keys. positions_T: integers [T], or traced ones [*I, T].
      of_pair: [W / 2] frequencies, or None for those of base 10000.
    """
    width = x_IxTxHxW.shape[-1]
    of = constants() if isinstance(positions_T, np.ndarray) else jnp
    of_pair = frequencies(width) if of_pair is None else of_pair
    angles = of.asarray(positions_T, np.float32)[..., None, None] * of_pair
    sine, cosine = of.sin(angles), of.cos(angles)
    if target_platform() == "tpu":
        return _rotate_whole(x_IxTxHxW, sine, cosine)
    first, second = (
        half.astype(jnp.float32)
        for half in (x_IxTxHxW[..., : width // 2], x_IxTxHxW[..., width // 2 :])
    )
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x_IxTxHxW.dtype)
