"""Settings and operations that make the backends fast: products, barriers, constants, compile options.

Every tuning for one backend is here, so that the model reads as its mathematics. XLA's CPU backend
is the one that needs help; the others choose layouts and loops by themselves, and are left to it.

Products. The CPU backend multiplies fast only where the left operand's contracted axis is its last one
and the right operand's its first; else it transposes an operand inside of a loop of its own, or takes
a product half as fast. Left to itself, JAX computes a weight's gradient as cotangent^T x, with the
wider of the two on the left. Here the narrower one is transposed, by a plain copy:

    x [T, D], y = x w [T, F], dy [T, F]        D <= F:   dw = x^T dy
                                               D > F:    dw = (dy^T x)^T

and so are the queries in the gradient of attention's keys [S, H], of whose logits [T, S] JAX would
transpose the cotangent.

A product of a few rows, as decoding has, waits for the weight to come from memory. For one row XLA
has a loop that only reads. For more it calls Eigen, which first copies the weight into another order
and takes two to three times as long. With the weight's columns in tiles of 32 it is a batch of small
products, each of which reads its tile once: 2 to 8 rows take about as long as one.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from retro_jax.config import ExecutionConfig
from retro_jax.sharding import lay_out, target_platform

_TILE = 32  # columns
_FEW_ROWS = 32


def facts(execution: ExecutionConfig) -> dict[str, Any]:
    """What the bits of a result depend on: the settings, and how the machine multiplies.

    CPUs multiply float32 numbers as such. GPUs and TPUs round them first unless JAX's
    `jax_default_matmul_precision` says otherwise. So the device is recorded where it is not a CPU, and the
    precision where one is set: such results are other ones.
    """
    device = jax.devices()[0]
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return (
        execution.facts()
        | ({"device": device.device_kind} if device.platform != "cpu" else {})
        | ({"matmul_precision": precision} if precision else {})
    )


def product(
    x: jax.Array, weight: jax.Array, *, contracted: int = 1, out_sharding: P | None = None
) -> jax.Array:
    """Contracts the last axes of `x` with the first ones of a weight.

    Args:
      x: [B, ..., *I]. weight: [*I, *O].
      contracted: how many axes I has.
      out_sharding: of the result, on a mesh.

    Returns:
      [B, ..., *O] in the operands' dtype.
    """
    multiply = _cpu_product if target_platform() == "cpu" else _product
    return multiply(x, weight, contracted, out_sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def float32_gradient_product(
    x: jax.Array,
    weight: jax.Array,
    contracted: int,
    out_sharding: P | None,
    gathered: P | None,
) -> jax.Array:
    """`product` with a float32 weight in the dtype of `x`; the weight's gradient never leaves float32.

    Args:
      x, contracted, out_sharding: of `product`. weight: as it is stored.
      gathered: how the product reads the weight.
    """
    return _gathered_product(x, weight, contracted, out_sharding, gathered)[0]


def column_tiles(weight: jax.Array, contracted: int = 1) -> jax.Array:
    """A weight [*I, *O] as tiles of columns [G, I, w], which `few_rows_product` reads."""
    inputs = math.prod(weight.shape[:contracted])
    columns = math.prod(weight.shape[contracted:])
    width = max(size for size in range(1, _TILE + 1) if columns % size == 0)
    return weight.reshape(inputs, columns // width, width).transpose(1, 0, 2)


def has_few_rows(x: jax.Array, contracted: int = 1) -> bool:
    """Whether `few_rows_product` is the faster product."""
    return 1 < math.prod(x.shape[: x.ndim - contracted]) <= _FEW_ROWS


def few_rows_product(
    x: jax.Array, tiles_GxIxW: jax.Array, shape: tuple[int, ...], *, contracted: int = 1
) -> jax.Array:
    """`product` with a weight of which there are `column_tiles`.

    Args:
      x: [B, ..., *I]. tiles_GxIxW: of the weight [*I, *O]. shape: O. contracted: axes of I.

    Returns:
      [B, ..., *O].
    """
    rows = x.shape[: x.ndim - contracted]
    x_NxI = x.reshape(math.prod(rows), -1)
    x_GxNxI = jnp.broadcast_to(x_NxI, (tiles_GxIxW.shape[0], *x_NxI.shape))
    y_GxNxW = jnp.einsum("gni,giw->gnw", x_GxNxI, tiles_GxIxW)
    return y_GxNxW.transpose(1, 0, 2).reshape(*rows, *shape)


def scores(query_IxTxHxW: jax.Array, key_IxSxHxW: jax.Array) -> jax.Array:
    """Every query times every key: [*I, H, T, S] float32."""
    multiply = _cpu_scores if target_platform() == "cpu" else _scores
    return multiply(query_IxTxHxW, key_IxSxHxW)


def settled(x: jax.Array) -> jax.Array:
    """On a CPU an array that is written to memory; elsewhere x itself.

    The operations before and after it are not merged into one loop. Some such loops are slow, and one
    was never compiled: CCA's two conditions on documents inside a softmax, with one row per device
    (LLVM, jax 0.10.2).
    """
    return jax.lax.optimization_barrier(x) if target_platform() == "cpu" else x


def constants() -> Any:
    """The module, of NumPy's functions, that computes arrays which depend on no input.

    On a CPU NumPy itself: XLA would compute the sines of rotary positions again for every row and head.
    """
    return np if target_platform() == "cpu" else jnp


def options_for_overlap(platform: str) -> dict[str, Any] | None:
    """Compiler options of a training step that hide exchanges between devices behind products.

    GPUs order a program so only when they are asked to. TPUs always do: libtpu 0.0.52 makes the same
    program with its options for asynchronous gathers and sums as without.
    """
    if platform != "gpu":
        return None
    pipelined: dict[str, Any]
    kinds = ("all_gather", "all_reduce", "reduce_scatter")
    if jax.__version_info__ >= (0, 11, 1):  # the older names are still flags there, but no options
        pipelined = {f"xla_gpu_pipeline_{k}": "COLLECTIVE_PIPELINING_MODE_ON" for k in kinds}
    else:
        pipelined = {f"xla_gpu_enable_pipelined_{k}": True for k in kinds}
    return {"xla_gpu_enable_latency_hiding_scheduler": True, **pipelined}


def options_for_one_use(platform: str) -> dict[str, Any] | None:
    """Compiler options of a program that runs once, such as the draws of initial values.

    On a CPU LLVM's last level takes 3.4 times longer to compile them (18 s for a small RETRO) and
    gives the same bits.
    """
    return {"xla_backend_optimization_level": 1} if platform == "cpu" else None


def _product(x: jax.Array, weight: jax.Array, contracted: int, out_sharding: P | None) -> jax.Array:
    """The product as JAX would compute it."""
    axes = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted)))
    return jax.lax.dot_general(x, weight, (axes, ((), ())), out_sharding=out_sharding)


_cpu_product = jax.custom_vjp(_product, nondiff_argnums=(2, 3))


def _forward(
    x: jax.Array, weight: jax.Array, contracted: int, out_sharding: P | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The product, and the arrays that its gradients need."""
    return _product(x, weight, contracted, out_sharding), (x, weight)


