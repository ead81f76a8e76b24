"""The model against the naive NumPy float64 loops of tests/reference, over many configurations."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import POSITIONS, ExecutionConfig
from tests.model.tiny import (
    TINY,
    assert_close,
    logits,
    make_batch,
    make_model,
    token_losses,
    with_neighbours,
    without_documents,
)
from tests.reference import retro_numpy
from tests.reference.parameters import reference_parameters

AWKWARD = {"documents": True, "padding": True}

# name: (changes to the configuration, changes to the batch)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: ({"positions": name}, {}) for name in POSITIONS},
    **{f"{name}, awkward": ({"positions": name}, AWKWARD) for name in POSITIONS},
    **{
        f"{name}, no cca positions": ({"positions": name, "cca_positions": False}, AWKWARD)
        for name in POSITIONS
    },
    "shared embeddings": ({"share_embeddings": True, "encoder_d_model": 12}, AWKWARD),
    "untied read-out": ({"tie_embeddings": False}, {}),
    "relu": ({"activation": "relu"}, {}),
    "cca in layer 1 alone": ({"cca_layers": (1,)}, {}),
    "cca in every layer": ({"cca_layers": (1, 2, 3)}, AWKWARD),
    "irregular cca": ({"num_layers": 6, "cca_layers": (1, 2, 5)}, AWKWARD),
    "cca in the last layer": ({"cca_layers": (3,)}, {}),
    "no retrieval": ({"cca_layers": ()}, AWKWARD),
    "encoder of 1 layer": ({"encoder_num_layers": 1}, {}),
    "encoder of 3, crossing twice": (
        {"encoder_num_layers": 3, "encoder_cca_layers": (1, 3)},
        AWKWARD,
    ),
    "normed conditioning": ({"norm_conditioning": True, "norm_epsilon": 0.01}, AWKWARD),
    "encoder crossing last": ({"encoder_cca_layers": (2,)}, {}),
    "encoder never crossing": ({"encoder_cca_layers": ()}, {}),
    "one neighbour": ({}, {"k": 1}),
    "three neighbours": ({}, {"k": 3, "padding": True}),
    "one chunk": ({}, {"chunks": 1}),
    "padding past the vocabulary": ({"pad_id": 30}, AWKWARD),
    "padding inside the vocabulary": ({"pad_id": 7}, AWKWARD),
    "short neighbours": ({"neighbour_length": 3}, {}),
    "large epsilon": ({"norm_epsilon": 0.5}, {}),
}


def _reference_logits(model, batch):
    """The float64 loops with the model's own parameters."""
    return retro_numpy.logits(
        reference_parameters(model), model.config, batch.tokens, batch.neighbours, batch.documents
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(name):
    changes, batch_changes = CASES[name]
    config = dataclasses.replace(TINY, **changes)
    model, batch = make_model(config), make_batch(config, **batch_changes)
    assert_close(logits(model, batch), _reference_logits(model, batch))


def test_logits_with_retrieval_off_equal_the_reference():
    model, batch = make_model(TINY), with_neighbours(make_batch(TINY, **AWKWARD), None)
    assert_close(logits(model, batch), _reference_logits(model, batch))


def test_without_documents_a_row_is_one_document():
    model, batch = make_model(TINY), make_batch(TINY, padding=True)
    wanted = retro_numpy.logits(
        reference_parameters(model), TINY, batch.tokens, batch.neighbours, None
    )
    assert_close(logits(model, without_documents(batch)), wanted)
    assert_close(logits(model, batch), wanted)


@pytest.mark.parametrize("pad_id", [0, 30])
@pytest.mark.parametrize("loss_block", [0, 5])
def test_token_losses_equal_the_reference(pad_id, loss_block):
    """Nats, and exactly 0 where the target is padding."""
    config = dataclasses.replace(TINY, pad_id=pad_id)
    model = make_model(config, ExecutionConfig(loss_block=loss_block))
    batch = make_batch(config, **AWKWARD)
    losses = token_losses(model, batch)
    absent = batch.targets == pad_id
    assert absent.any()
    assert np.all(losses[absent] == 0)
    assert np.all(losses[~absent] > 0)
    wanted = retro_numpy.token_losses(_reference_logits(model, batch), batch.targets, pad_id)
    assert_close(losses, wanted)


def test_the_reference_sees_what_this_test_compares():
    """A parameter moved on one side only is noticed: the comparison can fail."""
    model, batch = make_model(TINY), make_batch(TINY)
    wanted = _reference_logits(model, batch)
    model.cca.attention.position_bias[...] += jnp.float32(0.05)
    with pytest.raises(AssertionError, match="of the largest value"):
        assert_close(logits(model, batch), wanted)
