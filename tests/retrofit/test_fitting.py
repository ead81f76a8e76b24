"""Fitting begins as the base, reads neighbours as its NumPy reference does, and trains gates alone."""

import dataclasses
import fnmatch
import hashlib

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.batch import RetroBatch
from retro_jax.config import ExecutionConfig
from retro_jax.evaluate.k_sweep import sweep_losses
from retro_jax.model import Retro
from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.decoder import decoder_config, load_decoder
from retro_jax.sharding import MeshConfig, batch_sharding, make_mesh
from retro_jax.train.checkpoint import CHECKPOINTS
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.held_out import OFF, ON
from retro_jax.train.loop import TrainConfig
from retro_jax.train.optimizer import OptimizerConfig
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.plan import Settings, make_plan
from retro_jax.train.run import Run
from retro_jax.train.warm_start import StartConfig
from tests.reference.fitted_numpy import Fitted
from tests.retrofit.base_files import FOLDER, NAMES
from tests.train.test_run import DATA

GATED = {"gated_cca": True, "sink_id": 3}
UNROLLED = ExecutionConfig(scan_layers=False)


def config_of(name, layers=(1, 2), **form):
    """A fitted Retro's, with chunks of 4 and neighbours of 8 tokens."""
    config = open_base(FOLDER / name).config
    return decoder_config(
        config, form=GATED | form, cca_layers=layers, chunk_length=4, neighbour_length=8
    )


def loaded(config, name, execution=ExecutionConfig(), mesh=None) -> Retro:
    """The fitted Retro of a tiny base."""
    return load_decoder(open_base(FOLDER / name), config, execution, mesh=mesh)


def with_gates(model: Retro) -> Retro:
    """The same with its gates open, each head's by another amount."""
    gates = np.random.default_rng(7).normal(size=model.cca.gate.shape)
    model.cca.gate[...] = jax.device_put(gates.astype(np.float32), model.cca.gate[...].sharding)
    return model


