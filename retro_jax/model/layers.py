"""Embedding, norms, feed-forward, dropout: the parts of the whole model.

Shape letter beside those of the model: I any leading axes, of which the batch is the first.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from retro_jax.config import DecoderForm, ExecutionConfig, RetroConfig
from retro_jax.model.backend import (
    few_rows_product,
    float32_gradient_product,
    has_few_rows,
    product,
)
from retro_jax.parameters import parameter
from retro_jax.sharding import FSDP, TENSOR, Shardings, draw_sharding, lay_out

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

Module = TypeVar("Module", bound=nnx.Module)
TILES = "_tiles"  # ends the name of a weight's tiles of columns


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], spec: P, *, fan_in: int, gain: float = 1.0
) -> nnx.Param:
    """A float32 parameter drawn from N(0, gain^2 / fan_in); on a mesh, each device draws its part.

    Args:
      rngs: the parameters' random stream. shape: of one layer. spec: how it is split.
      fan_in: products that are summed. gain: on the deviation.
    """
    key = rngs.params()
    draw = jax.random.normal(key, shape, jnp.float32, out_sharding=draw_sharding(spec))
    return parameter(draw * (gain / math.sqrt(fan_in)), spec)


class Layout:
    """Settings of a module's computation: dtype and shardings. Static, hashable."""

    def __init__(self, execution: ExecutionConfig, shardings: Shardings):
        self.execution = execution
        self.shardings = shardings
        self.dtype = jnp.dtype(execution.activation_dtype)

    def __hash__(self) -> int:
        return hash((self.execution, self.shardings))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return (self.execution, self.shardings) == (other.execution, other.shardings)

    def weight(self, param: nnx.Param) -> jax.Array:
        """A parameter as its product reads it: in the activations' dtype, gathered over fsdp."""
        return lay_out(param[...].astype(self.dtype), self.shardings.gathered(param))

    def vector(self, param: nnx.Param) -> jax.Array:
        """A small parameter that is added or multiplied; float32 where its gradient is summed in it."""
        if not self.sums_in_float32:
            return self.weight(param)
        return lay_out(param[...], self.shardings.gathered(param))

    def product(
        self, x: jax.Array, param: nnx.Param, *, contracted: int = 1, out_sharding: P | None
    ) -> jax.Array:
        """The product with a parameter; the arguments are those of backend.product."""
        gathered = self.shardings.gathered(param)
        return self.product_of(
            param[...], x, contracted=contracted, gathered=gathered, out_sharding=out_sharding
        )

    def product_of(
        self,
        weight: jax.Array,
        x: jax.Array,
        *,
        gathered: P | None,
        contracted: int = 1,
        out_sharding: P | None,
    ) -> jax.Array:
        """`product` with an array of parameters, which it reads laid out as `gathered`."""
        gathered = gathered if self.shardings.active else None
        if self.sums_in_float32:
            return float32_gradient_product(x, weight, contracted, out_sharding, gathered)
        weight = lay_out(weight.astype(self.dtype), gathered)
        return product(x, weight, contracted=contracted, out_sharding=out_sharding)

    @property
    def sums_in_float32(self) -> bool:
        """Whether weights' gradients are summed in another dtype than that of the activations."""
        return self.execution.float32_gradients and self.dtype != jnp.float32


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32."""

    def __init__(self, width: int, epsilon: float):
        self.scale = parameter(jnp.ones(width, jnp.float32), P(None), decays=False)
        self.epsilon = epsilon

    def __call__(self, x_IxD: jax.Array) -> jax.Array:
        """[*I, D] -> [*I, D] in the dtype of x."""
        x32_IxD = x_IxD.astype(jnp.float32)
        mean_square_Ix1 = jnp.mean(jnp.square(x32_IxD), axis=-1, keepdims=True)
        inverse_Ix1 = jax.lax.rsqrt(mean_square_Ix1 + self.epsilon)
        return (x32_IxD * inverse_Ix1 * self.scale[...]).astype(x_IxD.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(variance(x) + epsilon) * scale + bias, computed in float32."""

    def __init__(self, width: int, epsilon: float):
        self.scale = parameter(jnp.ones(width, jnp.float32), P(None), decays=False)
        self.bias = bias((width,), P(None))
        self.epsilon = epsilon

    def __call__(self, x_IxD: jax.Array) -> jax.Array:
        """[*I, D] -> [*I, D] in the dtype of x."""
        x32_IxD = x_IxD.astype(jnp.float32)
        x32_IxD = x32_IxD - jnp.mean(x32_IxD, axis=-1, keepdims=True)
        variance_Ix1 = jnp.mean(jnp.square(x32_IxD), axis=-1, keepdims=True)
        scaled_IxD = x32_IxD * jax.lax.rsqrt(variance_Ix1 + self.epsilon) * self.scale[...]
        return (scaled_IxD + self.bias[...]).astype(x_IxD.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(form: DecoderForm, width: int, epsilon: float) -> Norm:
    """The norm of a residual stream, of the kind that a decoder's form names."""
    return LayerNorm(width, epsilon) if form.norm == "layer" else RMSNorm(width, epsilon)


def bias(shape: tuple[int, ...], spec: P) -> nnx.Param:
    """A float32 parameter of zeros, on which weight decay does not act."""
    return parameter(jnp.zeros(shape, jnp.float32), spec, decays=False)


class Embedding(nnx.Module):
    """Rows of a [V, D] table. An id past the table (a pad_id of V) reads the last row; it is masked."""

    def __init__(self, vocab_size: int, width: int, *, layout: Layout, rngs: nnx.Rngs):
        self.table = normal(rngs, (vocab_size, width), P(TENSOR, FSDP), fan_in=width)
        self.layout = layout

    def __call__(self, tokens_I: jax.Array) -> jax.Array:
        """Embeds [*I] ids as [*I, D].

        Rows are looked up in float32, so that the gradient of a frequent token is summed in float32.
        """
        shardings = self.layout.shardings
        table_VxD = lay_out(self.table[...], shardings.gathered(self.table))
        spec = shardings.rows(tokens_I.ndim + 1)
        return table_VxD.at[tokens_I].get(mode="clip", out_sharding=spec).astype(self.layout.dtype)


class LearnedPositions(nnx.Module):
    """A [rows, D] table of positions, added to embedded tokens."""

    def __init__(self, rows: int, width: int, *, layout: Layout, rngs: nnx.Rngs):
        self.table = normal(rngs, (rows, width), P(None, FSDP), fan_in=width)
        self.layout = layout

    def __call__(self, positions_T: jax.Array) -> jax.Array:
        """Rows [*T, D] of positions [*T]; one past the table reads the last row. [B, T] are of texts."""
        table = lay_out(self.table[...], self.layout.shardings.gathered(self.table))
        spec = self.layout.shardings.rows(3) if positions_T.ndim == 2 else None
        rows = table.at[positions_T].get(mode="clip", out_sharding=spec)
        return rows.astype(self.layout.dtype)


class FeedForward(nnx.Module):
    """FFW: norm, D -> F, activation, F -> D; by default ungated and without biases."""

    # Where the decoder's form has them.
    gate: nnx.Param
    gate_bias: nnx.Param
    widen_bias: nnx.Param
    narrow_bias: nnx.Param

    def __init__(
        self,
        config: RetroConfig,
        width: int,
        d_ff: int,
        *,
        layout: Layout,
        rngs: nnx.Rngs,
        form: DecoderForm = DecoderForm(),
        layers: int = 0,
    ):
        """Makes one. layers: of its stack, if that is not the decoder's."""
        self.norm = make_norm(form, width, config.norm_epsilon)
        gain = residual_gain(layers or config.num_layers, width)
        self.widen = normal(rngs, (width, d_ff), P(FSDP, TENSOR), fan_in=width)
        self.narrow = normal(rngs, (d_ff, width), P(TENSOR, FSDP), fan_in=d_ff, gain=gain)
        self.gated = form.feed_forward == "gated"
        if self.gated:
            self.gate = normal(rngs, (width, d_ff), P(FSDP, TENSOR), fan_in=width)
        if form.mlp_bias:
            self.widen_bias, self.narrow_bias = bias((d_ff,), P(TENSOR)), bias((width,), P(None))
            if self.gated:
                self.gate_bias = bias((d_ff,), P(TENSOR))
        self.activation = config.activation
        self.layout = layout

    def __call__(self, x_IxD: jax.Array) -> jax.Array:
        """[*I, D] -> [*I, D], without the residual."""
        shardings, activation = self.layout.shardings, _ACTIVATIONS[self.activation]
        x_IxD = self.norm(x_IxD)
        wide = shardings.wide(x_IxD.ndim)
        wide_IxF = affine(self, "widen", x_IxD, out_sharding=wide)
        if self.gated:
            wide_IxF = wide_IxF * activation(affine(self, "gate", x_IxD, out_sharding=wide))
        else:
            wide_IxF = activation(wide_IxF)
        return affine(self, "narrow", wide_IxF, out_sharding=shardings.rows(x_IxD.ndim))


def affine(
    module: Any,
    name: str,
    x: jax.Array,
    *,
    contracted: int = 1,
    out_sharding: P | None,
) -> jax.Array:
    """The product with a module's weight, and what the module has to add to it.

    That is a bias `name_bias`, and the product with `name_down`, then `name_up`: a weight of low rank.

    A module made for decoding on a CPU has `name_tiles` too (backend.py).

    Args:
      module: with a `layout`. name: of the weight. x, contracted, out_sharding: of `product`.
    """
    layout, param = module.layout, getattr(module, name)
    tiles = getattr(module, f"{name}{TILES}", None)
    if tiles is not None and has_few_rows(x, contracted):
        shape = param.shape[contracted:]
        y = few_rows_product(x, tiles[...], shape, contracted=contracted)
    else:
        y = layout.product(x, param, contracted=contracted, out_sharding=out_sharding)
    if (down := getattr(module, f"{name}_down", None)) is not None:
        rows = layout.shardings.rows(x.ndim - contracted + 1)
        narrow = layout.product(x, down, contracted=contracted, out_sharding=rows)
        y = y + layout.product(narrow, getattr(module, f"{name}_up"), out_sharding=out_sharding)
    added = getattr(module, f"{name}_bias", None)
    return y if added is None else (y + layout.vector(added)).astype(y.dtype)


def residual_gain(layers: int, width: int) -> float:
    """Scales the layers' initial output to a residual stream of a width to an embedding's norm.

    A token's embedding has norm 1, and so has the sum of all that the 2 * layers branches of a stack add.
    With sums of norm sqrt(width) a token is lost in its own stream: docs/results.md has the loss.
    """
    return 1.0 / math.sqrt(2 * layers * width)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; without a key (evaluation) or rate it is the identity."""
    if key is None or rate == 0.0:
        return x
    sharding = jax.typeof(x).sharding
    spec = None if sharding.mesh.empty else sharding.spec  # each device draws its part of the mask
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=spec)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def largest_divisor(length: int, limit: int) -> int:
    """The largest block of at most `limit` positions that divides a sequence of `length`."""
    return max(size for size in range(1, min(length, limit) + 1) if length % size == 0)
