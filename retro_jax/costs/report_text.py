"""What compiled programs cost, as text and as JSON: what launch.compile_check prints and writes."""

import dataclasses
from typing import Any

from retro_jax.costs.roofline import Slice
from retro_jax.costs.step_report import Report
from retro_jax.report.tables import as_text
from retro_jax.report.views import Table
from retro_jax.train.plan import Plan

_GIB = 2**30
_NEGLIGIBLE = 0.01  # part of all exchanged bytes below which an operation is not shown by itself


def lines(plan: Plan, report: Report, slice_: Slice | None) -> list[str]:
    """The report as text."""
    settings, shape = plan.settings, plan.shape
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    kind = "RETRO" if settings.retro.has_retrieval else "baseline"
    where = f"{slice_.name}, {slice_.size} chips" if slice_ else "simulated devices"
    tokens = shape.batch_size * shape.sequence_length
    return [
        f"{kind} of {settings.retro.num_parameters():,} parameters on {where}: mesh {mesh}, "
        f"remat {settings.execution.remat}",
        f"{shape.batch_size} x {shape.sequence_length} = {tokens:,} tokens a step; compiled in "
        f"{report.compile_seconds:.0f} s of a processor, {report.lowered_bytes / 1e6:.1f} MB of "
        f"program to {report.compiled_bytes / 1e6:.1f} MB",
        "",
        *_memory_lines(plan, report, slice_),
        "",
        *_work_lines(report),
        "",
        *_exchange_lines(report),
        *_bound_lines(report, tokens),
    ]


def as_json(report: Report, slice_: Slice | None) -> dict[str, Any]:
    """The report as plain values; seconds and bytes."""
    memory = dataclasses.asdict(report.memory) | {"total": report.memory.total}
    figures = {
        "mesh": report.mesh,
        "memory": memory | ({"hbm": slice_.chip.hbm} if slice_ else {}),
        "first_state": report.first_state,
        "restore": report.restore,
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


def _memory_lines(plan: Plan, report: Report, slice_: Slice | None) -> list[str]:
    """Memory per device, by purpose and by program."""
    memory, begins = report.memory, bool(plan.settings.start.run)
    parts = {
        "parameters": memory.parameters,
        "optimiser": memory.optimizer,
        "moving average": memory.average,
        "batch": memory.batch,
        "activations and other temporaries": memory.temporaries,
        "total": memory.total,
        "making the first state": report.first_state,
        "taking another run's parameters" if begins else "restoring a checkpoint": report.restore,
    }
    if not memory.average:
        del parts["moving average"]
    rows = {name: f"{name:36}{nbytes / _GIB:10.3f} GiB" for name, nbytes in parts.items()}
    if slice_:
        rows["total"] += f" of {slice_.chip.hbm / _GIB:.0f} ({memory.total / slice_.chip.hbm:.0%})"
    return ["memory per device", *rows.values()]


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
