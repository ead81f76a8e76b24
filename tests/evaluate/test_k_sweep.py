"""One pass over several k gives what a pass for each would, and predictions are counted right."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig
from retro_jax.evaluate.k_sweep import sweep_losses
from retro_jax.evaluate.score import WindowConfig, compiled_token_losses, score_chunks, token_hits
from tests.evaluate.texts import PAD, chunked, documents_of
from tests.model.tiny import TINY, make_batch, make_model

M = 4


@pytest.mark.parametrize(("cca_layers", "scan_layers"), [((1,), False), ((2, 3), True)])
def test_one_pass_is_each_k_by_itself(cca_layers: tuple[int, ...], scan_layers: bool):
    config = dataclasses.replace(TINY, cca_layers=cca_layers)
    model = make_model(config, ExecutionConfig(scan_layers=scan_layers))
    batch = make_batch(config, k=10, documents=True, padding=True)
    ks = (1, 3, 4, 10)  # 3 and 4 share a program; 10 are encoded in two parts
    swept = compiled_token_losses(*nnx.split(model), losses=sweep_losses(ks))(batch)
    each = compiled_token_losses(*nnx.split(model))
    for k, found in zip(ks, swept, strict=True):
        fewer = dataclasses.replace(batch, neighbours=batch.neighbours[:, :, :k])
        expected = np.asarray(each(fewer))
        assert np.abs(found - expected).max() < 1e-5 * expected.max()
    assert np.abs(swept[0] - swept[3]).max() > 1e-2
    assert np.abs(swept[1] - swept[2]).max() > 1e-3


def test_scores_of_several_ways_are_those_of_each():
    model = make_model(TINY)
    documents = documents_of([9, 3, 21], TINY.vocab_size)
    _, table = chunked(documents, M)
    neighbours = np.random.default_rng(1).integers(0, TINY.vocab_size, (len(table), 2, 2 * M))
    text, _ = chunked(documents, M, neighbours)
    config = WindowConfig(chunks=3, stride=1, batch_size=4)
    both = score_chunks(
        compiled_token_losses(*nnx.split(model), losses=sweep_losses((1, 2))), text, config
    )
    assert both.shape == (2, *table.shape)
    alone = score_chunks(compiled_token_losses(*nnx.split(model)), text, config)
    assert np.abs(both[1] - alone).max() < 1e-5 * alone.max()


def test_a_hit_is_the_most_likely_token():
    model = make_model(TINY)
    batch = make_batch(TINY, documents=True, padding=True)
    hits = np.asarray(compiled_token_losses(*nnx.split(model), losses=token_hits)(batch))
    logits = model(jnp.asarray(batch.tokens), batch.neighbours, batch.documents)
    expected = (np.asarray(logits).argmax(-1) == batch.targets) & (batch.targets != PAD)
    assert (hits == expected).all()
    sure = dataclasses.replace(
        batch, targets=np.where(batch.targets == PAD, PAD, np.asarray(logits).argmax(-1))
    )
    again = np.asarray(compiled_token_losses(*nnx.split(model), losses=token_hits)(sure))
    assert (again == (sure.targets != PAD)).all()
    assert again.sum() > 10
