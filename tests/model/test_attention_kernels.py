"""Fused kernels against the plain form, where this machine can run them, and which one is chosen."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import PRESETS, ExecutionConfig
from retro_jax.errors import UserError
from retro_jax.model import attention as ops
from retro_jax.model import attention_kernels as fused
from retro_jax.model import causal_attention as causal
from retro_jax.model.layers import Layout
from retro_jax.model.positions import Relative, Rotary, shift
from retro_jax.sharding import (
    MESH_SHARDINGS,
    MeshConfig,
    Shardings,
    make_mesh,
    target_platform,
)
from tests.model.tiny import TINY, assert_close

ROWS, LENGTH, HEADS, HEAD_DIM = 2, 256, 2, 64


def example() -> tuple[list[jax.Array], jax.Array]:
    """Queries, keys, values [B, N, H, head_dim]; documents that end inside and at ends of blocks."""
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH, HEADS, HEAD_DIM)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]
    ends = np.array([[64, 192], [128, 128]])
    segments = (np.arange(LENGTH) >= ends[:, :, None]).sum(axis=1)
    return arrays, jnp.asarray(segments, jnp.int32)


def plain(query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
    """Softmax over all [N, N] pairs, masked."""
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return ops.attend(query, key, value, mask)


def output_and_gradients(attend: Any, arrays: list[jax.Array], segments: Any) -> list[np.ndarray]:
    """The output and its gradients by queries, keys and values, for a random cotangent."""
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    @jax.jit
    def compute(*arrays: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments), *arrays)
        return [out, *pull(cotangent.astype(out.dtype))]

    return [np.asarray(x) for x in compute(*arrays)]


KERNELS = {
    "splash": lambda *args: fused.splash_attention(*args, interpret=True),
    "cudnn": lambda *args: fused.cudnn_attention(*args, implementation="xla"),
}


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_the_plain_form(name, documents):
    """Output and gradients; Pallas is interpreted, and cuDNN's place is taken by XLA."""
    arrays, segments = example()
    own = segments if documents else None
    wanted = output_and_gradients(plain, arrays, own)
    for actual, expected in zip(output_and_gradients(KERNELS[name], arrays, own), wanted):
        assert_close(actual, expected)


def plain_relative(
    content: Any, position: Any, key: Any, value: Any, table: Any, segments: Any
) -> jax.Array:
    """Softmax over all pairs; table: of all 2N - 1 distances."""
    length = content.shape[1]
    by_distance = jnp.einsum("bnhk,qhk->bhnq", position, table)
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return ops.attend(content, key, value, mask, shift(by_distance, length))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)], ids=["float32", "bfloat16"]
)
def test_the_kernel_for_relative_positions_is_the_plain_form(dtype, tolerance):
    """Output and gradients over four blocks a row, with and without documents, in its own dtype."""
    rng, length, block = np.random.default_rng(2), 32, 8
    shape = (ROWS, length, HEADS, 16)
    exact = [rng.normal(size=shape) for _ in range(4)] + [
        rng.normal(size=(2 * length - 1, HEADS, 16))
    ]
    rounded = [jnp.asarray(x, dtype) for x in exact]
    segments = jnp.asarray((np.arange(length) >= np.array([[10], [16]])).astype(np.int32))

    def kernel(*arrays: Any) -> jax.Array:
        content, position, key, value, table, documents = arrays
        return fused.relative_kernel_attention(
            content, key, value, documents, position, table[: length + block], interpret=True
        )

    for documents in (segments, None) if dtype == "float32" else (segments,):
        found = output_and_gradients(kernel, rounded, documents)
        inputs = [x.astype(jnp.float32) for x in rounded]
        for actual, wanted in zip(found, output_and_gradients(plain_relative, inputs, documents)):
            np.testing.assert_allclose(
                np.float32(actual), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
            )


