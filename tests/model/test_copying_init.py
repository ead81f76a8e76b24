"""A model that begins with copying: it copies at once, and nothing else is changed."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from retro_jax.batch import RetroBatch
from retro_jax.config import DecoderForm, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.model.copying_init import begin_with_copying
from retro_jax.model.ending_init import begin_with_endings
from retro_jax.sharding import MESH_SHARDINGS, MeshConfig, make_mesh
from retro_jax.train.loop import TrainConfig
from retro_jax.train.parameter_names import named_leaves
from tests.model.test_layers import parameters
from tests.model.tiny import token_losses, with_neighbours

_CONFIG = RetroConfig(
    vocab_size=400,
    d_model=64,
    num_layers=3,
    num_heads=2,
    head_dim=32,
    d_ff=64,
    cca_layers=(2, 3),
    chunk_length=8,
    neighbour_length=16,
    encoder_d_model=64,
    encoder_num_layers=2,
    encoder_num_heads=3,
    encoder_head_dim=32,
    encoder_d_ff=64,
    share_embeddings=True,
)
# An encoder with an embedding of its own.
_OWN = dataclasses.replace(_CONFIG, share_embeddings=False)
_ATTENTION = ("query_key_value", "output", "relative", "position_bias")
_SET = {
    *(f"encoder.layers.attention.{name}" for name in _ATTENTION),
    "cca.attention.query",
    "cca.attention.key_value",
    "cca.attention.relative",
    "cca.attention.output",
}


@pytest.fixture(scope="module")
def random() -> Retro:
    """A model of random values."""
    return Retro(_CONFIG, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def copying() -> Retro:
    """The same, set up to copy."""
    model = Retro(_CONFIG, rngs=nnx.Rngs(3))
    begin_with_copying(model)
    return model


@pytest.fixture(scope="module")
def endings() -> Retro:
    """The same, set up to copy what follows the same last tokens, from neighbours and the text so far."""
    model = Retro(_CONFIG, rngs=nnx.Rngs(3))
    begin_with_endings(model, neighbours=True, text=True)
    return model


def _batch() -> tuple[RetroBatch, np.ndarray]:
    """Sequences of distinct tokens, the first neighbour of each chunk holding the next chunk.

    Also gives which losses [B, N] that can help: those from the first chunk's last token on.
    """
    rng = np.random.default_rng(0)
    m, r = _CONFIG.chunk_length, _CONFIG.neighbour_length
    text = np.stack([rng.permutation(np.arange(1, 200))[: 4 * m + r] for _ in range(3)])
    neighbours = rng.integers(200, 400, (3, 4, 2, r))
    for chunk in range(4):
        start = chunk * m + m - 3
        neighbours[:, chunk, 0] = text[:, start : start + r]
    helped = np.zeros((3, 4 * m), bool)
    helped[:, m - 1 :] = True
    return RetroBatch(
        tokens=text[:, : 4 * m].astype(np.int32),
        targets=text[:, 1 : 4 * m + 1].astype(np.int32),
        documents=np.zeros((3, 4), np.int32),
        corpus=np.zeros(3, np.int32),
        neighbours=neighbours.astype(np.int32),
    ), helped


def test_it_copies_what_follows_the_same_token_in_a_neighbour(random, copying):
    batch, helped = _batch()
    gains = {}
    for name, model in {"random": random, "copying": copying}.items():
        on = token_losses(model, batch)
        off = token_losses(model, with_neighbours(batch, None))
        gains[name] = (off - on)[helped].mean()
        np.testing.assert_array_equal(on[~helped], off[~helped])
    assert gains["copying"] > 2.0 > 10 * abs(gains["random"])


def test_it_copies_from_any_slot_and_not_from_the_tokens_alone(copying):
    batch, helped = _batch()
    swapped = with_neighbours(batch, batch.neighbours[:, :, ::-1])
    shuffled = with_neighbours(
        batch, np.random.default_rng(1).permuted(batch.neighbours[:, :, :1], axis=-1)
    )
    aligned = token_losses(copying, batch)[helped].mean()
    np.testing.assert_allclose(token_losses(copying, swapped)[helped].mean(), aligned, rtol=1e-5)
    assert token_losses(copying, shuffled)[helped].mean() > aligned + 1.0


def _begin_with_both(model: Retro) -> None:
    """Endings, in the neighbours and in the text."""
    begin_with_endings(model, neighbours=True, text=True)


def _ambiguous() -> tuple[RetroBatch, np.ndarray]:
    """Three common tokens alternate with rare ones, as `.` and `(` in code; a common one tells nothing.

    Also gives the losses [B, N] of rare tokens that one neighbour of the chunk has after the same last
    two tokens. The other has other rare tokens, so that each common one has many followers.
    """
    batch, helped = _batch()
    rng, m, r = np.random.default_rng(2), _CONFIG.chunk_length, _CONFIG.neighbour_length
    text = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    text[:, ::2] = 1 + text[:, ::2] % 3
    neighbours = batch.neighbours.copy()
    for start in range(m - 3, text.shape[1] - r, m):
        chunk = start // m
        neighbours[:, chunk, 0] = neighbours[:, chunk, 1] = text[:, start : start + r]
        neighbours[:, chunk, 1, start % 2 :: 2] = rng.integers(200, 400, (len(text), r // 2))
    helped &= np.arange(helped.shape[1]) % 2 == 0
    helped[:, -r:] = False
    tokens, targets = text[:, :-1], text[:, 1:]
    return dataclasses.replace(batch, tokens=tokens, targets=targets, neighbours=neighbours), helped


def test_endings_tell_what_one_token_cannot(copying, endings):
    batch, helped = _ambiguous()
    losses = {}
    for name, model in {"one token": copying, "endings": endings}.items():
        losses[name] = token_losses(model, batch)[helped].mean()
    assert losses["endings"] < losses["one token"] - 1.0
    off = token_losses(endings, with_neighbours(batch, None))[helped].mean()
    assert losses["endings"] < off - 2.0
    swapped = token_losses(endings, with_neighbours(batch, batch.neighbours[:, :, ::-1]))
    np.testing.assert_allclose(swapped[helped].mean(), losses["endings"], rtol=1e-4)


def test_a_baseline_copies_from_the_text_so_far_as_its_retro_does(endings):
    """And is the same decoder: what reads neighbours is beside it."""
    baseline = Retro(_CONFIG.baseline(), rngs=nnx.Rngs(3))
    begin_with_endings(baseline, neighbours=True, text=True)
    wanted = parameters(endings)
    for path, value in parameters(baseline).items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)
    batch, _ = _batch()
    tokens = np.concatenate([batch.tokens[:, :16], batch.tokens[:, :16]], axis=1)
    text = dataclasses.replace(
        batch, tokens=tokens, targets=np.roll(tokens, -1, axis=1), neighbours=None
    )
    losses = token_losses(baseline, text)
    assert losses[:, 17:].mean() < losses[:, :15].mean() - 2.0


def test_endings_set_the_first_layers_alone(random, endings):
    before, after = parameters(random), parameters(endings)
    decoder = {f"layers.attention.{name}" for name in _ATTENTION}
    assert {p for p in before if not np.array_equal(before[p], after[p])} == _SET | decoder
    for path in decoder:
        np.testing.assert_array_equal(before[path][2:], after[path][2:], err_msg=path)


def test_nothing_but_the_first_heads_is_set(random, copying):
    before, after = parameters(random), parameters(copying)
    assert {path for path in before if not np.array_equal(before[path], after[path])} == _SET
    output = "encoder.layers.attention.output"  # [L, H, head_dim, D]
    np.testing.assert_array_equal(before[output][1], after[output][1])
    np.testing.assert_array_equal(before[output][0, 1:], after[output][0, 1:])
    query = "cca.attention.query"  # [P, D, H, head_dim]
    np.testing.assert_array_equal(before[query][:, :, 1:], after[query][:, :, 1:])


@pytest.mark.parametrize("begin", [begin_with_copying, _begin_with_both])
def test_an_embedding_of_its_own_begins_as_the_decoders(begin):
    """So that the same values copy, whether the embeddings are shared or not."""
    own = Retro(_OWN, rngs=nnx.Rngs(3))
    begin(own)
    shared = Retro(_CONFIG, rngs=nnx.Rngs(4))
    for path, value in parameters(own).items():
        if path != "encoder.embedding.table":
            parameter = functools.reduce(getattr, path.split("."), shared)
            parameter[...] = value
    batch, helped = _batch()
    losses = token_losses(own, batch)
    np.testing.assert_array_equal(losses, token_losses(shared, batch))
    off = token_losses(own, with_neighbours(batch, None))
    assert (off - losses)[helped].mean() > 2.0


def test_a_mesh_begins_with_the_same_values(copying, endings):
    """Drawn in parts, and split as any other model's afterwards."""

    @jax.jit
    def make() -> Any:
        models = [Retro(_CONFIG, shardings=MESH_SHARDINGS, rngs=nnx.Rngs(3)) for _ in range(2)]
        begin_with_copying(models[0])
        begin_with_endings(models[1], neighbours=True, text=True)
        return [nnx.state(model) for model in models]

    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        states = make()
    for params, model in zip(states, (copying, endings), strict=True):
        assert params.cca.attention.query[...].sharding.spec == P(None, "fsdp", "tensor", None)
        wanted = named_leaves(nnx.state(model))
        for name, value in named_leaves(params).items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_baseline_is_left_alone():
    model = Retro(_CONFIG.baseline(), rngs=nnx.Rngs(3))
    before = parameters(model)
    begin_with_copying(model)
    for path, value in parameters(model).items():
        np.testing.assert_array_equal(before[path], value)


