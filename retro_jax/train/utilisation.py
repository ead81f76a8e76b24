"""How much of the machine a run uses: model FLOPs, memory, and traces of chosen steps."""

import dataclasses
import os
import resource
import sys

import jax

from retro_jax.chips import CHIPS
from retro_jax.errors import UserError

_GIB = 2**30
# As JAX calls the devices -> dense bfloat16 operations per second, as their makers publish them.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
_GPU_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def peak_flops(device_kind: str) -> float | None:
    """Operations per second that a device can do at most; None for a kind that is not known."""
    if device_kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[device_kind]].peak
    return next((peak for name, peak in _GPU_PEAKS.items() if name in device_kind), None)


def memory() -> dict[str, float]:
    """GiB: peak memory of any device of this process, where it is reported, and of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    figures = {"memory/host": resident / _GIB}
    return figures | ({"memory/device": max(peaks) / _GIB} if peaks else {})


@dataclasses.dataclass(frozen=True)
class Machine:
    """The figures that relate speed to the machine.

    Attributes:
      step_flops: of the model, forward and backward, for a global batch. devices: of all processes.
      peak: operations per second of one of them; None where it is not known.
    """

    step_flops: float
    devices: int
    peak: float | None

    def mfu(self, seconds: float) -> dict[str, float]:
        """{"mfu": part of the devices' operations that were the model's}, for seconds per step."""
        if self.peak is None or seconds <= 0:
            return {}
        return {"mfu": self.step_flops / (seconds * self.devices * self.peak)}


class Profile:
    """A trace of steps first .. last, for TensorBoard's profiler and Perfetto."""

    def __init__(self, directory: str | os.PathLike, first: int, last: int):
        """Into DIRECTORY, which every process of the run writes to."""
        self._directory, self._first, self._last = str(directory), first, last
        self._running = False

    def begin_step(self, number: int) -> None:
        """Starts or ends the trace; steps run one ahead of their results."""
        if number == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True
        if number > self._last + 1:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def parse_steps(flag: str, text: str) -> tuple[int, int]:
    """Reads FIRST:LAST, as in "10:12", that a flag was given.

    Raises:
      UserError: it is no such range.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise UserError(f"--{flag}={text}: expected FIRST:LAST, as in 100:102")
    return int(first), int(last)
