"""The whole step with the real model: golden metrics, and every mesh like one device."""

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.batch import RetroBatch
from retro_jax.config import RetroConfig
from retro_jax.model import Retro
from retro_jax.sharding import MESH_SHARDINGS, MeshConfig, batch_sharding, make_mesh
from retro_jax.train.optimizer import OptimizerConfig, make_optimizer
from retro_jax.train.step import StepConfig, abstract_state, compile_first_state, compile_train_step

_CONFIG = RetroConfig(
    vocab_size=48,
    d_model=16,
    num_layers=3,
    num_heads=2,
    head_dim=8,
    d_ff=32,
    cca_layers=(2, 3),
    chunk_length=4,
    neighbour_length=8,
    encoder_d_model=12,
    encoder_num_heads=2,
    encoder_head_dim=4,
    encoder_d_ff=24,
    dropout=0.1,
)
_MESSAGE = """
The metrics of the first steps have changed. If this commit changes what is computed (the model, its
initial values, the optimiser, dropout's draws, the order of sums beyond tolerance), say so in its
message and put the new figures here; they must be the same on every mesh. If it does not, this is a
defect: find it before changing the figures. New JAX versions may change random draws: then all three
steps change at once, and the commit that raises the version is the place to change them.
"""
# loss, grad_norm, param_norm and summed losses of the two corpora, for each of three steps
_GOLDEN = [
    [4.767598, 3.181333, 29.376467, 272.511597, 285.297363],
    [4.451042, 2.952569, 29.376467, 270.805023, 263.320068],
    [4.383317, 3.041557, 29.364569, 259.764923, 231.166534],
]


def _batch(step: int) -> RetroBatch:
    """A batch whose documents end inside of sequences and whose neighbours are padded."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(1, 48, (8, 17)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[rng.random(targets.shape) < 0.1] = 0
    neighbours = rng.integers(1, 48, (8, 4, 2, 8)).astype(np.int32)
    neighbours[rng.random((8, 4, 2)) < 0.3] = 0
    return RetroBatch(
        tokens=tokens[:, :-1],
        targets=targets,
        documents=np.sort(rng.integers(0, 2, (8, 4)), axis=1).astype(np.int32),
        corpus=(np.arange(8) % 2).astype(np.int32),
        neighbours=neighbours,
    )


def _metrics(mesh_config: MeshConfig, devices: int) -> np.ndarray:
    """[steps, 5] metrics of three steps."""
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1, max_learning_rate=0.01), 10)

    def make() -> Retro:
        return Retro(_CONFIG, shardings=MESH_SHARDINGS, rngs=nnx.Rngs(7))

    graphdef, abstract = abstract_state(make, optimizer, mesh)
    config = StepConfig(pad_id=0, num_corpora=2, seed=7, neighbour_dropout=0.2)
    step = compile_train_step(graphdef=graphdef, optimizer=optimizer, config=config)
    rows = []
    with jax.set_mesh(mesh):
        state = compile_first_state(make, optimizer, abstract)()
        for i in range(3):
            state, m = step(state, jax.device_put(_batch(i), batch_sharding(mesh)))
            rows.append([m.loss, m.grad_norm, m.param_norm, *m.corpus_losses])
    assert step._cache_size() == 1
    return np.array(rows, np.float64)


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [
        (MeshConfig(), 1),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8),
    ],
)
def test_golden_metrics_of_the_first_steps_on_every_mesh(mesh, devices):
    metrics = _metrics(mesh, devices)
    found = np.array2string(metrics, separator=", ", formatter={"float": lambda x: f"{x:.6f}"})
    matches = np.allclose(metrics, _GOLDEN, rtol=1e-5)
    assert matches, f"{_MESSAGE}\n{found}"
