"""Tokens per second of a training step: forward, backward, AdamW; RETRO beside the baseline.

    python -m benchmarks.train_step --preset=peer --against=retro-pytorch --rival_python=TORCH/bin/python
    python -m benchmarks.train_step --preset=172m --positions=rotary --remat=dots --output=172m.json

Operations are counted from the configuration (retro_jax/model/flops.py says how). Every token counts
twice the weights that it passes, and the products of attention over half the sequence; neighbours
count as often as they are read. All of it counts three times for forward and backward, and
recomputation does not count. MFU is that rate over the rate of a matrix product in the same dtype,
measured in the same run, and over the published peak where the device has one. RETRO takes longer
than the baseline of equal decoder; the last line has the excess over its operations.

All sides take turns in one run and the best turn of each counts, so other work on the machine slows
all alike. retro-pytorch (PyPI) does the same work in a separate interpreter:

    python3.11 -m venv TORCH
    TORCH/bin/pip install torch==2.13.0 numpy einops
    TORCH/bin/pip install --no-deps retro-pytorch==0.3.9

Needs jax, flax, optax and absl only: no TensorFlow, ScaNN, gin or Grain.
"""

import pathlib
from typing import Any

import jax
from absl import flags

from benchmarks.rival import RetroPytorch, settings
from benchmarks.timing import MatrixProduct, Turn, best, machine, table, write_json
from benchmarks.training import (
    DTYPE,
    LENGTH,
    NEIGHBOURS,
    OUTPUT,
    POSITIONS,
    PRESET,
    ROWS,
    STEPS_A_TURN,
    TURNS,
    Step,
    Work,
    baseline_of,
    figures,
    steps_a_turn,
    work_from_flags,
)
from launch.common import app
from retro_jax.errors import UserError
from retro_jax.host_memory import keep_freed_memory

AGAINST = flags.DEFINE_string("against", None, "retro-pytorch, or nothing.")
RIVAL_PYTHON = flags.DEFINE_string("rival_python", None, "An interpreter that has retro-pytorch.")
RETRO_ONLY = flags.DEFINE_bool("retro_only", False, "Without the transformer of equal decoder.")
REMAT = flags.DEFINE_string("remat", "none", "ExecutionConfig.remat.")
ATTENTION = flags.DEFINE_string("attention", "auto", "ExecutionConfig.attention.")
ATTENTION_BLOCK = flags.DEFINE_integer("attention_block", 256, "Queries a block.", lower_bound=1)
LOSS_BLOCK = flags.DEFINE_integer("loss_block", 1024, "Tokens a block; 0: all.", lower_bound=0)
SCAN = flags.DEFINE_bool("scan_layers", True, "ExecutionConfig.scan_layers.")

__all__ = [  # flags of other modules that --help shows too
    "DTYPE",
    "LENGTH",
    "NEIGHBOURS",
    "OUTPUT",
    "POSITIONS",
    "PRESET",
    "ROWS",
    "STEPS_A_TURN",
    "TURNS",
    "main",
]


def main() -> None:
    """Times, and prints the table."""
    work = work_from_flags(
        remat=REMAT.value,
        attention=ATTENTION.value,
        attention_block=ATTENTION_BLOCK.value,
        loss_block=LOSS_BLOCK.value,
        scan_layers=SCAN.value,
    )
    rival = _start_rival(work)  # first: it is refused at once, and compiling takes its time
    try:
        steps = {"RETRO": Step(work)}
        if not RETRO_ONLY.value:
            steps["baseline"] = Step(baseline_of(work))
        turns, product = _take_turns(steps, rival, work)
    finally:
        if rival is not None:
            rival.close()
    rows = [figures(name, step, turns[name], product) for name, step in steps.items()]
    result = {
        "machine": machine(),
        "preset": PRESET.value,
        "positions": work.retro.positions,
        "dtype": work.execution.activation_dtype,
        "rows": work.batch_size,
        "length": work.sequence_length,
        "remat": work.execution.remat,
        "attention": work.execution.attention,
        "product TFLOP/s": product / 1e12,
        "table": rows,
        **_ratios(steps, turns),
    }
    if rival is not None:
        rows.append(_rival_row(rows[0], rival, turns["retro-pytorch"], work))
    print(f"{PRESET.value}, {work.batch_size} x {work.sequence_length} tokens, ", end="")
    print(f"{work.retro.positions}, {work.execution.activation_dtype}: {machine()}")
    print(f"matrix product: {product / 1e12:.3g} TFLOP/s a device\n")
    print(table(rows))
    for name, value in _ratios(steps, turns).items():
        print(f"{name}: {value:.3f}")
    if OUTPUT.value:
        write_json(pathlib.Path(OUTPUT.value), result)


def _start_rival(work: Work) -> RetroPytorch | None:
    """The other package's process, where it is asked for.

    Raises:
      UserError: another rival, or none that runs.
    """
    if AGAINST.value is None:
        return None
    if AGAINST.value != "retro-pytorch" or RIVAL_PYTHON.value is None:
        raise UserError(
            f"--against={AGAINST.value} --rival_python={RIVAL_PYTHON.value}: expected "
            "--against=retro-pytorch and an interpreter that has it; --help tells how to make one"
        )
    job = settings(
        work.retro,
        rows=work.batch_size,
        length=work.sequence_length,
        neighbours=work.neighbours,
    )
    on_gpu = jax.default_backend() == "gpu"
    return RetroPytorch(RIVAL_PYTHON.value, job, forward_only=False, cuda=on_gpu)


def _take_turns(
    steps: dict[str, Step], rival: RetroPytorch | None, work: Work
) -> tuple[dict[str, Turn], float]:
    """The best turn of every side, and the rate of the matrix product."""
    product = MatrixProduct(work.execution.activation_dtype)
    turns: dict[str, list[Turn]] = {name: [] for name in [*steps, "product", "retro-pytorch"]}
    for _ in range(TURNS.value):
        turns["product"].append(product.turn())
        for name, step in steps.items():
            turns[name].append(step.turn(steps_a_turn()))
        if rival is not None:
            turns["retro-pytorch"].append(rival.turn())
    results = {name: best(rounds) for name, rounds in turns.items() if rounds}
    return results, product.flops / results["product"].wall


def _rival_row(row: dict[str, Any], rival: RetroPytorch, turn: Turn, work: Work) -> dict[str, Any]:
    """Its row: the work is the same, so operations a token are taken to be ours."""
    slower = turn.wall / row["step s"]
    return row | {
        "what": "retro-pytorch",
        "parameters": rival.facts["parameters"],
        "step s": turn.wall,
        "tokens/s": work.batch_size * work.sequence_length / turn.wall,
        "TFLOP/s/device": row["TFLOP/s/device"] / slower,
        "of product": row["of product"] / slower,
        "of peak": row["of peak"] and row["of peak"] / slower,
        "temporaries GB": None,
    }


def _ratios(steps: dict[str, Step], turns: dict[str, Turn]) -> dict[str, float]:
    """The ratios that the benchmark is for."""
    ratios = {}
    if "baseline" in steps:
        time = turns["RETRO"].wall / turns["baseline"].wall
        flops = steps["RETRO"].flops / steps["baseline"].flops
        ratios = {
            "step time, RETRO / baseline": time,
            "operations, RETRO / baseline": flops,
            "time over operations": time / flops,
        }
    if "retro-pytorch" in turns:
        ours, theirs = turns["RETRO"], turns["retro-pytorch"]
        ratios["tokens/s, RETRO / retro-pytorch"] = theirs.wall / ours.wall
        ratios["the same by processor time"] = theirs.processor / ours.processor
    return ratios


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
