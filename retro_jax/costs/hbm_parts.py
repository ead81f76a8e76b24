"""Which parts of the model move a program's bytes of HBM, by the Python functions that asked for them.

A compiled program's text ends every instruction with the number of a stack frame, and begins with tables
of frames, places and functions. An instruction belongs to the first of PARTS whose functions its stack
has. Gradients and what is computed again belong to the part that they are of.
"""

import collections
import re
from collections.abc import Sequence

from retro_jax.costs.hlo import Computation, Instruction, Module
from retro_jax.costs.program_costs import hbm_bytes

# (part, functions that are all on the stack); the first that fits.
PARTS = (
    ("loss", ("token_losses",)),
    ("loss", ("_local_losses",)),
    ("loss", ("_local_gradients",)),
    ("encoder: feed-forward", ("Encoder.__call__", "FeedForward.__call__")),
    ("encoder: attention", ("Encoder.__call__", "_self_attention")),
    ("encoder: cross-attention", ("Encoder.__call__", "_cross_attention")),
    ("encoder: the rest", ("Encoder.__call__",)),
    ("CCA", ("ChunkedCrossAttention.__call__",)),
    ("decoder: feed-forward", ("FeedForward.__call__",)),
    ("decoder: attention", ("causal_attention",)),
    ("embedding", ("Embedding.__call__",)),
    ("decoder: the rest", ("Retro.hidden_states",)),
    ("optimiser and norms", ("train_step",)),
)
OTHER = "no source known"
_MOST_READ = 20  # instructions that are asked where one without a source is from
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_ROW = re.compile(r"^(\d+) (.*)$")


def hbm_by_part(module: Module, text: str) -> dict[str, float]:
    """{part: bytes of a device and run}, the largest first.

    Args:
      module: the parsed text. text: of the compiled program, with its tables.
    """
    functions = frame_functions(text)
    total: dict[str, float] = collections.defaultdict(float)
    for computation, instruction, times in module.executed():
        nbytes = times * hbm_bytes(module, computation, instruction)
        if nbytes:
            total[_part_of(module, computation, instruction, functions)] += nbytes
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def frame_functions(text: str) -> dict[int, tuple[str, ...]]:
    """{stack frame: qualified names of its functions, the innermost first} of a program's text."""
    names = {n: row.strip('"') for n, row in _table(text, "FunctionNames").items()}
    places = {
        n: names[_field(row, "function_name_id")]
        for n, row in _table(text, "FileLocations").items()
    }
    frames = {
        n: (_field(row, "file_location_id"), _field(row, "parent_frame_id") - 1)
        for n, row in _table(text, "StackFrames").items()
    }

    def stack(frame: int) -> tuple[str, ...]:
        found: list[str] = []
        while frame in frames and len(found) < len(frames):
            place, frame = frames[frame]
            found.append(places[place])
        return tuple(found)

    return {frame: stack(frame) for frame in frames}


def _part_of(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    functions: dict[int, tuple[str, ...]],
) -> str:
    """The part of an instruction; of one that says nothing, that of what it consists of or reads."""
    seen: set[str] = set()
    reads = [instruction.name]
    while reads and len(seen) < _MOST_READ:
        name = reads.pop(0)
        if name in seen or name not in computation.instructions:
            continue
        seen.add(name)
        source = computation.instructions[name]
        for inner in (source, *(i for _, i in reversed(list(module.inside(source))))):
            if part := _named(inner, functions):  # its own, else from its root on
                return part
        reads += source.operands
    return OTHER


def _named(instruction: Instruction, functions: dict[int, tuple[str, ...]]) -> str:
    """The part that an instruction's own frame is in; empty where it has none."""
    match = _FRAME.search(instruction.attributes)
    return part_of_stack(functions.get(int(match[1]), ())) if match else ""


def part_of_stack(stack: Sequence[str]) -> str:
    """The part of a stack of functions; empty for none."""
    for part, wanted in PARTS:
        if all(any(_is_in(function, name) for function in stack) for name in wanted):
            return part
    return ""


def _is_in(function: str, name: str) -> bool:
    """Whether a function is the named one, or inside of it."""
    return function == name or function.startswith(f"{name}.<locals>")


def _table(text: str, name: str) -> dict[int, str]:
    """{number: row} of one of the tables at a text's beginning."""
    rows: dict[int, str] = {}
    inside = False
    for line in text.splitlines():
        if inside:
            match = _ROW.match(line)
            if match is None:
                break
            rows[int(match[1])] = match[2]
        inside = inside or line == name
    return rows


def _field(row: str, name: str) -> int:
    """A number of a row."""
    match = re.search(rf"{name}=(\d+)", row)
    return int(match[1]) if match else 0
