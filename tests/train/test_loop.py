"""The loop: resuming to the same bits, stopping when asked, refusing to save what is not finite."""

import contextlib
import dataclasses
import itertools
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.errors import UserError
from retro_jax.sharding import MeshConfig, batch_sharding, make_mesh
from retro_jax.train.bad_batches import BadBatches
from retro_jax.train.checkpoint import Checkpoints, latest_step
from retro_jax.train.curves import Observer, Watched, read_curve, without_clock
from retro_jax.train.global_batches import global_batch, global_batches, local_rows
from retro_jax.train.held_out import OFF, ON, evaluation_hook, make_evaluation
from retro_jax.train.loop import StopRequest, TrainConfig, train
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.utilisation import Profile
from tests.train.small import PAD, Trainer, host_batch

_CONFIG = TrainConfig(steps=12, log_every=2, checkpoint_every=4)


@pytest.fixture(name="trainer", scope="module")
def _trainer():
    """A trainer on two devices, whose step is compiled once for all tests."""
    trainer = Trainer(make_mesh(MeshConfig(), jax.devices()[:2]), dropout=0.1)
    trainer.first = jax.device_get(trainer.state)
    return trainer


def _train(trainer, directory, *, batches=None, stop=None, config=_CONFIG, bad=None, **more):
    """Starts or resumes a run in a directory; the state it ends with."""
    profile, evaluate = more.pop("profile", None), more.pop("evaluate", None)
    checkpoints = Checkpoints(directory / "checkpoints", keep=config.keep)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract)
    first = jax.device_put(trainer.first, shardings)
    state = checkpoints.restore(trainer.abstract) or first
    start = int(state.step)
    observer = Observer(
        directory,
        corpora=["a", "b"],
        learning_rate=lambda t: 0.1,
        start_step=start,
        steps=config.steps,
        log_every=config.log_every,
        watched=Watched(bad or BadBatches(), profile=profile),
    )
    if evaluate is not None:
        more["hooks"] = [evaluation_hook(evaluate, config.evaluate_every, observer.note)]
    if batches is None:
        batches = (host_batch(step) for step in itertools.count(start))
    with jax.set_mesh(trainer.mesh), _closing(checkpoints, observer):
        return train(
            state,
            global_batches(batches, trainer.mesh, 8, local_rows(trainer.mesh, 8)),
            step=trainer.step,
            config=config,
            checkpoints=checkpoints,
            observer=observer,
            stop=stop or StopRequest(),
            **more,
        )


@contextlib.contextmanager
def _closing(*things):
    """Closes things in order, as a process would at its end."""
    with contextlib.ExitStack() as stack:
        for thing in reversed(things):
            stack.callback(thing.close)
        yield


def _curve(directory):
    """The lines of a run without their timing."""
    lines = read_curve(directory / "metrics.jsonl")
    return [without_clock(line) for line in lines]


def _bits(state):
    return {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(state).items()}


class _KilledError(Exception):
    """Stands for the end of the process."""


