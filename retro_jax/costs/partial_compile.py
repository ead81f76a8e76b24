"""Compiles for a TPU as far as its costs are settled, and stops before machine code is generated.

libtpu fuses, schedules, exchanges and allocates first, and generates machine code last, of a program that
does not change any more; that takes nine tenths of its time. XLA writes the program and the allocation
into a folder as soon as they are there (xla_dump_to). A compilation cannot be interrupted, so it runs
in a process of its own, which is ended when the folder is complete.
"""

import dataclasses
import json
import multiprocessing
import pathlib
import re
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

_PROGRAM = "*.after_optimizations.txt"
_ALLOCATION = "*.after_optimizations-memory-usage-report.txt"
_LAST = "*.after_optimizations_after_buffer_assignment.txt"  # written behind the other two
_HBM = re.compile(r"Memory Space: default .*\nTotal bytes: (\d+)")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, allocated but without machine code.

    Attributes:
      text: optimised HLO. nbytes: arguments, outputs and temporaries in a device's HBM.
      seconds: of a processor, to compile so far. lowered_bytes: of JAX's text.
    """

    text: str
    nbytes: int
    seconds: float
    lowered_bytes: int


class CompilationError(RuntimeError):
    """The compiler's message when it refused a program."""


def compile_until_allocated(lower: Callable[[], Any], *, poll_seconds: float = 0.5) -> Program:
    """Compiles in a process of its own.

    Args:
      lower: builds the lowered program there; it travels by pickle. poll_seconds: between looks.

    Raises:
      CompilationError: the compiler's own message, or that its process ended without one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_compile, args=(lower, folder), daemon=True)
        before = _children_seconds()
        process.start()
        try:
            while process.is_alive() and not list(folder.glob(_LAST)):
                time.sleep(poll_seconds)
        finally:
            process.kill()
            process.join()
        if not list(folder.glob(_LAST)):
            raise CompilationError(_failure(folder, process.exitcode))
        return _read(folder, _children_seconds() - before)


def _compile(lower: Callable[[], Any], folder: pathlib.Path) -> None:
    """The process: lowers, notes how long that took, and compiles."""
    try:
        lowered = lower()
        noted = {"lowered_bytes": len(lowered.as_text()), "seconds": time.process_time()}
        (folder / "lowered").write_text(json.dumps(noted), encoding="utf-8")
        options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        lowered.compile(compiler_options=options)
    except Exception as error:  # reported by the process that waits
        (folder / "error").write_text(str(error), encoding="utf-8")


def _read(folder: pathlib.Path, seconds: float) -> Program:
    """The compiler's dump of the one program that it was given."""
    text, report = (
        next(folder.glob(pattern)).read_text(encoding="utf-8")
        for pattern in (_PROGRAM, _ALLOCATION)
    )
    nbytes = _HBM.search(report)
    if nbytes is None:
        raise CompilationError("the compiler's report of its allocation has no bytes of HBM")
    noted = json.loads((folder / "lowered").read_text(encoding="utf-8"))
    return Program(text, int(nbytes[1]), seconds - noted["seconds"], noted["lowered_bytes"])


def _failure(folder: pathlib.Path, status: int | None) -> str:
    """Why there is no program."""
    message = folder / "error"
    if message.exists():
        return message.read_text(encoding="utf-8")
    return f"the compiler's process ended with status {status} before it had a program"


def _children_seconds() -> float:
    """Processor seconds of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
