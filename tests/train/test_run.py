"""Training from Python: a plan that refuses, a run that resumes to the same bits, and its hooks."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Generator, Sequence

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.batch import RetroBatch
from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.sharding import MeshConfig
from retro_jax.train.checkpoint import latest_step
from retro_jax.train.curves import read_curve, without_clock
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.held_out import OFF, ON
from retro_jax.train.loop import StopRequest, TrainConfig
from retro_jax.train.optimizer import OptimizerConfig
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.plan import Settings, make_plan, model_maker
from retro_jax.train.run import Run
from retro_jax.train.step import compile_first_state
from tests.model.tiny import TINY

SETTINGS = Settings(
    retro=TINY,
    training=TrainConfig(
        steps=6,
        log_every=1,
        checkpoint_every=3,
        evaluate_every=3,
        evaluate_batches=1,
        average_decay=0.9,
        loss_jump=5.0,
    ),
    optimizer=OptimizerConfig(max_learning_rate=0.01, warmup_steps=2),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the batches are configured with."""

    batch_size: int = 8
    sequence_length: int = 16
    neighbours: int = 2


class RandomBatches:
    """Batches that are a function of their number."""

    noise = False

    def __init__(self, first: int = 0):
        self.config, self.corpora, self.sequences = Sizes(), ["a", "b"], {"a": 8, "b": 8}
        self._first = first

    def rows(self, step: int, rows: Sequence[int] | None = None) -> RetroBatch:
        draw = np.random.default_rng(self._first + step)
        chunks = self.config.sequence_length // TINY.chunk_length
        near = (8, chunks, self.config.neighbours, TINY.neighbour_length)
        whole = RetroBatch(
            tokens=draw.integers(1, TINY.vocab_size, (8, 16)).astype(np.int32),
            targets=draw.integers(1, TINY.vocab_size, (8, 16)).astype(np.int32),
            documents=np.zeros((8, chunks), np.int32),
            corpus=(np.arange(8) % 2).astype(np.int32),
            neighbours=draw.integers(1, TINY.vocab_size, near).astype(np.int32),
        )
        chosen = list(range(8)) if rows is None else list(rows)
        return jax.tree.map(lambda array: array[chosen], whole)

    def iterate(
        self, start_step: int = 0, rows: Sequence[int] | None = None
    ) -> Generator[RetroBatch, None, None]:
        for step in itertools.count(start_step):
            yield self.rows(step, rows)

    def document_ids(self, step: int) -> list[str]:
        return [f"document {step}"]


class Data:
    """Data that no artefact is behind."""

    batches, source, parents = RandomBatches(), "nowhere", {"chunks/train": "a" * 64}

    def held_out(self) -> RandomBatches:
        return RandomBatches(first=1000)

    def check_model(self, retro: RetroConfig) -> None:
        if retro.pad_id:
            raise UserError("RetroConfig.pad_id is not that of the data")


DATA = Data()


@pytest.fixture(name="plan", scope="module")
def _plan():
    """The plan of all runs here."""
    return make_plan(SETTINGS, BatchShape.of(DATA.batches))


@pytest.fixture(name="whole", scope="module")
def _whole(plan, tmp_path_factory):
    """A run without a break: (the run, the lines that it told its hook, the states of steps 2, 4, 6)."""
    run = Run(tmp_path_factory.mktemp("whole") / "retro", plan, DATA)
    told, states = [], {}
    run.on_metrics(lambda step, metrics: told.append({"step": step, **metrics}))
    run.every(2, lambda step, state: states.update({step: jax.device_get(state)}))
    assert run.train() == 6
    return run, told, states


def _bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(tree).items()}


def test_hooks_see_the_lines_and_the_states(whole):
    run, told, states = whole
    assert told == read_curve(run.directory / "metrics.jsonl")
    assert [line["step"] for line in told] == list(range(1, 7))
    assert [line["step"] for line in told if {ON, OFF} <= set(line)] == [3, 6]
    assert {step: int(state.step) for step, state in states.items()} == {2: 2, 4: 4, 6: 6}


def test_a_finished_run_trains_no_more_and_gives_its_model(whole):
    run, told, states = whole
    assert run.claim()
    assert run.train() == 6
    assert len(told) == 6
    model, batch = run.model(), DATA.batches.rows(0)
    logits = model(batch.tokens, batch.neighbours, batch.documents)
    assert logits.shape == (8, 16, TINY.vocab_size)
    expected = {n: leaf for n, leaf in named_leaves(states[6].params).items() if n.startswith("e")}
    for name, leaf in expected.items():
        found = named_leaves(nnx.state(model))[name]
        np.testing.assert_array_equal(found, leaf)
    average = named_leaves(nnx.state(run.model(averaged=True)))
    assert any(np.any(average[name] != leaf) for name, leaf in expected.items())


