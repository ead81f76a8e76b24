"""The decoder's self attention by fused kernels, where a backend has one that fits.

    gpu    cuDNN's flash attention (jax.nn.dot_product_attention): bfloat16, heads of at most 128,
           NVIDIA GPUs from Ampere on
    tpu    JAX's splash attention (Pallas): causal blocks that nobody reads are never visited
           relative_kernel.py, where positions are relative: up to 4,096 tokens
           (few_keys.py has the attention of encoder and CCA)
    else   none: causal_attention.py computes blocks of queries

cuDNN has no relative positions: it takes a bias, but that would need an entry for all [B, H, N, N]
pairs. Documents cost cuDNN a bias of [B, 1, N, N]; in jax 0.10 the backward pass
computes its gradient too, of [B, H, N, N] bfloat16, one layer at a time (jax-ml/jax pull request
39512 ends that). Kernels know nothing of meshes: they run inside shard_map, each device on its own
rows and heads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model.attention import repeat_heads
from retro_jax.model.positions import Positions, decoder_positions, kinds_with_kernel
from retro_jax.sharding import Shardings

PLATFORMS = ("gpu", "tpu")
_MOST_RELATIVE = 4096  # tokens whose gradients by keys, values and R fit into a chip's memory
_FIRST_CAPABILITY = 8  # the major number that cuDNN's attention begins with; AMD's have none
_LANES = 128  # a TPU's vector: splash attention's blocks are multiples of it


def attention_kind(
    execution: ExecutionConfig, *, platform: str, positions: Positions, head_dim: int, length: int
) -> str:
    """Which attention a program runs: "plain", "chunked" or "fused".

    Args:
      execution: its `attention` and `activation_dtype`; "auto" takes the kernel where there is one.
      platform: that the program is for. positions, head_dim: the attention's. length: N.

    Raises:
      UserError: a kernel was asked for that does not exist here; why, and those that exist.
    """
    if execution.attention not in ("auto", "fused"):
        return execution.attention
    obstacle = _obstacle(platform, execution.activation_dtype, positions, head_dim, length)
    if obstacle is None:
        return "fused"
    if execution.attention == "auto":
        return "chunked"
    raise UserError(
        f"ExecutionConfig.attention is 'fused', but {obstacle}: expected 'auto', 'chunked' or 'plain'"
    )


def check_attention(
    config: RetroConfig, execution: ExecutionConfig, *, platform: str, length: int
) -> None:
    """Refuses, before anything runs, an attention kind that does not exist on a platform.

    Raises:
      UserError: as `attention_kind` does.
    """
    attention_kind(
        execution,
        platform=platform,
        positions=decoder_positions(config),
        head_dim=config.head_dim,
        length=length,
    )


def fused_attention(
    query_BxNxHxW: jax.Array,
    key_BxNxHxW: jax.Array,
    value_BxNxHxW: jax.Array,
    segments_BxN: jax.Array | None,
    *,
    platform: str,
    relative: tuple[jax.Array, jax.Array] | None = None,
    shardings: Shardings = Shardings(),
) -> jax.Array:
    """Causal attention inside segments.

    Args:
      query_BxNxHxW, key_BxNxHxW, value_BxNxHxW: turned by their positions; keys and values may have
        fewer heads.
      segments_BxN: int32, the document of each token, or None for one a row.
      relative: queries and table of `Attention.for_kernel`, of relative positions; None for others.
      platform: one of PLATFORMS. shardings: how batch and heads are split on a mesh.

    Returns:
      [B, N, H, W] in the queries' dtype.
    """
    kernel: Callable[..., jax.Array] = cudnn_attention if platform == "gpu" else splash_attention
    key_BxNxHxW, value_BxNxHxW = (
        repeat_heads(x, query_BxNxHxW.shape[-2]) for x in (key_BxNxHxW, value_BxNxHxW)
    )
    arrays: tuple[jax.Array | None, ...] = (
        query_BxNxHxW,
        key_BxNxHxW,
        value_BxNxHxW,
        segments_BxN,
    )
    if relative is not None:
        kernel, arrays = relative_kernel_attention, (*arrays, *relative)
    if not shardings.active:
        return kernel(*arrays)
    heads, rows = shardings.heads(4), shardings.rows(2)
    in_specs: tuple[PartitionSpec | None, ...] = (heads, heads, heads, rows)
    if segments_BxN is None:
        in_specs = (heads, heads, heads, None)
    if relative is not None:
        by_head = None if heads is None else PartitionSpec(None, heads[2], None)
        in_specs = (*in_specs, heads, by_head)
    local = jax.shard_map(kernel, in_specs=in_specs, out_specs=heads, check_vma=False)
    return local(*arrays)


def cudnn_attention(
    query_BxNxHxW: jax.Array,
    key_BxNxHxW: jax.Array,
    value_BxNxHxW: jax.Array,
    segments_BxN: jax.Array | None,
    implementation: Any = "cudnn",
) -> jax.Array:
    """`fused_attention` of one GPU; implementation "xla" computes the same anywhere."""
    mask_Bx1xNxN = None
    if segments_BxN is not None:
        mask_Bx1xNxN = (segments_BxN[:, :, None] == segments_BxN[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        query_BxNxHxW,
        key_BxNxHxW,
        value_BxNxHxW,
        mask=mask_Bx1xNxN,
        is_causal=True,
        implementation=implementation,
    )


def splash_attention(
    query_BxNxHxW: jax.Array,
    key_BxNxHxW: jax.Array,
    value_BxNxHxW: jax.Array,
    segments_BxN: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """`fused_attention` of one TPU core; interpret=True computes the same anywhere, slowly."""
    # Imported here: Pallas takes a second, and most runs have no use for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, head_dim = query_BxNxHxW.shape[1:]
    block = next(size for size in (512, 256, _LANES) if length % size == 0)
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    if segments_BxN is not None:
        segments_BxN = segments_BxN.astype(jnp.int32)

    def row(
        query_HxNxW: jax.Array,
        key_HxNxW: jax.Array,
        value_HxNxW: jax.Array,
        segments_N: jax.Array | None,
    ) -> jax.Array:
        ids = None if segments_N is None else splash.SegmentIds(segments_N, segments_N)
        return kernel(query_HxNxW, key_HxNxW, value_HxNxW, segment_ids=ids)

    scaled_BxNxHxW = (query_BxNxHxW / math.sqrt(head_dim)).astype(query_BxNxHxW.dtype)
    query_BxHxNxW, key_BxHxNxW, value_BxHxNxW = (
        jnp.swapaxes(x, 1, 2) for x in (scaled_BxNxHxW, key_BxNxHxW, value_BxNxHxW)
    )
    heads_BxHxNxW = jax.vmap(row)(query_BxHxNxW, key_BxHxNxW, value_BxHxNxW, segments_BxN)
    return jnp.swapaxes(heads_BxHxNxW, 1, 2)


def relative_kernel_attention(
    query_BxNxHxW: jax.Array,
    key_BxNxHxW: jax.Array,
    value_BxNxHxW: jax.Array,
    segments_BxN: jax.Array | None,
    position_BxNxHxW: jax.Array,
    table_QxHxW: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """`fused_attention` with relative positions of one TPU core; interpret=True runs anywhere, slowly.

    Args:
      position_BxNxHxW, table_QxHxW: queries and table of `Attention.for_kernel`.
    """
    from retro_jax.model.relative_kernel import relative_attention  # Pallas, as above

    batch, length, _, head_dim = query_BxNxHxW.shape
    if segments_BxN is None:
        segments_BxN = jnp.zeros((batch, length), jnp.int32)
    content_BxNxHxW, scaled_BxNxHxW = (
        (x / math.sqrt(head_dim)).astype(x.dtype) for x in (query_BxNxHxW, position_BxNxHxW)
    )
    content, position, key, value = (
        jnp.swapaxes(x, 1, 2) for x in (content_BxNxHxW, scaled_BxNxHxW, key_BxNxHxW, value_BxNxHxW)
    )
    block = table_QxHxW.shape[0] - length
    table_HxQxW = jnp.swapaxes(table_QxHxW, 0, 1)
    heads_BxHxNxW = relative_attention(
        content, position, key, value, table_HxQxW, segments_BxN, block, interpret
    )
    return jnp.swapaxes(heads_BxHxNxW, 1, 2)


def relative_block(length: int) -> int:
    """Queries and keys in a block of the kernel for relative positions."""
    return next(size for size in (256, _LANES, 1) if length % size == 0)


def _gpu_without_kernel() -> str:
    """The GPU of this process if cuDNN's attention does not run on it; empty else, and without a GPU."""
    if jax.default_backend() != "gpu":  # the program is for devices that are not here
        return ""
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    if major.isdecimal() and int(major) >= _FIRST_CAPABILITY:
        return ""
    return f"{device.device_kind} ({capability or 'of none'})"


