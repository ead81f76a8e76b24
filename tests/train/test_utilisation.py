"""What of the machine is used, and TensorBoard beside metrics.jsonl."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retro_jax.train.curves import CurveWriter, read_curve
from retro_jax.train.utilisation import Machine, memory, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks_are_those_that_the_makers_publish(kind, peak):
    assert peak_flops(kind) == peak


def test_mfu_is_the_models_part_of_the_peak():
    assert Machine(6e12, devices=4, peak=3e12).mfu(2.0) == {"mfu": 0.25}
    assert Machine(6e12, devices=4, peak=None).mfu(2.0) == {}


def test_memory_is_in_gib():
    assert 0.05 < memory()["memory/host"] < 1000


def test_tensorboard_shows_what_metrics_jsonl_holds_after_a_second_start(tmp_path):
    for start, steps, shift in ((0, (1, 2, 3), 0.0), (2, (3, 4), 0.5)):
        writer = CurveWriter(tmp_path, start)
        for step in steps:
            writer.write(step, {"loss": 1.0 / step + shift, "validation/on": step / 8})
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    lines = read_curve(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in ("loss", "validation/on"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], pytest.approx(line[name])) for line in lines]
        assert shown == expected