def test_a_hook_may_stop_a_run_which_resumes_to_the_same_bits(plan, whole, tmp_path, capsys):
    stop = StopRequest()
    run = Run(tmp_path / "retro", plan, DATA)
    run.every(4, lambda step, state: stop.request())
    assert run.train(stop) == 4
    assert latest_step(run.directory / "checkpoints") == 4
    ends = []
    again = Run(tmp_path / "retro", plan, DATA)
    again.every(6, lambda step, state: ends.append(_bits(state)))
    assert again.train() == 6
    assert "going on from step 4 of 6" in capsys.readouterr().out
    assert ends == [_bits(whole[2][6])]
    curves = [read_curve(r.directory / "metrics.jsonl") for r in (whole[0], again)]
    assert list(map(without_clock, curves[0])) == list(map(without_clock, curves[1]))


def test_a_finished_run_becomes_longer_where_its_learning_rates_stay(plan, whole, tmp_path):
    directory = tmp_path / "retro"
    shutil.copytree(whole[0].directory, directory)
    training = dataclasses.replace(SETTINGS.training, steps=10)
    settings = dataclasses.replace(SETTINGS, training=training)
    with pytest.raises(
        UserError, match=r"was begun with 6: expected OptimizerConfig.restarts = \(6,\)"
    ):
        Run(directory, dataclasses.replace(plan, settings=settings), DATA).train()
    optimizer = dataclasses.replace(SETTINGS.optimizer, restarts=(6,))
    settings = dataclasses.replace(settings, optimizer=optimizer)
    assert Run(directory, make_plan(settings, BatchShape.of(DATA.batches)), DATA).train() == 10
    lines, before = read_curve(directory / "metrics.jsonl"), whole[1]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[:6] == before
    rates = [line["learning_rate"] for line in lines]
    assert rates[6:9] == rates[:3]
    recorded = (directory / "config.gin").read_text()
    assert "TrainConfig.steps = 10\n" in recorded
    assert "OptimizerConfig.restarts = (6,)\n" in recorded


def test_a_run_records_its_settings_and_refuses_others(plan, whole):
    directory = whole[0].directory
    lines = (directory / "config.gin").read_text().splitlines()
    assert f"RetroConfig.cca_layers = {TINY.cca_layers}" in lines
    assert "Sizes.neighbours = 2" in lines
    assert "TrainConfig.average_decay = 0.9" in lines
    assert json.loads((directory / "parents.json").read_text()) == DATA.parents
    start, *_ = json.loads((directory / "versions.json").read_text())["starts"]
    assert start["data"] == "nowhere"
    training = dataclasses.replace(SETTINGS.training, seed=1, keep=9)
    other = dataclasses.replace(plan, settings=dataclasses.replace(SETTINGS, training=training))
    with pytest.raises(UserError, match=r"other settings: TrainConfig\.seed 0 -> 1; expected"):
        Run(directory, other, DATA).train()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("training", {"accumulate": 3}, "accumulate is 3: expected a divisor of the batch size 8"),
        ("training", {"steps": 2}, "warmup_steps is 2: expected fewer than"),
        ("retro", {"chunk_length": 3}, "sequence_length 16: expected a multiple of chunk_length 3"),
        ("mesh", {"fsdp": 3}, "does not fit 8 devices"),
        ("start", {"trained": ("nothing.*",)}, "'nothing.*', which no parameter matches"),
    ],
)
def test_a_plan_refuses_what_does_not_fit(part, change, message):
    changed = dataclasses.replace(getattr(SETTINGS, part), **change)
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        make_plan(dataclasses.replace(SETTINGS, **{part: changed}), BatchShape.of(DATA.batches))


def test_a_run_refuses_other_data_before_anything_is_written(plan, tmp_path):
    longer = dataclasses.replace(plan, shape=dataclasses.replace(plan.shape, sequence_length=32))
    with pytest.raises(
        UserError, match=r"the plan is for .*sequence_length=32.*: expected the data"
    ):
        Run(tmp_path / "new", longer, DATA)
    retro = dataclasses.replace(TINY, pad_id=1)
    other = dataclasses.replace(plan, settings=dataclasses.replace(SETTINGS, retro=retro))
    with pytest.raises(UserError, match="pad_id is not that of the data"):
        Run(tmp_path / "new", other, DATA)
    with pytest.raises(UserError, match="a hook every 0 steps: expected a positive number"):
        Run(tmp_path / "new", plan, DATA).every(0, print)
    assert not (tmp_path / "new").exists()


def test_the_first_state_of_a_plan_is_its_own_on_every_call():
    """Made twice it has the same bits, in the layout that the plan states."""
    settings = dataclasses.replace(SETTINGS, mesh=MeshConfig(fsdp=2))
    plan = make_plan(settings, BatchShape.of(DATA.batches))
    make_model = model_maker(settings)
    with jax.set_mesh(plan.mesh):
        expected = compile_first_state(make_model, plan.optimizer, plan.abstract)()
        found = plan.first_state()
    assert _bits(found) == _bits(expected)
    assert {"average", "recent_loss"} <= {name.split(".")[0] for name in _bits(found)}
    layouts = jax.tree.map(lambda leaf: leaf.sharding, found)
    assert layouts == jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
