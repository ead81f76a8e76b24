"""Where every parameter lies, that no mesh changes the numbers, and that programs stay small."""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from retro_jax.config import PRESETS, ExecutionConfig, RetroConfig
from retro_jax.costs.step_report import lower
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.model.loss import read_out
from retro_jax.sharding import (
    MESH_SHARDINGS,
    MeshConfig,
    abstract_parameters,
    batch_sharding,
    check_mesh,
    make_mesh,
    parameter_shardings,
    parameter_specs,
)
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.loop import TrainConfig
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.plan import Settings, make_plan
from tests.model.tiny import TINY, assert_close, make_batch, make_model

# Divisible by every mesh below: 8 ways of fsdp, 4 ways of tensor.
CONFIG = RetroConfig(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    num_heads=4,
    head_dim=4,
    d_ff=24,
    cca_layers=(2, 3),
    chunk_length=4,
    neighbour_length=8,
    encoder_d_model=8,
    encoder_num_layers=1,
    encoder_num_heads=4,
    encoder_head_dim=4,
    encoder_d_ff=12,
    min_shared_tokens=0.2,  # one of a chunk's four
)
# All loops: over layers, over blocks of attention in spans, over blocks of the loss.
LOOPS = ExecutionConfig(remat="full", attention="chunked", attention_block=2, loss_block=8)

T, F = "tensor", "fsdp"
GOLDEN = {
    # the leading axis of what is stacked is the layer
    "embedding.table": P(T, F),
    "layers.attention.norm.scale": P(None, None),
    "layers.attention.query_key_value": P(None, F, None, T, None),
    "layers.attention.relative": P(None, F, T, None),
    "layers.attention.content_bias": P(None, T, None),
    "layers.attention.position_bias": P(None, T, None),
    "layers.attention.output": P(None, T, None, F),
    "layers.feed_forward.norm.scale": P(None, None),
    "layers.feed_forward.widen": P(None, F, T),
    "layers.feed_forward.narrow": P(None, T, F),
    "cca.attention.norm.scale": P(None, None),
    "cca.attention.query": P(None, F, T, None),
    "cca.attention.key_value": P(None, F, None, T, None),
    "cca.attention.relative": P(None, F, T, None),
    "cca.attention.content_bias": P(None, T, None),
    "cca.attention.position_bias": P(None, T, None),
    "cca.attention.output": P(None, T, None, F),
    "encoder.embedding.table": P(T, F),
    "encoder.layers.attention.norm.scale": P(None, None),
    "encoder.layers.attention.query_key_value": P(None, F, None, T, None),
    "encoder.layers.attention.relative": P(None, F, T, None),
    "encoder.layers.attention.content_bias": P(None, T, None),
    "encoder.layers.attention.position_bias": P(None, T, None),
    "encoder.layers.attention.output": P(None, T, None, F),
    "encoder.layers.feed_forward.norm.scale": P(None, None),
    "encoder.layers.feed_forward.widen": P(None, F, T),
    "encoder.layers.feed_forward.narrow": P(None, T, F),
    "encoder.cross_attention.norm.scale": P(None, None),
    "encoder.cross_attention.query": P(None, F, T, None),
    "encoder.cross_attention.key_value": P(None, F, None, T, None),
    "encoder.cross_attention.relative": P(None, F, T, None),
    "encoder.cross_attention.content_bias": P(None, T, None),
    "encoder.cross_attention.position_bias": P(None, T, None),
    "encoder.cross_attention.output": P(None, T, None, F),
    "encoder.norm.scale": P(None),
    "norm.scale": P(None),
    "read_out": P(T, F),
}


def abstract(config: RetroConfig) -> Any:
    """A Retro's parameters as shapes."""
    return abstract_parameters(lambda: Retro(config, rngs=nnx.Rngs(0)))[1]


def test_every_parameter_lies_where_it_should():
    """Heads, feed-forward and vocabulary over tensor, the model's width over fsdp."""
    specs = parameter_specs(abstract(dataclasses.replace(CONFIG, tie_embeddings=False)))
    assert named_leaves(specs) == GOLDEN


@pytest.mark.parametrize(
    ("mesh_config", "matrices", "biases"),
    [
        (MeshConfig(data=8), 1, 1),
        (MeshConfig(fsdp=8), 8, 1),
        (MeshConfig(data=2, tensor=4), 4, 4),
        (MeshConfig(data=2, fsdp=2, tensor=2), 4, 2),
    ],
    ids=str,
)
def test_every_strategy_splits_parameters_into_as_many_parts(mesh_config, matrices, biases):
    """Replicated by data, split by fsdp and by tensor; norms' scales lie whole on every device."""
    params = abstract(CONFIG)
    places = named_leaves(parameter_shardings(params, make_mesh(mesh_config)))
    for name, leaf in named_leaves(params).items():
        parts = leaf.size // math.prod(places[name].shard_shape(leaf.shape))
        wanted = 1 if name.endswith("scale") else biases if name.endswith("bias") else matrices
        assert parts == wanted, name


