"""Compiles a run's train step for TPUs that need not be there, and says what it will cost them.

    python -m launch.compile_check --gin_file=experiments/retro_7_5b.gin --topology=v5p:4x4x4
    python -m launch.compile_check --gin_file=experiments/retro_172m.gin --topology=v5e:4x4 \\
        --gin_bindings='MeshConfig.fsdp = 16' --gin_bindings="ExecutionConfig.remat = 'full'"

Prints memory per chip against its HBM, operations against the model's own count, collectives by kind
and bytes, and the least time a step can take, with what binds. Compiles as far as these are settled:
machine code is not made, and its bytes are not in the memory. Needs libtpu: pip install
'retro-jax[tpu]'. --topology=cpu:8 compiles for simulated devices instead, and needs nothing.
"""

import dataclasses
import json
import pathlib

import jax
from absl import flags

from launch.common import app, configurables
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.costs import topology
from retro_jax.costs.roofline import Slice
from retro_jax.costs.step_report import Report, Work, check
from retro_jax.report.tables import as_text
from retro_jax.report.views import Table
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.train.loop import TrainConfig
from retro_jax.train.optimizer import OptimizerConfig

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "What to compile for: v4:AxBxC, v5p:AxBxC, v5e:AxB, v6e:AxB chips, or cpu:N."
)
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_GIB = 2**30
_NEGLIGIBLE = 0.01  # part of all exchanged bytes below which an operation is not shown by itself


def main() -> None:
    """Compiles, and prints the report."""
    name = app.required(TOPOLOGY, "chips to compile for, as in v5p:4x4x4")
    configurables.load_from_flags()
    work, mesh_config = make_work()
    if configurables.PRINT_CONFIG.value:
        print(configurables.operative_config(), end="")
        return
    jax.config.update("jax_platforms", "cpu")  # nothing runs: an accelerator here stays free
    devices, slice_ = topology.devices(name)
    report = check(work, make_mesh(mesh_config, devices), slice_)
    if JSON.value:
        figures = {
            "topology": name,
            "remat": work.execution.remat,
            "positions": work.retro.positions,
        }
        figures |= as_json(report, slice_)
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(work, report, slice_)))


def make_work() -> tuple[Work, MeshConfig]:
    """The step that launch.train would run with this configuration, and its mesh."""
    # Imported here: it brings the data pipelines' libraries along.
    from data_pipelines.batches.batches import BatchConfig

    batch, training = configurables.make(BatchConfig), configurables.make(TrainConfig)
    work = Work(
        retro=configurables.make(RetroConfig),
        execution=configurables.make(ExecutionConfig),
        optimizer=configurables.make(OptimizerConfig),
        batch_size=batch.batch_size,
        sequence_length=batch.sequence_length,
        neighbours=batch.neighbours,
        neighbour_dropout=training.neighbour_dropout,
        num_corpora=len(batch.mixture or [""]),
    )
    return work, configurables.make(MeshConfig)


def lines(work: Work, report: Report, slice_: Slice | None) -> list[str]:
    """The report as text."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    kind = "RETRO" if work.retro.has_retrieval else "baseline"
    where = f"{slice_.name}, {slice_.size} chips" if slice_ else "simulated devices"
    tokens = work.batch_size * work.sequence_length
    return [
        f"{kind} of {work.retro.num_parameters():,} parameters on {where}: mesh {mesh}, "
        f"remat {work.execution.remat}",
        f"{work.batch_size} x {work.sequence_length} = {tokens:,} tokens a step; compiled in "
        f"{report.compile_seconds:.0f} s of a processor, {report.lowered_bytes / 1e6:.1f} MB of "
        f"program to {report.compiled_bytes / 1e6:.1f} MB",
        "",
        *_memory_lines(report, slice_),
        "",
        *_work_lines(report),
        "",
        *_exchange_lines(report),
        *_bound_lines(report, tokens),
    ]


def as_json(report: Report, slice_: Slice | None) -> dict:
    """The report as plain values; seconds and bytes."""
    memory = dataclasses.asdict(report.memory) | {"total": report.memory.total}
    figures = {
        "mesh": report.mesh,
        "memory": memory | ({"hbm": slice_.chip.hbm} if slice_ else {}),
        "model_flops": report.model_flops,
        "program_flops": report.costs.flops,
        "hbm_bytes": report.costs.hbm_bytes,
        "collectives": [dataclasses.asdict(exchange) for exchange in report.exchanges],
        "compile_seconds": report.compile_seconds,
        "lowered_bytes": report.lowered_bytes,
        "compiled_bytes": report.compiled_bytes,
    }
    bound = report.bound
    if bound is not None:
        figures["bound"] = {
            "seconds": dict(bound.seconds),
            "step": bound.step,
            "binds": bound.binds,
            "mfu": bound.mfu,
            "serial_mfu": bound.serial_mfu,
        }
    return figures


def _memory_lines(report: Report, slice_: Slice | None) -> list[str]:
    """Memory per device, by what it is for."""
    memory = report.memory
    parts = {
        "parameters": memory.parameters,
        "optimiser": memory.optimizer,
        "batch": memory.batch,
        "activations and other temporaries": memory.temporaries,
        "total": memory.total,
    }
    found = [f"{name:36}{nbytes / _GIB:10.3f} GiB" for name, nbytes in parts.items()]
    if slice_:
        found[-1] += f" of {slice_.chip.hbm / _GIB:.0f} ({memory.total / slice_.chip.hbm:.0%})"
    return ["memory per device", *found]


def _work_lines(report: Report) -> list[str]:
    """Operations and bytes of HBM per device."""
    ratio = report.costs.flops / report.model_flops
    return [
        "work per device and step",
        f"{'operations of the model':36}{report.model_flops / 1e12:10.3f} TFLOP",
        f"{'operations of the program':36}{report.costs.flops / 1e12:10.3f} TFLOP, "
        f"{ratio:.2f} of the model's",
        f"{'bytes to and from memory':36}{report.costs.hbm_bytes / 1e9:10.3f} GB",
    ]


def _exchange_lines(report: Report) -> list[str]:
    """Collectives, and below each where the program asks for most of its bytes."""
    if not report.exchanges:
        return ["no collectives"]
    rows = []
    least = _NEGLIGIBLE * sum(exchange.nbytes for exchange in report.exchanges)
    for each in report.exchanges:
        rows.append([each.kind, each.axes, f"{each.count:,}", f"{each.nbytes / 1e9:.4f}", ""])
        shown = {name: nbytes for name, nbytes in each.operations.items() if nbytes >= least}
        rest = each.nbytes - sum(shown.values())
        if rest and shown:
            shown[f"{len(each.operations) - len(shown)} others"] = rest
        rows += [["", "", "", f"{nbytes / 1e9:.4f}", name] for name, nbytes in shown.items()]
    header = ["collectives", "over", "times a step", "GB received", "by"]
    return as_text(Table(header, rows), left=(0, 1, 4)).splitlines()


def _bound_lines(report: Report, tokens: int) -> list[str]:
    """The roofline."""
    bound = report.bound
    if bound is None:
        return []
    parts = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in bound.seconds.items())
    return [
        "",
        f"a step takes at least {bound.step:.3f} s, bound by {bound.binds} ({parts})",
        f"at most {tokens / bound.step:,.0f} tokens a second, MFU {bound.mfu:.1%}; if nothing "
        f"overlapped {bound.serial_mfu:.1%}",
    ]


if __name__ == "__main__":
    app.run(main)
