"""Cached decoding equals the uncached forward pass at every position, whatever the shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.generate.decoder import Completed, Decoder, power_of_two
from retro_jax.model import Retro
from retro_jax.sharding import MESH_SHARDINGS, MeshConfig, make_mesh, parameter_shardings
from tests.generate.cached import K, Texts, cached, completed, make_texts, uncached, window
from tests.model.tiny import TINY, make_model
from tests.retrofit.test_fitting import config_of, loaded, with_gates

CHUNKS = 4
PROMPTS = [1, 6, 8]  # one token; inside the second chunk; at a chunk's end
ROTARY = dataclasses.replace(TINY, positions="rotary")
CONFIGS = {
    "relative": TINY,
    "rotary": ROTARY,
    "no positions in CCA": dataclasses.replace(TINY, cca_positions=False),
    "first layer, untied": dataclasses.replace(TINY, cca_layers=(1, 3), tie_embeddings=False),
    "pad past the vocabulary": dataclasses.replace(ROTARY, pad_id=30),
    "one embedding, no conditioning": dataclasses.replace(
        TINY, encoder_d_model=12, share_embeddings=True, encoder_cca_layers=()
    ),
}

# Heads, feed-forward and vocabulary in four parts, widths in two.
MESHED = RetroConfig(
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
)


def difference(model: Retro, texts: Texts, prompts: list[int] = PROMPTS, **how: Any) -> float:
    """The largest one between cached and uncached logits, over the largest logit."""
    wanted = uncached(model, texts)
    made = cached(model, texts, prompts, **how)
    read = np.arange(made.shape[1]) >= np.array(prompts)[:, None] - 1
    assert (np.isfinite(made).all(-1) == read).all()
    return float(np.abs(made - wanted)[read].max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_uncached_ones(name: str):
    texts = make_texts(CONFIGS[name], len(PROMPTS), CHUNKS, retrieval=True)
    model = make_model(CONFIGS[name])
    assert difference(model, texts) < 1e-5
    # The neighbours matter, or the equality would say little.
    off = uncached(model, dataclasses.replace(texts, neighbours=None))
    assert np.abs(off - uncached(model, texts)).max() > 0.01


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("retrieval", [True, False])
def test_a_scan_over_layers_gives_the_same(positions: str, retrieval: bool):
    config = dataclasses.replace(TINY, positions=positions)
    texts = make_texts(config, len(PROMPTS), CHUNKS, retrieval=retrieval)
    assert difference(make_model(config), texts, scan=True) < 1e-5


@pytest.mark.parametrize("config", [TINY, ROTARY.baseline()], ids=["off", "baseline"])
def test_without_retrieval(config: RetroConfig):
    texts = make_texts(config, len(PROMPTS), CHUNKS, retrieval=False)
    assert difference(make_model(config), texts) < 1e-5


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_bfloat16_is_as_near_to_float32_as_the_uncached_pass(positions: str):
    """Both round activations to 8 bits at the same places, but sum in another order.

    So neither is the truth: their errors against float32 are compared instead of their difference.
    """
    config = dataclasses.replace(TINY, positions=positions)
    texts = make_texts(config, len(PROMPTS), CHUNKS, retrieval=True)
    rounded = make_model(config, ExecutionConfig(activation_dtype="bfloat16"))
    truth = uncached(make_model(config), texts)
    made = cached(rounded, texts, PROMPTS)
    read = np.isfinite(made).all(-1)
    errors = [np.abs(logits - truth)[read] for logits in (made, uncached(rounded, texts))]
    assert errors[1].max() > 0
    assert errors[0].max() < 1.5 * errors[1].max()
    assert errors[0].mean() < 1.2 * errors[1].mean()


@pytest.mark.parametrize(
    ("axes", "positions"),
    [
        ((4, 1, 2), "relative"),
        ((2, 2, 2), "relative"),
        ((1, 1, 4), "rotary"),
        ((8, 1, 1), "rotary"),
    ],
)
def test_meshes(axes: tuple[int, int, int], positions: str):
    config = dataclasses.replace(MESHED, positions=positions)
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    with jax.set_mesh(mesh):
        model = on_mesh(config, mesh)
    texts = make_texts(config, len(PROMPTS), CHUNKS, retrieval=True)
    wanted = uncached(make_model(config), texts)
    made = cached(model, texts, PROMPTS, mesh=mesh)
    read = np.isfinite(made).all(-1)
    assert np.abs(made - wanted)[read].max() < 1e-5 * np.abs(wanted).max()


def on_mesh(config: RetroConfig, mesh: Any) -> Retro:
    """The weights of make_model(config), laid out on a mesh."""
    _, params = nnx.split(make_model(config))
    graph, _ = nnx.split(
        nnx.eval_shape(
            lambda: Retro(config, ExecutionConfig(), shardings=MESH_SHARDINGS, rngs=nnx.Rngs(0))
        )
    )
    return nnx.merge(graph, jax.device_put(params, parameter_shardings(params, mesh)))


def test_several_tokens_of_a_block_at_once():
    """As a draft is verified: logits after every token, for rows at other positions."""
    texts = make_texts(TINY, 2, CHUNKS, retrieval=True)
    model = make_model(TINY)
    decoder = Decoder(model, chunks=CHUNKS)
    prompts = [5, 8]
    logits, cache = decoder.prefill(
        [window(TINY, texts, row, end) for row, end in enumerate(prompts)],
        neighbours=K,
        capacity=16,
    )
    blocks = np.stack([texts.tokens[row, end : end + 2] for row, end in enumerate(prompts)])
    live = np.ones(2, bool)
    logits, _ = decoder.step(cache, blocks, np.array(prompts), live=live, all_logits=True)
    wanted = uncached(model, texts)
    for row, end in enumerate(prompts):
        np.testing.assert_allclose(logits[row], wanted[row, end : end + 2], atol=1e-5)


def test_a_step_copies_no_cache():
    """A donated cache is written in place: else every token would cost a copy of all keys."""
    decoder = Decoder(make_model(ROTARY), chunks=CHUNKS)
    for rows in (1, 4):
        program = decoder.compiled_step(rows, capacity=16, neighbours=K)
        shape = f"f32[{rows},{TINY.num_heads},{TINY.head_dim},16]"
        copies = [line for line in program.splitlines() if f"{shape}{{3,2,1,0}} copy(" in line]
        assert shape in program
        assert not copies


def test_buckets():
    assert [power_of_two(count) for count in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
    decoder = Decoder(make_model(TINY), chunks=6)
    assert [decoder.capacity_for(length) for length in (1, 4, 5, 9, 17, 24)] == [
        4,
        4,
        8,
        16,
        24,
        24,
    ]


@pytest.mark.parametrize(
    ("name", "one_layer", "shared"),
    [("gpt2", 0, True), ("llama", 2, False), ("pythia", 2, True), ("qwen3", 0, False)],
)
def test_fitted_models(name: str, one_layer: int, shared: bool):
    """Of each form, retrieval on (open gates in layer 2) and off, which is the base alone.

    Learned positions, heads that share keys, a parallel residual, norms of heads; neighbours' states
    of one layer for all CCA layers, or of each; one softmax over neighbours and text, or two.
    """
    distance = 0 if name == "gpt2" else 5
    form = {"neighbour_layer": one_layer, "shared_softmax": shared, "neighbour_distance": distance}
    model = fitted(name, **form)
    on = make_texts(model.config, 2, 3, retrieval=True)
    off = dataclasses.replace(on, neighbours=None)
    decoder, wanted = Decoder(model, chunks=3), uncached(model, on)[:, :-1]
    assert np.abs(by_chunks(decoder, on) - wanted).max() < 1e-5 * np.abs(wanted).max()
    base = uncached(model, off)[:, :-1]
    assert np.abs(by_chunks(decoder, off) - base).max() < 1e-5 * np.abs(base).max()
    assert np.abs(wanted - base).max() > 0.01 * np.abs(base).max()


def test_neighbours_that_share_too_little_are_left_out():
    """The first neighbour of each chunk begins as the chunk does, the second shares nothing with it."""
    model = fitted("llama")
    texts = make_texts(model.config, 2, 3, retrieval=True)
    length, pad_id = model.config.chunk_length, model.config.pad_id
    neighbours = np.full_like(texts.neighbours, texts.tokens.max() + 1)
    neighbours[:, :, 0, :length] = texts.tokens.reshape(2, 3, length)
    strict = fitted("llama", least=0.5)
    both = dataclasses.replace(texts, neighbours=neighbours)
    first = neighbours.copy()
    first[:, :, 1:] = pad_id
    wanted = uncached(model, dataclasses.replace(texts, neighbours=first))[:, :-1]
    assert np.abs(wanted - uncached(model, both)[:, :-1]).max() > 0.01 * np.abs(wanted).max()
    found = by_chunks(Decoder(strict, chunks=3), both)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_fitted_model_on_a_mesh():
    """By scan, with heads of keys in two parts."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        decoder = Decoder(fitted("llama", mesh), chunks=2, mesh=mesh, scan=True)
    texts = make_texts(decoder.config, 2, 2, retrieval=True)
    wanted = uncached(fitted("llama"), texts)
    assert np.abs(by_chunks(decoder, texts) - wanted).max() < 1e-5 * np.abs(wanted).max()