@pytest.mark.parametrize(
    ("field", "value", "needed"),
    [
        ("encoder_d_model", 32, "64"),
        ("positions", "rotary", "'relative'"),
        ("encoder_head_dim", 16, "32"),
    ],
)
def test_a_model_that_cannot_copy_is_refused(field, value, needed):
    config = dataclasses.replace(_OWN, **{field: value})
    model = nnx.eval_shape(lambda: Retro(config, rngs=nnx.Rngs(0)))
    message = rf"^TrainConfig.initial_retrieval is 'copying' and RetroConfig.{field} is .*: expected {needed}"
    with pytest.raises(UserError, match=message):
        begin_with_copying(model)


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"encoder_d_model": 32}, "64"),
        ({"tie_embeddings": False}, "True"),
        ({"positions": "rotary"}, "'relative'"),
        ({"encoder_num_heads": 1}, "2 at least"),
        ({"form": DecoderForm(norm="layer")}, "the paper's"),
        ({"num_layers": 1, "cca_layers": (1,)}, "2 at least"),
    ],
)
def test_a_model_that_cannot_begin_with_endings_is_refused(change, needed):
    config = dataclasses.replace(_OWN, **change)
    model = nnx.eval_shape(lambda: Retro(config, rngs=nnx.Rngs(0)))
    field = next(iter(change))
    named = "initial_attention" if field == "num_layers" else "initial_retrieval"
    message = rf"^TrainConfig.{named} is 'endings' and RetroConfig.{field} is .*: expected {needed}"
    with pytest.raises(UserError, match=message):
        begin_with_endings(model, neighbours=True, text=field == "num_layers")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial_retrieval": "copy"}, "initial_retrieval is 'copy': expected one of"),
        ({"initial_attention": "copying"}, "initial_attention is 'copying': expected one of"),
        (
            {"initial_retrieval": "copying", "initial_attention": "endings"},
            "initial_attention is 'endings': expected 'random' with",
        ),
    ],
)
def test_another_way_to_begin_is_refused(fields, message):
    with pytest.raises(UserError, match=rf"^TrainConfig.{message}"):
        TrainConfig(steps=1, **fields)
