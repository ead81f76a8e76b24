"""The benchmarks of the training step, on a model that trains in milliseconds."""

import functools
import json
import stat

import jax
import pytest

from benchmarks import evaluation, rival, saving, scaling, train_step, training, variants
from benchmarks.timing import table
from launch.common import app
from retro_jax.config import PRESETS
from retro_jax.errors import UserError
from retro_jax.model.flops import training_flops

# An interpreter that speaks as benchmarks/rival_worker.py does: 2 x 128 tokens in half a second.
RIVAL = """#!/bin/sh
echo '{"torch": "0", "threads": 1, "parameters": 7}'
while read line; do echo '{"wall": 0.5, "processor": 0.25, "loss": 1.0}'; done
"""
TINY = ["--preset=tiny", "--turns=1"]


@pytest.fixture
def one_device(monkeypatch):
    """Compiles for one of the simulated devices, which takes half as long as for eight."""
    make = functools.partial(training.make_plan, devices=jax.devices()[:1])
    monkeypatch.setattr(training, "make_plan", make)


def refused(capsys, main, *arguments) -> str:
    """The one line that a benchmark refuses with."""
    assert app.execute(main, ["benchmark", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.usefixtures("one_device")
def test_what_saving_costs(tmp_path, capsys):
    flags = ["--preset=tiny", "--saves=2", "--plain_steps=2", f"--output={tmp_path}/out.json"]
    assert app.execute(saving.main, ["saving", *flags, f"--workdir={tmp_path}/W"]) == 0
    assert "saving once a minute takes" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    sizes = [p.stat().st_size for p in (tmp_path / "W").rglob("*") if p.is_file()]
    assert result["megabytes"] == pytest.approx(sum(sizes) / 2e6)
    for row in result["saves"]:
        assert 0 < row["handing over s"] <= row["until on disk s"]
        expected = row["until on disk s"] - row["steps meanwhile"] * row["step s"]
        assert row["added s"] == pytest.approx(expected)
        assert row["share at one a minute"] == pytest.approx(expected / 60)


@pytest.mark.usefixtures("one_device")
def test_sides_take_turns_and_are_compared(tmp_path, capsys):
    """One table and JSON: our two models and another package's process."""
    python = tmp_path / "python"
    python.write_text(RIVAL)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    flags = ["--against=retro-pytorch", f"--rival_python={python}", f"--output={tmp_path}/out.json"]
    assert app.execute(train_step.main, ["train_step", *TINY, *flags]) == 0
    out = capsys.readouterr().out
    assert "matrix product:" in out and "time over operations:" in out
    result = json.loads((tmp_path / "out.json").read_text())
    ours, baseline, other = result["table"]
    assert [row["what"] for row in result["table"]] == ["RETRO", "baseline", "retro-pytorch"]
    assert (other["tokens/s"], other["parameters"]) == (2 * 128 / 0.5, 7)
    assert other["of product"] / ours["of product"] == pytest.approx(ours["step s"] / 0.5)
    operations = result["operations, RETRO / baseline"]
    assert operations == pytest.approx(ours["GFLOP/token"] / baseline["GFLOP/token"])
    assert operations > 1
    ratio = result["time over operations"]
    assert ratio * operations == pytest.approx(ours["step s"] / baseline["step s"])
    assert result["tokens/s, RETRO / retro-pytorch"] == pytest.approx(0.5 / ours["step s"])
    peak = result["product TFLOP/s"]
    assert ours["of product"] == pytest.approx(ours["TFLOP/s/device"] / peak)


@pytest.mark.usefixtures("one_device")
def test_variants_that_do_not_exist_say_so_in_their_row(tmp_path, capsys):
    flags = ["--attention_kinds=chunked,fused", "--remat_policies=none", "--all_positions=rotary"]
    output = f"--output={tmp_path}/out.json"
    assert app.execute(variants.main, ["variants", *TINY, *flags, output]) == 0
    chunked, fused = json.loads((tmp_path / "out.json").read_text())["table"]
    assert chunked["what"] == "rotary, chunked 256, remat none"
    assert chunked["tokens/s"] > 0 and chunked["temporaries GB"] > 0 and not chunked["note"]
    assert fused["step s"] is None and "cpu has no fused kernel" in fused["note"]
    assert "cpu has no fused kernel" in capsys.readouterr().out


def test_evaluation_is_compared_with_the_forward_pass_alone(tmp_path, capsys, monkeypatch):
    make = functools.partial(evaluation.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(evaluation, "make_mesh", make)
    scored = []
    whole = evaluation.score_chunks
    monkeypatch.setattr(
        evaluation, "score_chunks", lambda *a: scored.append(whole(*a)) or scored[-1]
    )
    flags = ["--length=256", "--batches=2", f"--output={tmp_path}/out.json"]
    assert app.execute(evaluation.main, ["evaluation", *TINY, *flags]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["what"] for row in result["table"]] == ["RETRO", "baseline"]
    for row in result["table"]:
        quotient = row["evaluation tokens/s"] / row["forward tokens/s"]
        assert row["share"] == pytest.approx(quotient)
    assert "share" in capsys.readouterr().out
    # Two batches of two windows of four chunks, half of each context: ten chunks, all scored.
    assert [nll.shape for nll in scored] == [(10, 64)] * 2
    assert all((nll > 0).sum() == 10 * 64 - 1 for nll in scored)
    assert abs(scored[0] - scored[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (train_step.main, ["--preset=8b"], "--preset=8b: expected one of 172m, 425m"),
        (train_step.main, [*TINY, "--against=torch"], "expected --against=retro-pytorch and an"),
        (
            train_step.main,
            [*TINY, "--against=retro-pytorch", "--rival_python=/nowhere/python"],
            "--rival_python=/nowhere/python does not run (No such file or directory): expected",
        ),
        (
            train_step.main,
            [*TINY, "--against=retro-pytorch", "--rival_python=/bin/false"],
            "retro-pytorch stopped: no message",
        ),
        (
            variants.main,
            [*TINY, "--attention_blocks=64,x"],
            "--attention_blocks=64,x: expected num",
        ),
        (scaling.main, ["--folder=f", "--sizes=3b"], "--sizes=3b: expected some of 172m, 425m"),
        (scaling.main, ["--sizes=172m"], "--folder is missing: expected a folder"),
    ],
)
def test_bad_flags_are_one_line(capsys, main, arguments, message):
    assert message in refused(capsys, main, *arguments)


def test_the_other_package_gets_the_same_model_or_none():
    config, rows, length = training.OWN["peer"]
    job = rival.settings(config, rows=rows, length=length, neighbours=2)
    assert job["model"] | {"num_tokens": 16384, "dec_dim": 512, "dec_depth": 6} == job["model"]
    assert job["model"] | {"enc_dim": 256, "enc_depth": 2, "chunk_size": 64} == job["model"]
    assert job["model"]["dec_cross_attn_layers"] == [3, 6]
    assert job["batch"] == {
        "rows": 4,
        "length": 512,
        "chunks": 8,
        "neighbours": 2,
        "neighbour_length": 128,
    }
    with pytest.raises(UserError, match="retro-pytorch has 8 heads of one size"):
        rival.settings(PRESETS["172m"], rows=1, length=2048, neighbours=2)


def test_a_row_of_the_scaling_table():
    flops = training_flops(PRESETS["172m"], 2048, 2)
    report = {
        "topology": "v5p:2x2x4",
        "remat": "full",
        "positions": "rotary",
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "memory": {
            "parameters": 2**29,
            "optimizer": 2**30,
            "temporaries": 2**31,
            "total": 3.5 * 2**30,
            "hbm": 95 * 2**30,
        },
        "first_state": 1.75 * 2**30,
        "restore": 1.5 * 2**30,
        "model_flops": flops,
        "program_flops": 1.5 * flops,
        "bound": {
            "seconds": {"compute": 2.0, "HBM": 1.0, "ICI": 0.5},
            "step": 2.0,
            "binds": "compute",
            "mfu": 0.6,
            "serial_mfu": 0.4,
        },
        "compile_seconds": 61.0,
        "compiled_bytes": 5_000_000,
    }
    cells = [cell.strip() for cell in scaling.row("172m", report).strip("| ").split("|")]
    assert cells == [
        *(
            "172m",
            "v5p:2x2x4",
            "16",
            "rotary, fsdp=16, full",
            "0.50",
            "1.00",
            "2.00",
            "3.5 of 95 GiB",
            "1.75, 1.50",
        ),
        *("1.50", "2.00, 1.00, 0.50", "2.00", "compute", "60% (40%)", "61 s, 5.0 MB"),
    ]
    assert len(scaling.HEADER[0].split("|")) == len(cells) + 2
    failed = {"topology": "v5e:4x4", "error": "the step needs 20 GiB of the 16 GiB"}
    assert scaling.row("172m", failed).endswith(
        "does not fit: the step needs 20 GiB of the 16 GiB |"
    )


def test_an_estimate_is_arithmetic(capsys):
    """State in float32 with two moments, the layers' inputs in bfloat16, remat's third more."""
    arguments = ["scaling", "--estimate", "--sizes=7.5b", "--generations=v5p"]
    assert app.execute(scaling.main, arguments) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    parameters = 7.532e9 + 128_000 * (4096 + 896)
    assert cells[:4] == ["7.5b", "v5p:4x4x4", "64", "16"]
    assert float(cells[4]) == pytest.approx(12 * parameters / 64 / 2**30, rel=0.01)
    assert float(cells[5]) == pytest.approx(32 * 16 * 2048 * 4096 * 2 / 2**30, rel=0.01)
    model = 16 * training_flops(PRESETS["7.5b"], 2048, 2)
    assert float(cells[7].replace(",", "")) == pytest.approx(model / 1e12, rel=0.01)
    assert float(cells[8]) == pytest.approx(4 / 3 * model / 459e12, rel=0.01)
    assert cells[10].startswith("75% (")


def test_slices_are_tried_from_the_smallest():
    assert scaling.slices("7.5b", "v4") == ["v4:4x4x8", "v4:4x8x8"]
    # 896, the encoder's width, cannot be split over 256 chips.
    assert scaling.mesh("7.5b", "v5e:16x16") == {"data": 2, "fsdp": 128}
    assert scaling.slices("1.5b", "v5e") == ["v5e:8x8", "v5e:8x16", "v5e:16x16"]


def test_tables_align_and_round():
    rows = [{"what": "a", "n": 1234.5, "of": None}, {"what": "long", "n": 0.12345, "of": 7}]
    assert table(rows).splitlines() == [
        "what      n  of",
        "a     1,234   -",
        "long  0.123   7",
    ]