def _backward(
    contracted: int,
    out_sharding: P | None,
    saved: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradients by x and by the weight."""
    x, weight = saved
    rows = x.ndim - contracted
    last = tuple(range(rows, cotangent.ndim)), tuple(range(contracted, weight.ndim))
    dx = jax.lax.dot_general(cotangent, weight, (last, ((), ())), out_sharding=_spec(x))
    return dx, _weight_gradient(x, cotangent, rows, weight)


def _weight_gradient(x: jax.Array, cotangent: jax.Array, rows: int, weight: jax.Array) -> jax.Array:
    """x^T dy over the first `rows` axes of both, laid out as the weight."""
    if math.prod(x.shape[rows:]) <= math.prod(cotangent.shape[rows:]):
        return settled(_over_rows(x, cotangent, rows, _spec(weight)))
    inputs = x.ndim - rows
    spec = _spec(weight)
    turned = None if spec is None else P(*spec[inputs:], *spec[:inputs])
    dw = settled(_over_rows(cotangent, x, rows, turned))
    outputs = dw.ndim - inputs
    return dw.transpose(*range(outputs, dw.ndim), *range(outputs))


def _over_rows(left: jax.Array, right: jax.Array, rows: int, spec: P | None) -> jax.Array:
    """left^T right, `left` transposed by a copy of its own."""
    first = tuple(range(rows))
    turned = settled(left.transpose(*range(rows, left.ndim), *first))
    last = tuple(range(turned.ndim - rows, turned.ndim))
    return jax.lax.dot_general(turned, right, ((last, first), ((), ())), out_sharding=spec)


def _spec(x: jax.Array) -> P | None:
    """An array's PartitionSpec, if there is a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding.spec


_cpu_product.defvjp(_forward, _backward)


def _gathered_product(
    x: jax.Array,
    weight: jax.Array,
    contracted: int,
    out_sharding: P | None,
    gathered: P | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The product, and the arrays that its gradients need."""
    read = lay_out(weight.astype(x.dtype), gathered)
    return _product(x, read, contracted, out_sharding), (x, read, weight)


def _float32_gradients(
    contracted: int,
    out_sharding: P | None,
    gathered: P | None,
    saved: tuple[jax.Array, ...],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradients by x and by the weight, which is summed where it is stored."""
    x, read, weight = saved
    rows = x.ndim - contracted
    last = tuple(range(rows, cotangent.ndim)), tuple(range(contracted, read.ndim))
    dx = jax.lax.dot_general(cotangent, read, (last, ((), ())), out_sharding=_spec(x))
    first = tuple(range(rows))
    dw = jax.lax.dot_general(
        x,
        cotangent,
        ((first, first), ((), ())),
        preferred_element_type=jnp.float32,
        out_sharding=gathered,
    )
    # Not summed into parts by the product itself: a TPU would compute it in a loop over the parts.
    return dx, lay_out(dw, _spec(weight))


float32_gradient_product.defvjp(_gathered_product, _float32_gradients)


def _scores(query_IxTxHxW: jax.Array, key_IxSxHxW: jax.Array) -> jax.Array:
    """The scores as JAX would compute them."""
    return jnp.einsum(
        "...thw,...shw->...hts", query_IxTxHxW, key_IxSxHxW, preferred_element_type=jnp.float32
    )


_cpu_scores = jax.custom_vjp(_scores)


def _scores_forward(
    query_IxTxHxW: jax.Array, key_IxSxHxW: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The scores, and the arrays that their gradients need."""
    return _scores(query_IxTxHxW, key_IxSxHxW), (query_IxTxHxW, key_IxSxHxW)


def _scores_backward(
    saved: tuple[jax.Array, jax.Array], cotangent_IxHxTxS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients by the queries and by the keys."""
    query_IxTxHxW, key_IxSxHxW = saved
    dquery = jnp.einsum("...hts,...shw->...thw", cotangent_IxHxTxS, key_IxSxHxW)
    dkey = jnp.einsum("...thw,...hts->...shw", query_IxTxHxW, cotangent_IxHxTxS)
    return dquery.astype(query_IxTxHxW.dtype), dkey.astype(key_IxSxHxW.dtype)


_cpu_scores.defvjp(_scores_forward, _scores_backward)
