"""Training towards RETRO[OFF] where neighbours are noise, against distributions written out in full."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import DecoderForm, ExecutionConfig
from retro_jax.model.noise_target import losses_toward_off
from tests.model.tiny import TINY, make_batch, make_model

GATED = dataclasses.replace(
    TINY,
    form=DecoderForm(norm="rms", gated_cca=True, shared_softmax=True, sink_id=1),
    positions="rotary",
)
NOISE = np.array([[True, False, False, True], [False, True, True, False]])
# A chunk's last position reads its neighbours, and the next chunk's first three where they are of the
# same document: make_batch begins another one with chunk 1 of the first row, chunk 2 of the second.
READS = np.zeros((2, 16), bool)
READS[0, [3, 15]] = READS[1, [7, 11, 12, 13, 14]] = True


def gradients(losses, model):
    """The gradients of the sum of `losses(model)` by the parameters of CCA, and the losses."""
    graph, cca, rest = nnx.split(model, lambda path, _: path[0] == "cca", ...)

    def total(cca):
        each = losses(nnx.merge(graph, cca, rest))
        return jnp.sum(each), each

    grads, each = jax.jit(jax.grad(total, has_aux=True))(cca)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(grads)], np.asarray(each)


@pytest.mark.parametrize(
    ("execution", "weight", "unlearning"),
    [
        (ExecutionConfig(), 1.0, 0.0),
        (ExecutionConfig(vocab_block=8), 5.0, 0.0),
        (ExecutionConfig(), 2.0, 3.0),
    ],
)
@pytest.mark.parametrize("config", [TINY, GATED], ids=["paper", "gated"])
def test_gradients_are_those_of_the_cross_entropy_with_what_off_predicts(
    config, execution, weight, unlearning
):
    """By the weight there, less what is unlearnt; everywhere else those of the text, whose losses remain."""
    model, plain = make_model(config, execution), make_batch(config, documents=True, padding=True)
    batch = dataclasses.replace(plain, noise=NOISE)

    def written_out(model):
        on = jax.nn.log_softmax(model(batch.tokens, batch.neighbours, batch.documents))
        off = jax.nn.softmax(make_model(config, execution)(batch.tokens, None, batch.documents))
        of_text = -jnp.take_along_axis(on, batch.targets[..., None], axis=-1)[..., 0]
        of_off = -jnp.sum(off * on, axis=-1)
        present = batch.targets != config.pad_id
        noise = weight * of_off - unlearning * of_text
        return jnp.where(present, jnp.where(READS, noise, of_text), 0.0)

    found, losses = gradients(
        lambda model: losses_toward_off(model, batch, weight=weight, unlearning=unlearning), model
    )
    wanted, _ = gradients(written_out, model)
    text, text_losses = gradients(lambda model: model.token_losses(plain), model)
    np.testing.assert_array_equal(losses, text_losses)
    scale = max(np.abs(each).max() for each in wanted)
    for ours, reference in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-5 * scale)
    assert max(np.abs(a - b).max() for a, b in zip(found, text, strict=True)) > 0.01 * scale


def test_a_model_that_does_what_off_does_learns_nothing_from_noise():
    """With gates at 0 and noise everywhere but at the first tokens, which read nothing."""
    config = dataclasses.replace(GATED, cca_layers=(3,))
    model, plain = make_model(config), make_batch(config)
    model.cca.gate[...] = jnp.zeros_like(model.cca.gate[...])
    batch = dataclasses.replace(plain, noise=np.ones_like(NOISE))
    found, _ = gradients(lambda model: losses_toward_off(model, batch), model)
    text, _ = gradients(lambda model: model.token_losses(plain), model)
    assert max(np.abs(each).max() for each in text) > 0.1
    assert max(np.abs(each).max() for each in found) < 1e-5
