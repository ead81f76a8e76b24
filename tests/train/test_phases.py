"""Where time goes, and who is behind."""

import pytest

from retro_jax.train.phases import Phases
from retro_jax.train.watchdog import Report, blame


def test_the_clock_is_split_by_phase(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    phases = Phases()
    for step in (1, 2):
        with phases.during("input", step):
            assert phases.now == ("input", step)
            now[0] += 2.0
        with phases.during("device", step):
            now[0] += 5.0
        now[0] += 1.0
        assert (phases.now, phases.since) == (("step", step), now[0] - 1.0)
    expected = {"seconds": 8.0, "seconds/input": 2.0, "seconds/device": 5.0}
    assert phases.flush(2) == pytest.approx(expected)
    now[0] += 3.0
    assert phases.flush(1) == pytest.approx({"seconds": 3.0})


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        # Process 1 waits for its data: the others dispatched a step more and wait for it.
        (
            [("device", 7, 90), ("input", 6, 90), ("device", 7, 90)],
            "process 1 is behind, at step 6 (input)",
        ),
        # All at one step, but one of them not in the collective.
        (
            [("device", 7, 90), ("step", 7, 90), ("checkpoint", 7, 90)],
            "process 2 is behind, at step 7 (checkpoint)",
        ),
        # A process that is stopped says nothing more, whatever it was at.
        (
            [("device", 7, 90), ("device", 7, 40), ("device", 7, 91)],
            "process 1 gave no sign of life for 51 s",
        ),
        (
            [("device", 7, 90), ("device", 7, 90)],
            "all are at step 7 (device): a device or the network",
        ),
        ([("device", 7, 90), ("device", 6, 90), ("device", 6, 90)], "processes 1, 2 are behind"),
    ],
)
def test_who_is_behind(reports, expected):
    found = blame({i: Report(*report) for i, report in enumerate(reports)}, len(reports), 10.0)
    assert found.startswith(expected)


def test_a_process_that_never_reported_is_named():
    assert blame({0: Report("start", 0, 5.0)}, 3, 10.0) == "processes 1, 2 said nothing at all"