def test_the_decoder_gives_the_kernel_its_queries_and_distances(monkeypatch):
    """The layer's own attention: by blocks of queries on a CPU, by the kernel on a TPU."""
    config = dataclasses.replace(TINY, positions="relative")
    layout = Layout(ExecutionConfig(attention="auto"), Shardings())
    widths = ops.Widths(query=16, key=16, num_heads=2, head_dim=8)
    attention = ops.Attention(
        config, widths, positions=Relative(), cross=False, layout=layout, rngs=nnx.Rngs(0)
    )
    for name in ("content_bias", "position_bias"):
        bias = getattr(attention, name)
        bias[...] = jnp.asarray(np.random.default_rng(4).normal(size=bias.shape), jnp.float32)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 128, 16)), jnp.float32)
    documents = jnp.asarray([[0, 0, 1, 1], [0, 1, 1, 1]], jnp.int32)
    wanted = causal.causal_attention(attention, x, documents, chunk_length=32)
    calls = []

    def interpreted(*arrays: Any) -> jax.Array:
        calls.append([array.shape for array in arrays])
        return kernel(*arrays, interpret=True)

    kernel = fused.relative_kernel_attention
    monkeypatch.setattr(fused, "relative_kernel_attention", interpreted)
    monkeypatch.setattr(causal, "target_platform", lambda: "tpu")
    found = causal.causal_attention(attention, x, documents, chunk_length=32)
    assert [shapes[-1] for shapes in calls] == [(128 + 128, 2, 8)]
    assert_close(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("documents", [True, False])
def test_on_a_mesh_each_device_runs_its_rows_and_heads(monkeypatch, documents):
    """Under explicit axes, by shard_map: the same numbers, sharded by batch and heads."""
    arrays, segments = example()
    wanted = np.asarray(plain(*arrays, segments if documents else None))
    shapes = []

    def kernel(query: jax.Array, *rest: Any) -> jax.Array:
        shapes.append(query.shape)
        return fused.cudnn_attention(query, *rest, implementation="xla")

    monkeypatch.setattr(fused, "splash_attention", kernel)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        heads, rows = MESH_SHARDINGS.heads(4), MESH_SHARDINGS.rows(2)
        placed = [jax.sharding.reshard(x, heads) for x in arrays]
        out = jax.jit(
            lambda *args: fused.fused_attention(*args, platform="tpu", shardings=MESH_SHARDINGS)
        )(*placed, jax.sharding.reshard(segments, rows) if documents else None)
    assert shapes == [(1, LENGTH, 1, HEAD_DIM)]
    assert out.sharding.spec == heads
    assert_close(np.asarray(out), wanted)


def kind(attention: str, platform: str, **changes: Any) -> str:
    """What runs of one published size with one change."""
    given = {"positions": Rotary(), "head_dim": 64, "length": 2048, "dtype": "bfloat16"} | changes
    execution = ExecutionConfig(attention=attention, activation_dtype=given.pop("dtype"))
    return fused.attention_kind(execution, platform=platform, **given)


def test_auto_takes_a_kernel_where_there_is_one():
    assert (kind("auto", "tpu"), kind("auto", "gpu"), kind("auto", "cpu")) == (
        "fused",
        "fused",
        "chunked",
    )
    assert kind("auto", "gpu", positions=Relative()) == "chunked"
    assert kind("auto", "tpu", positions=Relative()) == "fused"
    assert kind("auto", "tpu", positions=Relative(), length=8192) == "chunked"
    assert kind("auto", "gpu", dtype="float32") == "chunked"
    assert kind("auto", "tpu", length=192) == "chunked"
    assert (kind("plain", "tpu"), kind("chunked", "gpu"), kind("fused", "tpu")) == (
        "plain",
        "chunked",
        "fused",
    )


@pytest.mark.parametrize(
    ("platform", "changes", "message"),
    [
        ("cpu", {}, "cpu has no fused kernel"),
        ("gpu", {"positions": Relative()}, "no fused kernel of a gpu has relative positions"),
        ("tpu", {"positions": Relative(), "length": 8192}, "up to 4096 tokens and heads of up to"),
        ("gpu", {"dtype": "float32"}, "computes in bfloat16 and activation_dtype is 'float32'"),
        ("gpu", {"head_dim": 256}, "up to 128 and head_dim is 256"),
        ("gpu", {"head_dim": 20}, "multiple of 8 up to 128 and head_dim is 20"),
        ("tpu", {"length": 192}, "a multiple of 128 and this one has 192"),
    ],
)
def test_a_kernel_that_does_not_exist_is_refused_in_one_line(platform, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        kind("fused", platform, **changes)
    assert str(raised.value).startswith("ExecutionConfig.attention is 'fused', but ")
    assert str(raised.value).endswith(": expected 'auto', 'chunked' or 'plain'")


@pytest.mark.parametrize(
    ("capability", "name", "expected"),
    [
        ("9.0", "H100", "fused"),
        ("8.0", "A100", "fused"),
        ("7.5", "T4", ""),
        ("gfx90a", "MI250", ""),
    ],
)
def test_a_gpu_without_the_kernel_is_excluded(monkeypatch, capability, name, expected):
    device = types.SimpleNamespace(compute_capability=capability, device_kind=name)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kind("auto", "gpu") == (expected or "chunked")
    if not expected:
        with pytest.raises(
            UserError, match=rf"8\.0 \(Ampere\) and this is {name} \({capability}\)"
        ):
            kind("fused", "gpu")


def test_a_run_is_checked_before_it_begins():
    fused.check_attention(PRESETS["172m"], ExecutionConfig(), platform="cpu", length=2048)
    rotary = dataclasses.replace(PRESETS["172m"], positions="rotary")
    with pytest.raises(UserError, match="activation_dtype is 'float32'"):
        fused.check_attention(
            rotary, ExecutionConfig(attention="fused"), platform="gpu", length=2048
        )


def test_the_program_is_for_the_devices_of_the_mesh(monkeypatch):
    """Not for the process that traces it: compile_check describes chips that are not there."""
    assert target_platform() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert target_platform() == "gpu"
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert target_platform() == "cpu"