def _obstacle(
    platform: str, dtype: str, positions: Positions, head_dim: int, length: int
) -> str | None:
    """Why there is no kernel, in words; None if there is one."""
    if platform not in PLATFORMS:
        return f"{platform} has no fused kernel ({' and '.join(PLATFORMS)} have)"
    if platform not in positions.kernels:
        kinds = " and ".join(map(repr, kinds_with_kernel(platform)))
        return f"no fused kernel of a {platform} has {positions.name} positions ({kinds} has one)"
    if platform == "gpu" and (gpu := _gpu_without_kernel()):
        return f"cuDNN's kernel needs an NVIDIA GPU of compute capability 8.0 (Ampere) and this is {gpu}"
    if platform == "gpu" and dtype != "bfloat16":
        return f"cuDNN's kernel computes in bfloat16 and activation_dtype is {dtype!r}"
    if platform == "gpu" and (head_dim > 128 or head_dim % 8):
        return f"cuDNN's kernel has heads of a multiple of 8 up to 128 and head_dim is {head_dim}"
    if platform == "tpu" and length % _LANES:
        return f"splash attention has sequences of a multiple of {_LANES} and this one has {length}"
    if positions.name == "relative" and (length > _MOST_RELATIVE or head_dim > _LANES):
        return (
            f"the kernel for relative positions has up to {_MOST_RELATIVE} tokens and heads of up to "
            f"{_LANES}, and here they are {length} and {head_dim}"
        )
    return None
