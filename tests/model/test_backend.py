"""Products with their own backward pass: values and gradients are those of the plain einsum."""

import types

import jax
import numpy as np
import pytest

from retro_jax.config import ExecutionConfig
from retro_jax.model import backend
from retro_jax.train import step
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.loop import TrainConfig
from retro_jax.train.plan import Settings, make_plan
from tests.model.tiny import TINY, assert_close

# shape of x, shape of the weight, contracted axes: wider, narrower, several parts, heads
CASES = [
    ((2, 3, 4), (4, 6), 1),
    ((2, 3, 6), (6, 4), 1),
    ((2, 4), (4, 3, 2, 5), 1),
    ((2, 3, 2, 5), (2, 5, 4), 2),
    ((2, 3, 2, 2), (2, 2, 3, 2), 2),
]


def test_results_know_the_device_and_how_it_multiplies(monkeypatch):
    """Those of a CPU keep the facts that they have had."""
    execution = ExecutionConfig()
    assert backend.facts(execution) == execution.facts()
    with jax.default_matmul_precision("highest"):
        assert backend.facts(execution) == execution.facts() | {"matmul_precision": "highest"}
    gpu = types.SimpleNamespace(platform="gpu", device_kind="H100")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert backend.facts(execution) == execution.facts() | {"device": "H100"}


@pytest.mark.parametrize(("x_shape", "weight_shape", "contracted"), CASES)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_value_and_gradients_are_the_plain_products(
    monkeypatch, platform, x_shape, weight_shape, contracted
):
    """Against NumPy's tensordot in float64, for every platform's way."""
    monkeypatch.setattr(backend, "target_platform", lambda: platform)
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=x_shape), rng.normal(size=weight_shape)
    y, vjp = jax.vjp(
        lambda x, w: backend.product(x, w, contracted=contracted),
        x.astype(np.float32),
        weight.astype(np.float32),
    )
    assert_close(np.asarray(y), np.tensordot(x, weight, contracted))
    dy = rng.normal(size=y.shape)
    dx, dweight = vjp(dy.astype(np.float32))
    rows = x.ndim - contracted
    outputs = weight.ndim - contracted
    last = list(range(dy.ndim - outputs, dy.ndim)), list(range(contracted, weight.ndim))
    assert_close(np.asarray(dx), np.tensordot(dy, weight, last))
    first = list(range(rows))
    assert_close(np.asarray(dweight), np.tensordot(x, dy, (first, first)))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_scores_and_their_gradients_are_those_of_every_pair(monkeypatch, platform):
    """Against NumPy's einsum in float64: 2 leading axes, 5 queries, 7 keys, 2 heads of 4."""
    monkeypatch.setattr(backend, "target_platform", lambda: platform)
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 3, 5, 2, 4)), rng.normal(size=(2, 3, 7, 2, 4))
    scores, vjp = jax.vjp(backend.scores, query.astype("f4"), key.astype("f4"))
    assert_close(np.asarray(scores), np.einsum("abthd,abshd->abhts", query, key))
    dscores = rng.normal(size=scores.shape)
    dquery, dkey = vjp(dscores.astype("f4"))
    assert_close(np.asarray(dquery), np.einsum("abhts,abshd->abthd", dscores, key))
    assert_close(np.asarray(dkey), np.einsum("abhts,abthd->abshd", dscores, query))


def test_scores_are_float32_and_their_gradients_are_not():
    """In bfloat16 as in float32, whatever takes the product."""
    query, key = (jax.numpy.ones((1, n, 1, 4), "bfloat16") for n in (2, 3))
    scores, vjp = jax.vjp(backend.scores, query, key)
    assert scores.dtype == "float32"
    assert [gradient.dtype for gradient in vjp(scores)] == ["bfloat16", "bfloat16"]


def test_only_a_cpu_is_told_how_arrays_lie(monkeypatch):
    """The barriers that keep copies apart are in no other platform's program."""

    def program(platform: str) -> str:
        monkeypatch.setattr(backend, "target_platform", lambda: platform)
        gradient = jax.grad(lambda w, x: backend.product(x, w).sum())
        return str(jax.make_jaxpr(gradient)(np.ones((4, 6), "f4"), np.ones((3, 4), "f4")))

    assert "optimization_barrier" in program("cpu")
    assert "optimization_barrier" not in program("gpu")
    assert "custom_vjp" not in program("gpu")


def test_a_step_for_gpus_is_asked_to_overlap_and_xla_knows_the_options():
    """XLA's options are the same on all platforms; an unknown one ends the compilation."""
    assert backend.options_for_overlap("cpu") is backend.options_for_overlap("tpu") is None
    options = backend.options_for_overlap("gpu")
    assert len(options) == 4
    double = jax.jit(lambda x: x + x, compiler_options=options)
    np.testing.assert_array_equal(double(np.arange(3)), [0, 2, 4])
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x + x, compiler_options={"xla_gpu_no_such": True})(np.arange(3))


def test_the_step_is_compiled_for_its_mesh(monkeypatch):
    given = []
    monkeypatch.setattr(step, "options_for_overlap", given.append)
    settings = Settings(retro=TINY, training=TrainConfig(steps=1000))
    make_plan(settings, BatchShape(2, 16), jax.devices()[:1])
    assert given == ["cpu"]
