"""Neighbours before the text: each chunk's losses are those of its own row, computed by hand."""

import numpy as np
import pytest
from flax import nnx

from retro_jax.batch import ChunkText
from retro_jax.errors import UserError
from retro_jax.evaluate import in_context, score
from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.decoder import decoder_config, load_decoder
from tests.retrofit.base_files import FOLDER

M, R, K, PAD = 4, 8, 2, 0
OWNERS = np.array([0, 0, 0, 0, 0, 1, 1, 2])


@pytest.fixture(name="text", scope="module")
def _text():
    """Three documents of five, two and one chunks; some neighbours are short or absent."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 96, (len(OWNERS), M))
    tokens[4, 2:] = PAD
    found = draw.integers(1, 96, (len(OWNERS), K, R))
    found[0, 1, 5:], found[1] = PAD, PAD

    def pads(table, ids):
        return np.where((ids >= 0).reshape(-1, *[1] * (table.ndim - 1)), table[ids], PAD)

    return ChunkText(
        ids=np.arange(len(OWNERS)),
        documents=OWNERS,
        chunks=lambda ids: pads(tokens, ids),
        neighbours=lambda ids: pads(found, ids),
        pad_id=PAD,
    )


@pytest.fixture(name="model", scope="module")
def _model():
    config = decoder_config(open_base(FOLDER / "llama").config, chunk_length=M, neighbour_length=R)
    return load_decoder(open_base(FOLDER / "llama"), config)


def scored(model, text, **windows):
    """[n, M] nats."""
    losses = score.compiled_token_losses(*nnx.split(model), losses=in_context.chunk_losses)
    config = score.WindowConfig(**windows, batch_size=3)
    seen = []
    found = in_context.score_in_context(losses, text, config, on_windows=seen.append)
    assert sum(seen) == len(score.text_windows(text, config))
    return found


def by_hand(model, text, u, first):
    """[M] nats of chunk u after chunk u - 1's neighbours, the nearest last, and chunks from `first` on."""
    parts = [text.chunks(text.ids[c : c + 1])[0] for c in range(first, u + 1)]
    if first < u:
        near = text.neighbours(text.ids[u - 1 : u])[0]
        parts = [near[1][near[1] != PAD], near[0][near[0] != PAD], *parts]
    row = np.concatenate(parts)
    padded = np.pad(row, (0, -len(row) % M))[None]
    logits = np.asarray(model(padded), np.float64)[0, : len(row)]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    nats = np.concatenate([[0.0], -logs[np.arange(len(row) - 1), row[1:]]])[-M:]
    return np.where(row[-M:] == PAD, 0, nats)


@pytest.mark.parametrize(("chunks", "stride"), [(3, 2), (2, 2), (1, 1)])
def test_each_chunk_follows_the_neighbours_of_the_one_before(model, text, chunks, stride):
    found = scored(model, text, chunks=chunks, stride=stride)
    for start, begin, end in score.windows(len(OWNERS), chunks, stride).tolist():
        for u in range(begin, end):
            first = max(min(start, u - 1), int(np.flatnonzero(OWNERS[u] == OWNERS)[0]))
            np.testing.assert_allclose(found[u], by_hand(model, text, u, first), atol=2e-4)


def test_a_sample_has_the_same_scores_of_its_chunks(model, text):
    """In context and in windows; a sampled chunk sees what the windows of the whole text give it."""
    wanted = np.isin(np.arange(len(OWNERS)), (2, 3, 6))
    part = ChunkText(**{**vars(text), "wanted": wanted})
    whole, some = (scored(model, each, chunks=3, stride=1) for each in (text, part))
    np.testing.assert_allclose(some[wanted], whole[wanted], atol=1e-5)
    losses = score.compiled_token_losses(*nnx.split(model))
    for chunks, stride in ((3, 1), (2, 1), (1, 1)):
        config = score.WindowConfig(chunks=chunks, stride=stride, batch_size=2)
        whole, some = (score.score_chunks(losses, each, config)[wanted] for each in (text, part))
        np.testing.assert_allclose(some[:, 1:], whole[:, 1:], atol=1e-5)
        assert (some[:, 0] > 0).all()  # a run's first token may see a chunk less
        assert len(score.text_windows(part, config)) < len(score.text_windows(text, config))


def test_rows_longer_than_the_context_are_refused(model):
    windows = score.WindowConfig(chunks=4, stride=2)
    in_context.check_context(model.config, 2, windows, limit=32, model="base")
    with pytest.raises(
        UserError, match="2 neighbours and a window are 32 tokens: expected at most 31"
    ):
        in_context.check_context(model.config, 2, windows, limit=31, model="base")