def losses_and_gradient(
    model: Retro, batch: Any, key: jax.Array | None = None, texts: list[str] | None = None
) -> tuple[np.ndarray, Any]:
    """Token losses, with dropout if there is a key, and the gradient of their sum.

    Args:
      texts: is added the compiled program.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def compute(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            losses = nnx.merge(graph, params).token_losses(batch, key)
            return losses.sum(), losses

        return jax.grad(loss, has_aux=True)(params)

    compiled = compute.lower(params, batch).compile()
    if texts is not None:
        texts.append(compiled.as_text())
    gradient, losses = compiled(params, batch)
    return losses, gradient


@functools.cache
def one_device() -> tuple[np.ndarray, Any]:
    """What every mesh has to give: without any mesh, and without any loop."""
    plain = ExecutionConfig(attention="plain", loss_block=0)
    losses, gradient = losses_and_gradient(make_model(CONFIG, plain), example())
    return np.asarray(losses), jax.tree.map(np.asarray, gradient)


def example() -> Any:
    """Eight rows with documents that end inside of them, and padding."""
    return make_batch(CONFIG, rows=8, documents=True, padding=True)


@pytest.mark.parametrize(
    "mesh_config",
    [
        MeshConfig(fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_eight_devices_compute_what_one_does(mesh_config):
    """Losses and the gradient by every parameter, which ends where the parameter lies."""
    mesh = make_mesh(mesh_config)
    plain = make_model(CONFIG, LOOPS)
    graph, _ = abstract_parameters(
        lambda: Retro(CONFIG, LOOPS, shardings=MESH_SHARDINGS, rngs=nnx.Rngs(0))
    )
    params = nnx.state(plain)
    shardings = parameter_shardings(params, mesh)
    model = nnx.merge(graph, jax.tree.map(jax.device_put, params, shardings))
    batch = jax.device_put(example(), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        losses, gradient = losses_and_gradient(model, batch)
    wanted_losses, wanted_gradient = one_device()
    assert_close(np.asarray(losses), wanted_losses)
    named, wanted = named_leaves(gradient), named_leaves(wanted_gradient)
    places = named_leaves(shardings)
    assert named.keys() == wanted.keys()
    for name, leaf in named.items():
        assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim), name
        assert_close(np.asarray(leaf), wanted[name])


def test_each_device_draws_its_part_of_parameters(monkeypatch):
    """The values of one device, and no draw that is not split; dropout too drops the same.

    No program has an array of a parameter's whole shape, nor of a dropout mask's of the whole batch.
    """
    config = dataclasses.replace(CONFIG, dropout=0.25, tie_embeddings=False)
    mesh, key = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), jax.random.key(3)
    wanted = Retro(config, rngs=nnx.Rngs(5))
    wanted_losses, _ = losses_and_gradient(wanted, example(), key)

    split: dict[str, list[bool]] = {"normal": [], "bernoulli": []}

    def recorded(name: str) -> Any:
        draw = getattr(jax.random, name)

        def record(*args: Any, **kwargs: Any) -> jax.Array:
            # Not a whole mask that is cut afterwards: the draw itself has to know its sharding.
            value = draw(*args, **kwargs)
            split[name].append(any(axis is not None for axis in jax.typeof(value).sharding.spec))
            return value

        return record

    @jax.jit
    def make() -> Any:
        return nnx.state(Retro(config, shardings=MESH_SHARDINGS, rngs=nnx.Rngs(5)))

    graph, _ = abstract_parameters(
        lambda: Retro(config, shardings=MESH_SHARDINGS, rngs=nnx.Rngs(5))
    )
    for name in split:
        monkeypatch.setattr(jax.random, name, recorded(name))
    with jax.set_mesh(mesh):
        compiled = make.lower().compile()
        texts, params = [compiled.as_text()], compiled()
        batch = jax.device_put(example(), batch_sharding(mesh))
        losses, _ = losses_and_gradient(nnx.merge(graph, params), batch, key, texts)
    assert all(draws and all(draws) for draws in split.values())
    # Stacks of three layers are split everywhere; others may have the shape of some activations.
    whole = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 3 and len(leaf) == 3}
    whole |= {(8, 16, 16), (8, 4, 2, 8, 8)}  # the decoder's masks [B, N, D], the encoder's
    for text in texts:
        assert not [shape for shape in whole if f"[{','.join(map(str, shape))}]" in text]
    values = named_leaves(nnx.state(wanted))
    for name, value in named_leaves(params).items():
        np.testing.assert_allclose(value, values[name], rtol=1e-6, err_msg=name)
    assert_close(np.asarray(losses), np.asarray(wanted_losses))


def test_the_vocabulary_is_split_in_embedding_and_loss():
    """No device ever has the logits of the whole vocabulary, nor all of the table."""
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    graph, params = abstract_parameters(
        lambda: Retro(CONFIG, shardings=MESH_SHARDINGS, rngs=nnx.Rngs(0))
    )
    table = named_leaves(parameter_shardings(params, mesh))["embedding.table"]
    assert table.shard_shape((32, 16)) == (8, 16)
    layout = nnx.merge(graph, params).layout

    def spec(h: jax.Array, table: jax.Array) -> jax.Array:
        logits = read_out(h, table, layout)
        assert jax.typeof(logits).sharding.spec == P(("data", "fsdp"), None, "tensor")
        return logits

    h = jax.ShapeDtypeStruct((8, 16, 16), jnp.float32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        jax.eval_shape(spec, h, jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=table))


@pytest.mark.parametrize(
    ("config", "mesh_config", "message"),
    [
        (
            {"num_heads": 6},
            MeshConfig(tensor=4),
            "num_heads 6 .* tensor=4: expected a divisor of 6",
        ),
        ({"d_ff": 30}, MeshConfig(tensor=4), "d_ff 30 cannot be split over mesh axis tensor=4"),
        ({"vocab_size": 33}, MeshConfig(tensor=2), "vocab_size 33 .* tensor=2"),
        ({"d_model": 12}, MeshConfig(fsdp=8), "d_model 12 .* fsdp=8: expected a divisor of 12"),
        ({"encoder_d_model": 12}, MeshConfig(fsdp=8), "encoder_d_model 12 .* fsdp=8"),
        ({"encoder_num_heads": 6}, MeshConfig(tensor=4), "encoder_num_heads 6 .* tensor=4"),
        ({"encoder_d_ff": 30}, MeshConfig(tensor=4), "encoder_d_ff 30 .* tensor=4"),
        ({}, MeshConfig(fsdp=4), "batch size 20 cannot be split over data x fsdp = 8"),
    ],
)
def test_a_mesh_that_divides_not_is_refused(config, mesh_config, message):
    mesh = make_mesh(mesh_config)
    with pytest.raises(UserError, match=message):
        check_mesh(dataclasses.replace(CONFIG, **config), mesh, batch_size=20)


def test_the_baseline_need_not_divide_an_encoder():
    config = dataclasses.replace(CONFIG, encoder_num_heads=3, encoder_d_model=10, encoder_d_ff=7)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    check_mesh(config.baseline(), mesh, batch_size=16)
    with pytest.raises(UserError, match="encoder_num_heads 3"):
        check_mesh(config, mesh, batch_size=16)


def test_a_mesh_needs_as_many_devices_as_its_axes_make():
    message = (
        "mesh data=-1 fsdp=3 tensor=1 does not fit 8 devices: expected axes whose product is 8"
    )
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(UserError, match="data=2 fsdp=2 tensor=1 does not fit 8 devices"):
        make_mesh(MeshConfig(data=2, fsdp=2))
    with pytest.raises(
        UserError, match=r"MeshConfig.data is 0: expected a positive integer, or -1"
    ):
        MeshConfig(data=0)


def test_large_parameters_on_every_device_are_logged(caplog):
    """Over 1 MB and nowhere split: named with shape and size; small or split ones are not."""
    wide = dataclasses.replace(CONFIG, vocab_size=8192, d_model=64)
    params = abstract(wide)
    with caplog.at_level(logging.WARNING):
        parameter_shardings(params, make_mesh(MeshConfig(fsdp=8)))
        assert not caplog.records
        parameter_shardings(params, make_mesh(MeshConfig(data=8)))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "['embedding']['table']" in line
    assert "(8192, 64) (2.1 MB) is replicated on every device" in line


def test_the_largest_program_is_hardly_larger_than_the_smallest():
    """7.5B against 172M, the whole train step as it is lowered; depth and width cost no program."""
    execution = ExecutionConfig(activation_dtype="bfloat16", remat="full")
    mesh, training = MeshConfig(data=2, fsdp=2, tensor=2), TrainConfig(steps=1000)
    sizes = {}
    for name in ("172m", "7.5b"):
        settings = Settings(retro=PRESETS[name], execution=execution, training=training, mesh=mesh)
        sizes[name] = len(lower(make_plan(settings, BatchShape(batch_size=8))).as_text())
    assert sizes["7.5b"] < 1.5 * sizes["172m"]


def test_memory_grows_with_the_sequence_and_not_with_its_square():
    """Temporaries of the compiled step, documents kept apart: 4 times the tokens, under 5 times."""
    config = dataclasses.replace(
        TINY,
        num_layers=1,
        cca_layers=(1,),
        encoder_num_layers=1,
        chunk_length=64,
        neighbour_length=16,
    )
    execution = ExecutionConfig(remat="full", attention="chunked")
    settings = Settings(retro=config, execution=execution, training=TrainConfig(steps=1000))
    sizes = []
    for length in (2048, 8192):
        plan = make_plan(settings, BatchShape(1, length), jax.devices()[:1])
        compiled = lower(plan).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert 0 < sizes[1] < 5 * sizes[0]
