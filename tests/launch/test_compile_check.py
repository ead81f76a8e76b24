"""launch.compile_check on simulated devices, which need no libtpu, and every refusal.

The same with the real TPU compiler is a command: README.md, "Will it fit?".
"""

import json

import jax
import pytest
from jax.experimental import topologies

from launch import compile_check
from launch.common import app
from retro_jax.costs import step_report, topology
from retro_jax.costs.roofline import Bound, parse_slice

SMALL = """
RetroConfig.vocab_size = 512
RetroConfig.d_model = 64
RetroConfig.num_layers = 2
RetroConfig.num_heads = 2
RetroConfig.head_dim = 32
RetroConfig.d_ff = 128
RetroConfig.cca_layers = (2,)
RetroConfig.encoder_d_model = 32
RetroConfig.encoder_num_layers = 1
RetroConfig.encoder_num_heads = 2
RetroConfig.encoder_d_ff = 64
ExecutionConfig.remat = 'full'
ExecutionConfig.attention = 'plain'
BatchConfig.sequence_length = 128
BatchConfig.batch_size = 8
TrainConfig.steps = 1000
MeshConfig.fsdp = 2
MeshConfig.tensor = 2
"""


@pytest.fixture
def settings(tmp_path):
    """A gin file of a small model."""
    path = tmp_path / "small.gin"
    path.write_text(SMALL)
    return path


def run(settings, *arguments, topology="cpu:4"):
    """The entry point's status."""
    argv = ["compile_check", f"--gin_file={settings}", f"--topology={topology}", *arguments]
    return app.execute(compile_check.main, argv)


def refused(capsys, settings, *arguments, **options):
    """What it prints when it refuses, which is one line."""
    assert run(settings, *arguments, **options) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_step_is_compiled_and_its_costs_are_told(settings, tmp_path, capsys):
    """Memory, operations and collectives of the compiled program; no HBM nor roofline off TPU."""
    assert run(settings, f"--json={tmp_path / 'figures.json'}") == 0
    out = capsys.readouterr().out
    for words in ("RETRO of", "simulated devices: mesh data=1 fsdp=2 tensor=2", "all-gather"):
        assert words in out
    assert "MFU" not in out
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["topology"], found["positions"]) == ("cpu:4", "relative")
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    retro = compile_check.make_settings().retro
    weights = 4 * retro.num_parameters() / 4  # bytes of float32 over four devices
    memory = found["memory"]
    assert weights < memory["parameters"] < 1.05 * weights  # scales are on every device
    assert 2 * weights < memory["optimizer"] < 2.1 * weights
    assert memory["temporaries"] > 0
    assert memory["average"] == 0
    parts = ("parameters", "optimizer", "average", "batch", "temporaries")
    assert memory["total"] == sum(memory[part] for part in parts)
    # remat makes the forward pass once more; plain attention makes both halves of its square, and
    # twice as many distances as there are keys
    assert 1.1 < found["program_flops"] / found["model_flops"] < 2.0
    axes = {(each["kind"], each["axes"]) for each in found["collectives"]}
    assert ("all-gather", "fsdp") in axes
    assert any(axis == "tensor" for _, axis in axes)


def _figures(settings, tmp_path, *bindings):
    """The figures of a run with further settings."""
    path = tmp_path / "figures.json"
    assert run(settings, f"--json={path}", *(f"--gin_bindings={b}" for b in bindings)) == 0
    return json.loads(path.read_text())


def test_the_plan_is_that_of_training(settings, tmp_path, capsys):
    """Accumulation, moving average, loss_jump and what is trained show in the memory."""
    plain = _figures(settings, tmp_path)
    weights = plain["memory"]["parameters"]
    state = weights + plain["memory"]["optimizer"]
    assert state <= plain["restore"] < 1.01 * state
    assert state < plain["first_state"]  # its outputs; random bits and code besides

    capsys.readouterr()
    bindings = ("accumulate = 4", "average_decay = 0.99", "loss_jump = 1.0")
    planned = _figures(settings, tmp_path, *(f"TrainConfig.{each}" for each in bindings))
    assert "moving average" in capsys.readouterr().out
    assert planned["memory"]["temporaries"] < 0.9 * plain["memory"]["temporaries"]
    assert planned["memory"]["average"] == weights
    named = ("parameters", "optimizer", "average", "batch", "temporaries")
    assert planned["memory"]["total"] == sum(planned["memory"][part] for part in named)
    assert planned["restore"] == plain["restore"] + weights + 8  # of loss_jump two numbers
    # its outputs are the whole state; the copy may take memory that random bits had before
    assert planned["first_state"] > max(plain["first_state"], planned["restore"])

    fitted = _figures(settings, tmp_path, "StartConfig.trained = ('encoder.*', 'cca.*')")
    assert fitted["memory"]["optimizer"] < 0.7 * plain["memory"]["optimizer"]


