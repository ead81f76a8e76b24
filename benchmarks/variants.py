"""The cost of attention kinds and remat policies: time and memory of a training step by each.

    python -m benchmarks.variants --preset=172m --remat_policies=dots,full --attention_blocks=128,256,512

Times every combination that exists on this backend; those that do not, or that need more memory than
the device has, say so in their row. MFU as in benchmarks/train_step.py. Combinations run one after
the other, so compare on a quiet machine. Published sizes on a CPU need --rows=1 --length=256.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
from absl import flags

from benchmarks.timing import MatrixProduct, best, machine, table, write_json
from benchmarks.training import (
    DTYPE,
    LENGTH,
    NEIGHBOURS,
    OUTPUT,
    PRESET,
    ROWS,
    STEPS_A_TURN,
    TURNS,
    Step,
    Work,
    figures,
    steps_a_turn,
    work_from_flags,
)
from launch.common import app
from retro_jax.errors import UserError
from retro_jax.host_memory import keep_freed_memory

KINDS = flags.DEFINE_list("attention_kinds", ["chunked", "plain", "fused"], "To compare.")
POLICIES = flags.DEFINE_list("remat_policies", ["none", "dots", "full"], "To compare.")
BLOCKS = flags.DEFINE_list("attention_blocks", ["256"], "Queries a block, of chunked attention.")
BOTH_POSITIONS = flags.DEFINE_list("all_positions", ["relative", "rotary"], "To compare.")

__all__ = [  # flags of other modules that --help shows too
    "DTYPE",
    "LENGTH",
    "NEIGHBOURS",
    "OUTPUT",
    "PRESET",
    "ROWS",
    "STEPS_A_TURN",
    "TURNS",
    "main",
]


def main() -> None:
    """Times every combination."""
    works = combinations(work_from_flags())
    product = MatrixProduct(works[0].execution.activation_dtype)
    rate = product.flops / best([product.turn() for _ in range(TURNS.value)]).wall
    rows = []
    for work in works:
        rows.append(_row(work, rate))
        print(f"{len(rows)} of {len(works)}: {rows[-1]['what']} {rows[-1]['note']}", flush=True)
    print(f"\n{PRESET.value}, {works[0].batch_size} x {works[0].sequence_length}: {machine()}")
    print(table(rows))
    if OUTPUT.value:
        result = {"machine": machine(), "preset": PRESET.value, "product TFLOP/s": rate / 1e12}
        write_json(pathlib.Path(OUTPUT.value), result | {"table": rows})


def combinations(work: Work) -> list[Work]:
    """Every setting asked for; blocks matter to chunked attention only.

    Raises:
      UserError: a value that no field has.
    """
    blocks = [block for block in BLOCKS.value if block.isdigit()]
    if not blocks or len(blocks) < len(BLOCKS.value):
        raise UserError(f"--attention_blocks={','.join(BLOCKS.value)}: expected numbers of queries")
    works = []
    for positions, kind, remat in itertools.product(
        BOTH_POSITIONS.value, KINDS.value, POLICIES.value
    ):
        for block in blocks if kind == "chunked" else blocks[:1]:
            execution = dataclasses.replace(
                work.execution, attention=kind, remat=remat, attention_block=int(block)
            )
            retro = dataclasses.replace(work.retro, positions=positions)
            works.append(dataclasses.replace(work, retro=retro, execution=execution))
    return works


def _row(work: Work, rate: float) -> dict[str, Any]:
    """One combination timed, or why it is not."""
    execution = work.execution
    block = f" {execution.attention_block}" if execution.attention == "chunked" else ""
    name = f"{work.retro.positions}, {execution.attention}{block}, remat {execution.remat}"
    nothing = dict.fromkeys(("step s", "tokens/s", "of product", "of peak", "temporaries GB"))
    try:
        step = Step(work)
        turn = best([step.turn(steps_a_turn()) for _ in range(TURNS.value)])
    except UserError as error:
        return {"what": name, **nothing, "note": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"what": name, **nothing, "note": "out of memory"}
    row = figures(name, step, turn, rate)
    return {"what": name, **{column: row[column] for column in nothing}, "note": ""}


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