def fitted(name: str, mesh: Any = None, least: float = 0.0, **form: Any) -> Retro:
    """A tiny base that reads neighbours in its second layer, with open gates."""
    config = dataclasses.replace(config_of(name, (2,), **form), min_shared_tokens=least)
    return with_gates(loaded(config, name, mesh=mesh))


def by_chunks(decoder: Decoder, texts: Texts) -> np.ndarray:
    """[B, 2M or 3M - 1, V]: two chunks, each one block; a third token by token, but for its last."""
    rows, tokens = len(texts.tokens), texts.tokens
    length, live, parts = decoder.config.chunk_length, np.ones(rows, bool), []
    done: Sequence[Completed]
    cache = decoder.empty(rows, tokens.shape[1], 0 if texts.neighbours is None else K)
    for start in range(0, 2 * length, length):
        end, done = start + length, ()
        if texts.neighbours is not None:
            done = [completed(decoder.config, texts, row, end - 1) for row in range(rows)]
        logits, cache = decoder.step(
            cache,
            tokens[:, start:end],
            np.full(rows, start, np.int32),
            live=live,
            completed=done,
            all_logits=True,
        )
        parts.append(np.asarray(logits))
    for position in range(2 * length, 3 * length - 1 if tokens.shape[1] > 2 * length else 0):
        starts, token = np.full(rows, position, np.int32), tokens[:, position : position + 1]
        logits, cache = decoder.step(cache, token, starts, live=live, all_logits=True)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)


def test_a_window_past_the_learned_positions_is_refused():
    with pytest.raises(UserError, match="a window of 68 tokens: expected at most 64, the learned"):
        Decoder(fitted("gpt2"), chunks=17)
