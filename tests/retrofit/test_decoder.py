"""A base model as the library's decoder computes what transformers computes, on one device and on eight."""

import dataclasses

import jax
import numpy as np
import pytest

from retro_jax.config import ExecutionConfig
from retro_jax.errors import UserError
from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.decoder import check_decoder, decoder_config, load_decoder
from retro_jax.sharding import MeshConfig, batch_sharding, make_mesh
from retro_jax.train.parameter_names import named_leaves
from tests.retrofit.base_files import FOLDER, NAMES, write_gguf

SCAN = ExecutionConfig()
UNROLLED = ExecutionConfig(scan_layers=False, attention="chunked", attention_block=8)


def config_of(base, **fields):
    """Chunks that divide the reference's tokens."""
    return decoder_config(base.config, chunk_length=4, neighbour_length=8, **fields)


def expected(name):
    """Tokens [B, N] and transformers' logits of a multiple of four of them."""
    tokens = np.load(FOLDER / name / "tokens.npy")
    length = tokens.shape[1] // 4 * 4
    return tokens[:, :length], np.load(FOLDER / name / "logits.npy")[:, :length]


def assert_close(found, wanted):
    """Within 1e-4 of the largest."""
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("execution", [SCAN, UNROLLED], ids=["scan", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, execution):
    base = open_base(FOLDER / name)
    model = load_decoder(base, config_of(base), execution)
    tokens, wanted = expected(name)
    assert_close(jax.jit(lambda model, x: model(x))(model, tokens), wanted)
    count = sum(leaf.size for leaf in named_leaves(jax.tree.leaves(model)).values())
    assert count == model.config.num_parameters()


@pytest.mark.parametrize("execution", [SCAN, UNROLLED], ids=["scan", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_compute_the_same(name, execution):
    """Over all axes of the mesh; over two where one head of keys cannot be split."""
    base = open_base(FOLDER / name)
    shape = {"data": 2, "tensor": 2} if base.config.num_kv_heads % 2 == 0 else {"data": 4}
    mesh = make_mesh(MeshConfig(fsdp=2, **shape))
    model = load_decoder(base, config_of(base), execution, mesh=mesh)
    tokens, wanted = expected(name)
    rows = np.resize(np.arange(len(tokens)), 8)
    with jax.set_mesh(mesh):
        batch = jax.device_put(tokens[rows], batch_sharding(mesh))
        assert_close(jax.jit(lambda model, x: model(x))(model, batch), wanted[rows])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close(name):
    """In the mean square; parameters, norms and softmax stay float32."""
    base = open_base(FOLDER / name)
    model = load_decoder(base, config_of(base), ExecutionConfig(activation_dtype="bfloat16"))
    tokens, wanted = expected(name)
    found = np.asarray(jax.jit(lambda model, x: model(x))(model, tokens))
    assert 0 < np.square(found - wanted).mean() < 0.03**2 * np.square(wanted).mean()


def test_more_tokens_than_learned_positions_are_refused():
    base = open_base(FOLDER / "gpt2")
    model = load_decoder(base, config_of(base))
    with pytest.raises(UserError, match=r"tokens have shape \(1, 68\): expected at most 64, the"):
        model(np.ones((1, 68), np.int32))


def test_heads_of_keys_that_a_mesh_cannot_split_are_refused():
    base = open_base(FOLDER / "qwen3")
    with pytest.raises(UserError, match="num_kv_heads 1 cannot be split over mesh axis tensor=2"):
        load_decoder(base, config_of(base), mesh=make_mesh(MeshConfig(data=4, tensor=2)))


def test_a_gguf_file_gives_the_same_decoder(tmp_path):
    write_gguf("llama", tmp_path / "llama.gguf")
    base = open_base(tmp_path / "llama.gguf")
    tokens, wanted = expected("llama")
    assert_close(load_decoder(base, config_of(base))(tokens), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_ff": 44}, "RetroConfig.d_ff is 44: expected 40, that of .*llama"),
        ({"activation": "relu"}, "RetroConfig.activation is 'relu': expected 'silu'"),
    ],
)
def test_another_decoder_is_refused(change, message):
    base = open_base(FOLDER / "llama")
    with pytest.raises(UserError, match=message):
        check_decoder(config_of(base, **change), base)


def test_another_form_is_refused():
    base = open_base(FOLDER / "llama")
    config = config_of(base)
    form = dataclasses.replace(config.form, rotary_base=1e4)
    with pytest.raises(UserError, match=r"DecoderForm.rotary_base is 10000.0: expected 500000.0"):
        check_decoder(dataclasses.replace(config, form=form), base)
