"""Fitting on neighbours that are noise: towards the base, with kept states, on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.sharding import MeshConfig
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.plan import Settings, make_plan
from retro_jax.train.run import Run
from tests.retrofit.test_fitting import config_of, loaded, settings_of
from tests.train.test_run import Data, RandomBatches


class NoisyBatches(RandomBatches):
    """All neighbours are noise."""

    noise = True

    def rows(self, step, rows=None):
        batch = super().rows(step, rows)
        return dataclasses.replace(batch, noise=np.ones(batch.documents.shape, bool))


class Noisy(Data):
    """Training data of noise alone; that it evaluates on says nothing of it."""

    batches = NoisyBatches()


def settings(target, unlearning=0.0, **others) -> Settings:
    """20 steps from gates of 1."""
    made = settings_of(
        "llama", ("cca.*",), 1.0, retro=config_of("llama", (2,), shared_softmax=True)
    )
    training = dataclasses.replace(
        made.training, noise_target=target, noise_unlearning=unlearning, evaluate_every=0
    )
    return dataclasses.replace(made, training=training, **others)


def trained(directory, chosen: Settings, devices=1) -> Retro:
    """The model after 20 steps."""
    plan = make_plan(chosen, BatchShape.of(Noisy.batches), jax.devices()[:devices])
    run = Run(directory / "retro", plan, Noisy())
    assert run.train() == 20
    return run.model()


def changes(model: Retro) -> np.ndarray:
    """Nats by which random neighbours change the losses of held-out tokens."""
    batch, losses = RandomBatches(first=1000).rows(0), jax.jit(Retro.token_losses)
    return np.asarray(losses(model, batch) - losses(model, batch.without_neighbours()))


def harm(model: Retro) -> float:
    """The mean of these, upwards or downwards."""
    return float(np.abs(changes(model)).mean())


def test_towards_the_base_noise_ends_by_changing_less(tmp_path):
    """Half as much as at first, and towards the text more; kept states do the same."""
    before = loaded(settings("text").retro, "llama")
    before.cca.gate[...] = np.ones_like(before.cca.gate[...])
    to_text, to_off = (trained(tmp_path / name, settings(name)) for name in ("text", "off"))
    kept = trained(
        tmp_path / "kept", settings("off", execution=ExecutionConfig(kept_states="float16"))
    )
    assert 2 * harm(to_off) < harm(before) < harm(to_text)
    np.testing.assert_allclose(harm(kept), harm(to_off), atol=0.05 * harm(before))


def test_what_is_unlearnt_no_longer_saves(tmp_path):
    """The text at noise makes random neighbours save; taken away there, they cost."""
    text, off, unlearnt = (
        float(changes(trained(tmp_path / name, settings(target, weight))).mean())
        for name, target, weight in (("t", "text", 0.0), ("o", "off", 0.0), ("u", "off", 0.5))
    )
    assert text < off < unlearnt


def test_a_mesh_trains_the_same(tmp_path):
    one, four = (
        named_leaves(nnx.state(trained(tmp_path / str(n), settings("off", mesh=mesh), n)))
        for n, mesh in ((1, MeshConfig()), (4, MeshConfig(data=2, fsdp=1, tensor=2)))
    )
    for name, leaf in one.items():
        np.testing.assert_allclose(four[name], leaf, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("what", ["batches", "model"])
def test_batches_without_noise_and_models_that_read_none_are_refused(what):
    chosen, batches = settings("off"), Noisy.batches
    if what == "batches":
        batches = Data.batches
    else:
        chosen = dataclasses.replace(chosen, retro=chosen.retro.baseline())
    with pytest.raises(
        UserError, match=r"noise_target is 'off': expected 'text', or .*neighbour_n"
    ):
        make_plan(chosen, BatchShape.of(batches))