def batch_of(rows=2, k=2) -> RetroBatch:
    """Random texts and neighbours, with padding at the end of some and one slot empty."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(1, 96, (rows, 16)).astype(np.int32)
    neighbours = draw.integers(1, 96, (rows, 4, k, 8)).astype(np.int32)
    neighbours[0, 0, 0, 5:] = 0
    neighbours[0, 1, k - 1] = 0
    neighbours[1, 2] = 0
    return RetroBatch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        documents=np.zeros((rows, 4), np.int32),
        corpus=np.zeros(rows, np.int32),
        neighbours=neighbours,
    )


def logits(model: Retro, batch: RetroBatch) -> np.ndarray:
    """[B, N, V], compiled."""
    call = jax.jit(lambda model, b: model(b.tokens, b.neighbours, b.documents))
    return np.asarray(call(model, batch))


@pytest.mark.parametrize(
    ("execution", "shared"),
    [(ExecutionConfig(), False), (UNROLLED, False), (ExecutionConfig(), True)],
    ids=["scan", "unrolled", "shared"],
)
@pytest.mark.parametrize("name", NAMES)
def test_step_0_is_the_base_bit_for_bit(name, execution, shared):
    """With neighbours, without them, and as the plain decoder."""
    config, batch = config_of(name, shared_softmax=shared), batch_of()
    model = loaded(config, name, execution)
    base = loaded(model.config.baseline(), name, execution)
    wanted = logits(base, batch.without_neighbours())
    assert (logits(model, batch) == wanted).all()
    assert (logits(model, batch.without_neighbours()) == wanted).all()


@pytest.mark.parametrize(
    ("one_layer", "shared", "far"), [(0, False, 5), (2, False, 0), (0, True, 9)]
)
@pytest.mark.parametrize("name", NAMES)
def test_open_gates_read_what_the_reference_reads(name, one_layer, shared, far):
    base, batch = open_base(FOLDER / name), batch_of()
    distance = far if base.config.positions == "rotary" else 0
    form = {"neighbour_layer": one_layer, "shared_softmax": shared, "neighbour_distance": distance}
    config = config_of(name, **form)
    found = []
    for execution in (ExecutionConfig(), UNROLLED):
        model = with_gates(loaded(config, name, execution))
        found.append(logits(model, batch))
    reference = Fitted(
        base.config,
        dict(base.stream(np.float64)),
        dict(enumerate(np.asarray(model.cca.gate[...], np.float64), 1)),
        one_layer,
        sink=3,
        pad=0,
        chunk_length=4,
        shared=shared,
        distance=distance,
    )
    wanted = [reference.logits(*row) for row in zip(batch.tokens, batch.neighbours, strict=True)]
    off = logits(model, batch.without_neighbours())
    for each in found:
        np.testing.assert_allclose(each, wanted, atol=2e-5 * np.abs(wanted).max())
    assert np.abs(off - wanted).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize("layers", [(1,), (2,)])
def test_one_cca_layer_is_one_gate_row(layers):
    """The same as both layers with the other's gates shut."""
    both, one = (with_gates(loaded(config_of("llama", each), "llama")) for each in ((1, 2), layers))
    gates = np.array(both.cca.gate[...])
    one.cca.gate[...] = gates[layers[0] - 1 : layers[0]]
    gates[2 - layers[0]] = 0
    both.cca.gate[...] = gates
    found, wanted = logits(one, batch_of()), logits(both, batch_of())
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["llama", "pythia", "gpt2"])
def test_eight_devices_read_the_same(name):
    config, batch = config_of(name, cca_rank=2), batch_of(rows=8)
    wanted = logits(with_gates(loaded(config, name)), batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = with_gates(loaded(config, name, mesh=mesh))
    with jax.set_mesh(mesh):
        found = logits(model, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_sweep_over_k_is_each_k_by_itself():
    model, batch = with_gates(loaded(config_of("qwen2"), "qwen2")), batch_of(k=10)
    found = np.asarray(jax.jit(sweep_losses([1, 3, 10]))(model, batch))
    for losses, k in zip(found, (1, 3, 10), strict=True):
        cut = dataclasses.replace(batch, neighbours=batch.neighbours[:, :, :k])
        np.testing.assert_allclose(losses, model.token_losses(cut), atol=1e-4)


def settings_of(name, trained=("cca.gate",), gates=0.0, **others) -> Settings:
    """20 steps of fitting."""
    return Settings(
        retro=others.pop("retro", config_of(name)),
        training=TrainConfig(
            steps=20, log_every=1, checkpoint_every=10, evaluate_every=20, evaluate_batches=1
        ),
        optimizer=OptimizerConfig(max_learning_rate=0.05, warmup_steps=1, **others),
        start=StartConfig(base=str(FOLDER / name), trained=trained, gates=gates),
    )


def digests(params) -> dict[str, str]:
    """A hash of each parameter's bytes, by name."""
    return {
        name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for name, leaf in named_leaves(params).items()
    }


LOW_RANK = ("cca.gate", "cca.attention.*_down", "cca.attention.*_up")


@pytest.mark.parametrize(
    "trained", [("cca.gate",), ("cca.*",), LOW_RANK], ids=["gates", "new", "low rank"]
)
def test_only_what_is_trained_changes(tmp_path, trained):
    """Frozen tensors keep their bytes, moments are those of the trained ones, OFF stays the base."""
    retro = config_of("llama", cca_rank=2 if trained == LOW_RANK else 0)
    settings = settings_of("llama", trained, gate_factor=2.0, retro=retro)
    plan = make_plan(settings, BatchShape.of(DATA.batches))
    states, lines = {}, []
    run = Run(tmp_path / "retro", plan, DATA)
    run.on_metrics(lambda step, metrics: lines.append(metrics))
    run.every(1, lambda step, state: states.setdefault(step, digests(state.params)))
    assert run.train() == 20
    first = loaded(retro, "llama")
    before = digests(nnx.state(first))
    assert retro.num_parameters() == sum(x.size for x in jax.tree.leaves(nnx.state(first)))
    names = list(states[20])
    changed = {name for name in names if states[20][name] != before[name]}
    wanted = {n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in trained)}
    assert changed == wanted and len(wanted) == (7 if trained == LOW_RANK else len(wanted))
    of_state = named_leaves(plan.abstract.opt_state)
    moments = {name.rpartition("mu.")[2] for name in of_state if ".mu." in name}
    assert moments == wanted
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0]
    noted = [line for line in lines if ON in line]
    assert noted and noted[-1][ON] != noted[-1][OFF]

    batch, model = batch_of(), run.model()
    base = loaded(config_of("llama").baseline(), "llama")
    wanted_logits = logits(base, batch.without_neighbours())
    assert (logits(model, batch.without_neighbours()) == wanted_logits).all()
    assert (logits(model, batch) != wanted_logits).any()


def test_a_run_resumes_to_the_same_bits(tmp_path):
    """Gates that begin open and are not trained are in its checkpoints."""
    settings = settings_of("gpt2", ("cca.attention.output",), gates=0.5)
    plan = make_plan(settings, BatchShape.of(DATA.batches))
    whole, broken = (Run(tmp_path / name, plan, DATA) for name in ("whole", "broken"))
    states = []
    whole.train()
    broken.every(10, lambda step, state: states.append(digests(state.params)))
    broken.train()
    (tmp_path / "broken" / CHECKPOINTS / "20").rename(tmp_path / "away")
    again = Run(tmp_path / "broken", plan, DATA)
    again.train()
    assert digests(nnx.state(again.model())) == digests(nnx.state(whole.model())) == states[-1]
    assert (np.asarray(again.model().cca.gate[...]) == 0.5).all()


def test_the_papers_encoder_beside_a_frozen_base(tmp_path):
    """Start `random`: query-conditioned encoder and CCA of the seed, trained beside the base."""
    retro = decoder_config(
        open_base(FOLDER / "qwen3").config,
        cca_layers=(2,),
        chunk_length=4,
        neighbour_length=8,
        encoder_d_model=12,
        encoder_num_layers=1,
        encoder_num_heads=2,
        encoder_head_dim=8,
        encoder_d_ff=16,
    )
    settings = settings_of("qwen3", ("encoder.*", "cca.*"), retro=retro)
    run = Run(tmp_path / "retro", make_plan(settings, BatchShape.of(DATA.batches)), DATA)
    run.train()
    batch, model = batch_of(), run.model()
    off = logits(model, batch.without_neighbours())
    base = loaded(retro.baseline(), "qwen3")
    assert (off == logits(base, batch.without_neighbours())).all()
    assert (logits(model, batch) != off).any()
