"""The shared parts of the benchmarks: turns of measurement, the rate of a matrix product, tables, JSON.

A machine that others use too is no obstacle to a comparison when the things compared take turns and
the best of several rounds counts: a disturbance would have to hit every round of one of them.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from retro_jax.report.tables import as_text
from retro_jax.report.views import Table

# Published dense bfloat16 rates in TFLOP/s, by the name that JAX gives a device.
PEAKS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seconds of one turn: on the clock, and of processor over all threads of the process."""

    wall: float
    processor: float


def timed(work: Callable[[], Any]) -> Turn:
    """One turn of `work`, up to the moment its arrays are there."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    return Turn(time.perf_counter() - wall, time.process_time() - processor)


def best(turns: Sequence[Turn]) -> Turn:
    """The least wall time and the least processor time of any turn."""
    return Turn(min(turn.wall for turn in turns), min(turn.processor for turn in turns))


class MatrixProduct:
    """A square product of random factors: the rate that one device reaches at best.

    Attributes:
      flops: operations of a turn.
    """

    def __init__(self, dtype: str):
        on_cpu = jax.default_backend() == "cpu"
        size, repeats = (2048, 1) if on_cpu else (8192, 50)
        self.flops = repeats * 2 * size**3
        draw = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
        factor = draw.astype(dtype)

        @jax.jit
        def multiply(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, repeats, lambda _, y: y @ factor, x)

        self._run = lambda: multiply(factor)
        jax.block_until_ready(self._run())

    def turn(self) -> Turn:
        """One turn on one device."""
        return timed(self._run)


def peak_rate() -> float | None:
    """The published bfloat16 FLOP/s of one device, where it is known."""
    kind = jax.devices()[0].device_kind
    return next((1e12 * rate for name, rate in PEAKS.items() if kind.startswith(name)), None)


def machine() -> dict[str, Any]:
    """The setting of the measurement: devices, versions, and the load of the machine's cores."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text; numbers to the right."""
    names = list(rows[0])
    cells = [[_text(row[name]) for name in names] for row in rows]
    texts = [i for i, name in enumerate(names) if any(isinstance(row[name], str) for row in rows)]
    return as_text(Table(names, cells), left=texts)


def _text(value: Any) -> str:
    """A table's cell: three digits or all before the point."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes the measurement beside the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
