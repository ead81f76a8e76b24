"""Curves: window means, appending, and resuming without doubling."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from retro_jax.errors import UserError
from retro_jax.train.curves import Averager, CurveWriter, Observer, read_curve, truncate_curve
from retro_jax.train.layer_norms import as_values, layer_norms
from retro_jax.train.loop import TrainConfig
from retro_jax.train.step import StepMetrics
from retro_jax.train.trackers import check_trackers


def _step(loss: float, tokens: list[int], grad_norm: float = 1.0) -> StepMetrics:
    """Metrics of one step whose corpora have the given tokens, all of the same loss."""
    return StepMetrics(
        loss=np.float32(loss),
        tokens=np.int32(sum(tokens)),
        grad_norm=np.float32(grad_norm),
        param_norm=np.float32(7.0),
        corpus_losses=np.float32(loss) * np.array(tokens, np.float32),
        corpus_tokens=np.array(tokens, np.int32),
        bad=np.bool_(False),
        recent_loss=np.float32(0),
    )


def test_means_weigh_tokens_not_steps():
    averager = Averager(["code", "wiki"])
    averager.add(_step(2.0, [10, 0], grad_norm=1.0))
    averager.add(_step(4.0, [10, 20], grad_norm=2.0))
    means = averager.flush()
    assert means["loss"] == pytest.approx((20 + 40 + 80) / 40)
    assert means["loss/code"] == pytest.approx(3.0)
    assert means["loss/wiki"] == pytest.approx(4.0)
    assert (means["grad_norm"], means["param_norm"]) == (1.5, 7.0)
    assert (means["steps"], means["tokens"]) == (2, 40)
    averager.add(_step(1.0, [0, 3]))
    assert "loss/code" not in averager.flush()  # no token of it: nothing to say
    averager.skip()
    averager.skip()
    means = averager.flush()
    assert (means["steps"], means["tokens"], means["skipped"]) == (2, 0, 2)
    assert not {"loss", "grad_norm", "param_norm"} & set(means)  # not a loss of 0


def test_the_rate_is_of_the_last_seconds_and_not_of_compilation(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    averager = Averager(["code"])

    def step_after(seconds: float, tokens: int) -> float | None:
        now[0] += seconds
        averager.add(_step(1.0, [tokens]))
        return averager.rate

    assert step_after(60.0, 1000) is None  # compilation
    assert "tokens_per_second" not in averager.flush()
    assert step_after(2.0, 300) == pytest.approx(150.0)
    assert averager.flush()["tokens_per_second"] == pytest.approx(150.0)
    assert step_after(4.0, 900) == pytest.approx(200.0)  # 1200 in 6 seconds
    for _ in range(20):
        rate = step_after(5.0, 500)
    assert rate == pytest.approx(100.0)  # what was before the last half minute is forgotten


def test_a_resumed_curve_goes_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = CurveWriter(tmp_path, 0)
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1.0})
    writer.close()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    writer = CurveWriter(tmp_path, 20)
    writer.write(30, {"loss": 2.0})
    writer.close()
    assert [(e["step"], e["loss"]) for e in read_curve(path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert not list(tmp_path.glob("*.tmp"))


def test_goodput_is_the_share_of_all_starts(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])

    def start(after: int, lines: list[tuple[int, float, float, int]]) -> None:
        writer = CurveWriter(tmp_path, after)
        for step, waited, seconds, skipped in lines:
            now[0] += waited
            writer.write(step, {"steps": 10, "seconds": seconds, "skipped": skipped})
        writer.close()

    start(0, [(10, 60.0, 6.0, 0), (20, 20.0, 2.0, 0), (30, 20.0, 2.0, 0)])  # it compiled for 40 s
    now[0] += 50.0  # and was away; the step of 30 was lost
    start(20, [(30, 50.0, 2.0, 4)])
    lines = read_curve(tmp_path / "metrics.jsonl")
    assert [line.get("began") for line in lines] == [1000.0, None, None]
    assert [line["goodput"] for line in lines] == pytest.approx([1.0, 20 * 4 / 80, 26 * 2 / 200])


def _shown(directory):
    """What TensorBoard shows of a run: {(name, step): value}, later starts in place of earlier ones."""
    shown = {}
    for path in sorted(directory.glob("events.*")):  # a name begins with its time
        data = path.read_bytes()
        while data:
            size = int.from_bytes(
                data[:8], "little"
            )  # and a checksum of 4 bytes, after the data too
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                shown = {(name, step): v for (name, step), v in shown.items() if step < event.step}
            shown |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return shown


def test_tensorboard_shows_what_the_curve_holds(tmp_path):
    for start, losses in ((0, [1 / 3, 0.25, 0.2]), (20, [7.125, 1e-9])):  # the step of 30 again
        writer = CurveWriter(tmp_path, start)
        for i, loss in enumerate(losses, 1):
            writer.write(start + 10 * i, {"loss": loss, f"seconds/{start}": i * 0.1, "tokens": 9})
        writer.close()
    lines = read_curve(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert len(list(tmp_path.glob("events.*"))) == 2
    assert _shown(tmp_path) == {
        (name, line["step"]): np.float32(value)
        for line in lines
        for name, value in line.items()
        if name != "step"
    }


def test_a_curve_of_whole_lines_is_kept_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": i, "loss": 1 / (i + 3)}) + "\n" for i in range(5))
    path.write_text(text)
    truncate_curve(path, 99)
    assert path.read_text() == text
    assert read_curve(tmp_path / "none.jsonl") == []


def test_a_line_that_is_no_json_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: expected a line of metrics"):
        read_curve(path)


def _observer(directory, start_step=0, steps=4):
    return Observer(
        directory,
        corpora=["code"],
        learning_rate=lambda t: 0.5 * t,
        start_step=start_step,
        steps=steps,
        log_every=3,
    )


def test_lines_come_every_so_many_steps_and_at_the_end(tmp_path, capsys):
    observer = _observer(tmp_path)
    for step in range(1, 5):
        observer.observe(step, _step(float(step), [10]))
    observer.close()
    lines = read_curve(tmp_path / "metrics.jsonl")
    seen = [(line["step"], line["steps"], line["loss"], line["learning_rate"]) for line in lines]
    assert seen == [(3, 3, 2.0, 1.0), (4, 1, 4.0, 1.5)]  # update 3 is t = 2
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "loss=4.0000" in shown


@pytest.mark.parametrize(
    ("name", "step"), [("loss", _step(np.nan, [1])), ("grad_norm", _step(1.0, [1], np.inf))]
)
def test_what_is_not_finite_stops_with_the_step(tmp_path, name, step):
    observer = _observer(tmp_path)
    with pytest.raises(UserError, match=rf"{name} is (nan|inf) at step 3: expected a finite"):
        observer.observe(3, step)
    assert read_curve(tmp_path / "metrics.jsonl") == []


class _FakeWandb(types.ModuleType):
    """A module wandb that notes what is asked of it."""

    def __init__(self, fails: str = ""):
        super().__init__("wandb")
        self.begun, self.lines, self.fails, self.finished = [], [], fails, 0

    def init(self, **options):
        if self.fails == "init":
            raise RuntimeError("no network")
        self.begun.append(options)
        return self

    def define_metric(self, name, *, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, line):
        if self.fails == "log":
            raise RuntimeError("no network")
        self.lines.append(line)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_is_one_run_over_all_starts(tmp_path, monkeypatch):
    fake = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 1):
        writer = CurveWriter(tmp_path, start, ("wandb",))
        writer.write(start + 1, {"loss": 2.0})
        writer.close()
    ids = {options["id"] for options in fake.begun}
    assert len(ids) == 1 and len(fake.begun) == fake.finished == 2
    assert fake.begun[0]["resume"] == "allow"
    assert fake.lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}]
    assert not list(tmp_path.glob("events.*"))
    assert [line["step"] for line in read_curve(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, caplog, fails):
    monkeypatch.setitem(sys.modules, "wandb", _FakeWandb(fails))
    writer = CurveWriter(tmp_path, 0, ("wandb", "tensorboard"))
    for step in (1, 2):
        writer.write(step, {"loss": 2.0})
    writer.close()
    assert caplog.text.count("Weights & Biases: no network; metrics.jsonl has the curves") == 1
    assert len(read_curve(tmp_path / "metrics.jsonl")) == 2
    assert list(tmp_path.glob("events.*"))


def test_trackers_that_cannot_be_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"expected pip install 'retro-jax\[wandb\]'"):
        check_trackers(("wandb",))
    check_trackers(("tensorboard",))
    for names in (("paper",), ("wandb", "wandb")):
        with pytest.raises(ValueError, match=r"TrainConfig.trackers is .* expected some of"):
            TrainConfig(steps=1, trackers=names)


def test_norms_of_layers_are_those_of_the_whole():
    tree = {
        "layers": {"a": np.arange(12.0).reshape(3, 4), "b": np.ones((3, 2, 2))},
        "encoder": {"layers": {"a": np.ones((2, 5))}, "norm": np.ones(4)},
        "embedding": {"table": np.full((3, 3), 2.0)},
    }
    norms = layer_norms(jax.tree.map(jnp.asarray, tree))
    values = as_values("grad_norm", jax.device_get(norms))
    assert set(values) == {
        *(f"grad_norm/layers/{i}" for i in (1, 2, 3)),
        *("grad_norm/encoder.layers/1", "grad_norm/encoder.layers/2"),
        *("grad_norm/encoder.norm", "grad_norm/embedding.table"),
    }
    assert values["grad_norm/layers/2"] == pytest.approx(np.sqrt(16 + 25 + 36 + 49 + 4))
    whole = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))
    assert np.sqrt(sum(value**2 for value in values.values())) == pytest.approx(whole)
    averager = Averager(["code"])
    averager.add(dataclasses.replace(_step(1.0, [3]), grad_norms=norms, param_norms=norms))
    means = averager.flush()
    assert means["param_norm/embedding.table"] == 6.0
    assert "grad_norm/layers/3" in means and not any("/layers" in n for n in averager.flush())
