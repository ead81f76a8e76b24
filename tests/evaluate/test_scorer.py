"""Passes are scored in pieces: interrupted and gone on with, they have the bits of one run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.evaluate import scorer
from retro_jax.evaluate.in_context import chunk_losses, score_in_context
from retro_jax.evaluate.score import WindowConfig, score_chunks, text_windows
from retro_jax.evaluate.scorer import Pass, ScoredModel, Scorer
from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.decoder import decoder_config, load_decoder
from retro_jax.sharding import MeshConfig
from tests.evaluate.texts import chunked, documents_of
from tests.retrofit.base_files import FOLDER

M, R, VOCABULARY = 4, 8, 96


@pytest.fixture(name="text", scope="module")
def _text():
    """46 chunks of seven documents, with two neighbours each."""
    documents = documents_of([30, 1, 25, 70, 3, 9, 14], VOCABULARY)
    _, table = chunked(documents, M)
    neighbours = np.random.default_rng(1).integers(1, VOCABULARY, (len(table), 2, R))
    return chunked(documents, M, neighbours)[0]


@pytest.fixture(name="model", scope="module")
def _model():
    base = open_base(FOLDER / "llama")
    config = decoder_config(base.config, chunk_length=M, neighbour_length=R)
    load = lambda mesh: nnx.split(load_decoder(base, config, mesh=mesh))  # noqa: E731
    return ScoredModel("llama", MeshConfig(), load)


def both_ways(model, batch):
    """[2, B, N]: the losses, and those of shifted targets."""
    losses = model.token_losses(batch)
    return jnp.stack([losses, losses**2])


@pytest.mark.parametrize(
    ("method", "losses"), [(score_chunks, both_ways), (score_in_context, chunk_losses)]
)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("segment", [9, 1000])
def test_an_interrupted_pass_has_the_bits_of_a_whole_one(
    text, model, method, losses, sampled, segment, tmp_path, monkeypatch
):
    if sampled:
        wanted = np.arange(len(text.ids)) % 9 > 3
        wanted[:9] = False  # nothing of the first segment
        text = dataclasses.replace(text, wanted=wanted)
    monkeypatch.setattr(scorer, "SEGMENT", segment)
    stop, calls = [3], []

    def scoring(*arguments, **more):
        if len(calls) == stop[0]:
            raise KeyboardInterrupt
        calls.append(more["part"])
        return method(*arguments, **more)

    def scored():
        one = Pass(model, losses, WindowConfig(3, 1, 8), "test", tmp_path / "partial", scoring)
        return Scorer().nll(one, text)

    stop[0] = 100
    monkeypatch.setattr(scorer, "PIECE", 100)
    whole = scored()
    parts = [scorer._part(text, part) for part in scorer.segments(text.documents)]
    windows = [len(text_windows(part, WindowConfig(3, 1))) for part in parts]
    assert len(calls) == np.count_nonzero(windows) and (0 in windows) == (sampled and segment == 9)
    calls.clear()
    for path in tmp_path.glob("partial/*"):
        path.unlink()
    stop[0] = 2
    monkeypatch.setattr(scorer, "PIECE", 1)
    with pytest.raises(KeyboardInterrupt):
        scored()
    assert len(list(tmp_path.glob("partial/*.npy"))) == 2
    stop[0] = 100
    np.testing.assert_array_equal(scored(), whole)
    assert sum(part.stop - part.start for part in calls) == sum(windows)
    counted = whole if whole.ndim == 3 else whole[None]
    assert (counted[0] > 0).sum() > 50 and whole.shape[-2:] == (len(text.ids), M)