def test_a_run_cut_short_ends_with_the_same_bits_and_the_same_curve(trainer, tmp_path):
    whole = _train(trainer, tmp_path / "whole")
    assert whole.step == 12
    assert latest_step(tmp_path / "whole" / "checkpoints") == 12

    def until(step: int, start: int):
        yield from (host_batch(t) for t in range(start, step))
        raise _KilledError

    with pytest.raises(_KilledError):
        _train(trainer, tmp_path / "cut", batches=until(7, 0))
    assert latest_step(tmp_path / "cut" / "checkpoints") == 4
    assert _curve(tmp_path / "cut")[-1]["step"] == 6  # beyond the checkpoint
    with pytest.raises(_KilledError):
        _train(trainer, tmp_path / "cut", batches=until(9, 4))
    resumed = _train(trainer, tmp_path / "cut")
    assert _bits(resumed) == _bits(whole)
    assert _curve(tmp_path / "cut") == _curve(tmp_path / "whole")
    assert [line["step"] for line in _curve(tmp_path / "whole")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_to_the_same_bits(trainer, tmp_path, number):
    whole = _train(trainer, tmp_path / "whole")
    stop = StopRequest()

    def batches():
        for step in itertools.count():
            if step == 5:
                os.kill(os.getpid(), number)
            yield host_batch(step)

    with stop.listening():
        state = _train(trainer, tmp_path / "cut", batches=batches(), stop=stop)
    assert (stop.signal, int(state.step)) == (number, 6)
    assert latest_step(tmp_path / "cut" / "checkpoints") == 6
    assert _bits(_train(trainer, tmp_path / "cut")) == _bits(whole)


def test_a_second_signal_stops_at_once():
    stop, before = StopRequest(), signal.getsignal(signal.SIGTERM)
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_not_finite_is_not_saved(trainer, tmp_path):
    sane = trainer.step

    def poisoned(state, batch):
        state, metrics = sane(state, batch)
        return state, dataclasses.replace(metrics, loss=metrics.loss / (8 - state.step))

    trainer.step = jax.jit(poisoned)
    try:
        with pytest.raises(UserError, match=r"loss is (inf|-inf|nan) at step 8"):
            _train(trainer, tmp_path)  # step 8 would have been saved
    finally:
        trainer.step = sane
    assert latest_step(tmp_path / "checkpoints") == 4


def _poisoned(trainer, when):
    """The trainer's step with a loss that is not finite at some steps, counted from 1."""
    sane = trainer.step

    def step(state, batch):
        number = int(state.step) + 1
        state, metrics = sane(state, batch)
        loss = metrics.loss * np.nan if number in when else metrics.loss
        return state, dataclasses.replace(metrics, loss=loss)

    return step


def test_bad_batches_may_be_left_out_and_are_told(trainer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trainer, "step", _poisoned(trainer, {5, 6}))
    bad = BadBatches(skip=True, describe=lambda step: f" (documents of {step})")
    monkeypatch.setattr(jax, "transfer_guard", lambda _: contextlib.nullcontext())
    state = _train(trainer, tmp_path, bad=bad)
    assert state.step == 12
    assert "loss is nan at step 5: expected a finite number (documents of 5): its" in caplog.text
    lines = _curve(tmp_path)
    assert [(line["step"], line["skipped"]) for line in lines if "skipped" in line] == [(6, 2)]
    assert [line["step"] for line in lines if "loss" not in line] == [6]
    assert all(np.isfinite(line.get("loss", 0.0)) for line in lines)


def test_too_many_bad_batches_in_a_row_stop_the_run(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "step", _poisoned(trainer, range(2, 13)))
    monkeypatch.setattr(jax, "transfer_guard", lambda _: contextlib.nullcontext())
    with pytest.raises(UserError, match=r"nan at step 11: .*the last 10 batches were all bad"):
        _train(trainer, tmp_path, bad=BadBatches(skip=True))


def test_held_out_losses_stand_in_the_lines_of_their_steps(trainer, tmp_path):
    batches = [host_batch(100 + i) for i in range(2)]

    def spread():
        for batch in batches:
            yield global_batch(batch, trainer.mesh, 8, local_rows(trainer.mesh, 8))

    evaluate = make_evaluation(trainer.graphdef, spread, PAD)
    config = dataclasses.replace(_CONFIG, evaluate_every=4)
    plain = _train(trainer, tmp_path / "plain")
    state = _train(trainer, tmp_path / "evaluated", config=config, evaluate=evaluate)
    assert _bits(state) == _bits(plain)  # looking does not change what is seen
    lines = _curve(tmp_path / "evaluated")
    assert [line["step"] for line in lines if ON in line] == [4, 8, 12]
    params = jax.device_get(state.params)
    for name, change in ((ON, lambda b: b), (OFF, lambda b: b.without_neighbours())):
        model = nnx.merge(trainer.graphdef, params)
        losses = [np.asarray(model.token_losses(change(batch))) for batch in batches]
        present = [batch.targets != PAD for batch in batches]
        expected = sum(x[p].sum() for x, p in zip(losses, present, strict=True)) / sum(
            p.sum() for p in present
        )
        assert lines[-1][name] == pytest.approx(expected, rel=1e-5)
    names = {name for line in read_curve(tmp_path / "evaluated" / "metrics.jsonl") for name in line}
    assert {"seconds", "seconds/evaluation", "seconds/checkpoint", "memory/host"} <= names


def test_chosen_steps_are_traced(trainer, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(("start", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", at[0])))
    at = [0]

    class Watching(Profile):
        def begin_step(self, number):
            at[0] = number
            super().begin_step(number)

    _train(trainer, tmp_path / "a", profile=Watching("folder", 5, 6))
    assert calls == [("start", "folder"), ("stop", 8)]  # once step 6 is known to have ended
    calls.clear()
    _train(trainer, tmp_path / "b", profile=Watching("folder", 11, 40))
    assert calls == [("start", "folder"), ("stop", 12)]  # the run ends first


def test_a_finished_run_makes_no_step(trainer, tmp_path):
    state = _train(trainer, tmp_path)
    again = _train(trainer, tmp_path, batches=iter(()))
    assert _bits(again) == _bits(state)


def test_hosts_make_only_the_rows_of_their_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    assert local_rows(mesh, 8) == list(range(8))
    batch = host_batch(0)
    spread = global_batch(batch, mesh, 8, local_rows(mesh, 8))
    assert spread.tokens.sharding == batch_sharding(mesh)
    for name, array in vars(spread).items():
        np.testing.assert_array_equal(array, getattr(batch, name))
    assert global_batch(batch.without_neighbours(), mesh, 8, list(range(8))).neighbours is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", -1),
        ("seed", -1),
        ("neighbour_dropout", 1.5),
        ("noise_target", "base"),
        ("noise_weight", 2.0),
        ("noise_unlearning", 3.0),
        ("noise_unlearning", -1.0),
        ("log_every", 0),
        ("checkpoint_every", 15),
        ("keep", 0),
        ("keep_every", -1),
        ("accumulate", 0),
        ("average_decay", 1.0),
        ("loss_jump", -0.5),
        ("hang_seconds", -1.0),
        ("evaluate_every", 15),
        ("evaluate_batches", 0),
    ],
)
def test_every_validation(field, value):
    with pytest.raises(UserError, match=rf"TrainConfig\.{field} is {value!r}: expected"):
        TrainConfig(**{"steps": 10, field: value})
