"""A compilation that is ended once its costs are there, with a compiler that leaves what libtpu does."""

import pathlib
import time

import pytest

from retro_jax.costs.partial_compile import CompilationError, compile_until_allocated

REPORT = """
Memory Space: default (color=0)
Total bytes: 4744704 (4.52MiB)
Memory Space: vmem (color=1)
Total bytes: 96538624 (92.07MiB)
"""


class Lowered:
    """A program whose machine code would take for ever."""

    def as_text(self) -> str:
        return "module"

    def compile(self, compiler_options: dict[str, object]) -> None:
        folder = pathlib.Path(str(compiler_options["xla_dump_to"]))
        leave(folder / "module_0000.jit_train_step", "HloModule the_step")
        time.sleep(3600)


class Refused(Lowered):
    """A program that the compiler does not take."""

    def compile(self, compiler_options: dict[str, object]) -> None:
        raise RuntimeError("Ran out of memory in memory space hbm")


def leave(module: pathlib.Path, text: str) -> None:
    """The files of one program, in libtpu's order."""
    for suffix, content in (
        ("-memory-usage-report", REPORT),
        ("", text),
        ("_after_buffer_assignment", text),
    ):
        path = module.with_name(f"{module.name}.after_optimizations{suffix}.txt")
        path.write_text(content, encoding="utf-8")


def test_the_step_is_read_and_the_compiler_ended():
    program = compile_until_allocated(Lowered, poll_seconds=0.01)
    assert (program.text, program.nbytes) == ("HloModule the_step", 4744704)
    assert program.lowered_bytes == len("module")
    assert 0 <= program.seconds < 600


def test_what_the_compiler_said_is_told():
    with pytest.raises(CompilationError, match="Ran out of memory in memory space hbm"):
        compile_until_allocated(Refused, poll_seconds=0.01)