def test_a_slice_of_chips_has_memory_and_a_roofline(settings, capsys, monkeypatch):
    """What is told of a TPU, on a report made by hand."""
    slice_ = parse_slice("v5e:2x2")
    bound = Bound(
        {"compute": 2.0, "HBM": 0.5, "ICI": 1.5}, 1.5 * slice_.chip.peak, slice_.chip.peak
    )
    report = step_report.Report(
        mesh={"data": 1, "fsdp": 4, "tensor": 1},
        memory=step_report.Memory(2**30, 2**31, 0.0, 0.0, 2**32),
        first_state=2**31,
        restore=2**30,
        model_flops=1.5e12,
        costs=step_report.Costs(2e12, 3e9, ()),
        exchanges=(
            step_report.Exchange("all-gather", "fsdp", 7, 5e9, 0.1, {"here": 4e9, "there": 1e9}),
        ),
        bound=bound,
        compile_seconds=3.0,
        lowered_bytes=2_000_000,
        compiled_bytes=3_000_000,
    )
    monkeypatch.setattr(topology, "devices", lambda name: (jax.devices()[:4], slice_))
    monkeypatch.setattr(compile_check, "check", lambda plan, slice_: report)
    assert run(settings, topology="v5e:2x2") == 0
    out = capsys.readouterr().out
    for words in (
        "v5e:2x2, 4 chips",
        "total                                    7.000 GiB of 16 (44%)",
        "making the first state                   2.000 GiB",
        "restoring a checkpoint                   1.000 GiB",
        "1.33 of the model's",
        "a step takes at least 2.000 s, bound by compute",
        "at most 512 tokens a second, MFU 75.0%; if nothing overlapped 37.5%",
    ):
        assert words in out
    gathered = [line.split() for line in out.splitlines() if "here" in line or "all-" in line]
    assert gathered == [
        ["all-gather", "fsdp", "7", "5.0000"],
        ["4.0000", "here"],
        ["1.0000", "there"],
    ]


def test_without_libtpu_the_extra_is_named(settings, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(capsys, settings, topology="v5e:2x2")
    assert "needs libtpu, which is not installed: pip install 'retro-jax[tpu]'" in error


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "names no known chip: expected one of v4, v5e, v5p, v6e and extents"),
        ("v5e:2x2x2", "expected 2 positive extents, as in v5e:4x4"),
        ("cpu:0", "expected a positive number of devices, as in cpu:8"),
        ("cpu:9", "expected at most the 8 CPU devices there"),
        ("", "--topology is missing: expected chips to compile for, as in v5p:4x4x4"),
    ],
)
def test_unknown_topologies_are_refused(settings, capsys, topology, message):
    assert message in refused(capsys, settings, topology=topology)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            "MeshConfig.fsdp = 3",
            "mesh data=-1 fsdp=3 tensor=2 does not fit 4 devices: expected axes whose product is 4",
        ),
        (
            "RetroConfig.num_heads = 3",
            "num_heads 3 cannot be split over mesh axis tensor=2: expected a divisor of 3",
        ),
        (
            "BatchConfig.batch_size = 7",
            "batch size 7 cannot be split over data x fsdp = 2: expected a multiple of 2",
        ),
        ("ExecutionConfig.remat = 'some'", "expected one of ('none', 'dots', 'full')"),
        (
            "ExecutionConfig.attention = 'flash'",
            "expected one of ('auto', 'plain', 'chunked', 'fused')",
        ),
        (
            "ExecutionConfig.attention = 'fused'",
            "is 'fused', but cpu has no fused kernel (gpu and tpu have): expected 'auto', 'chunked'",
        ),
        (
            "RetroConfig.chunk_length = 48",
            "sequence_length 128: expected a multiple of chunk_length 48",
        ),
        (
            "RetroConfig.neighbour_length = 96",
            "neighbour_length is 96: expected 128, as BatchConfig.neighbour_part is 'both'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_compiling(settings, capsys, binding, message):
    assert message in refused(capsys, settings, f"--gin_bindings={binding}")


def test_what_libtpu_refuses_is_one_line(settings, capsys, monkeypatch):
    """A grid that no slice has; the compiler's own words, and what would fit."""

    def refuse(**arguments):
        assert arguments == {"platform": "tpu", "topology_name": "v5e:3x3"}
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such grid.\nAnd more.")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    for variable in topology.ENVIRONMENT:  # which is not to be set for the other tests
        monkeypatch.setenv(variable, "")
    error = refused(capsys, settings, topology="v5e:3x3")
    assert "libtpu knows no topology 'v5e:3x3' (No such grid): expected extents such as" in error
    assert "v5e:4x4" in error
