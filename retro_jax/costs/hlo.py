"""Reads the text of a compiled program (optimised HLO): computations, instructions, shapes.

    %body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
      %p = (s32[], bf16[8,64]{1,0}) parameter(0)
      %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
      ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%i, %x)
    }

A shape's layout may name a memory space: S(1) is the chip's own vector memory, not HBM.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array's type and extents, and whether it is in HBM."""

    dtype: str
    extents: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.extents)

    @property
    def nbytes(self) -> float:
        """Bytes, without the padding of tiles."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return self.size * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`. Tuples have several arrays."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value behind `name=`, up to the comma that ends it."""
        match = re.search(rf"(?:^|, ){name}=", self.attributes)
        return None if match is None else _balanced(self.attributes[match.end() :], ",")

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that this instruction runs; neither a loop's condition nor a reducer."""
        names = ["calls", "body", "branch_computations"]
        if self.opcode == "call":
            names.append("to_apply")
        values = [self.attribute(name) for name in names]
        return tuple(_NAME.findall(" ".join(filter(None, values))))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The result of the computation."""
        return next(i for i in self.instructions.values() if i.root)

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that produces an operand."""
        return self.instructions[instruction.operands[index]]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that is scheduled by itself, with how often it runs.

        Loops, calls and branches are followed, all branches as if they ran; fusions are not, they
        are one instruction.
        """
        yield from self._executed(self.computations[self.entry], 1)

    def _executed(
        self, computation: Computation, times: int
    ) -> Iterator[tuple[Computation, Instruction, int]]:
        for instruction in computation.instructions.values():
            yield computation, instruction, times
            if instruction.opcode in ("while", "call", "conditional"):
                repeats = times * (self.trips(instruction) if instruction.opcode == "while" else 1)
                for name in instruction.called:
                    yield from self._executed(self.computations[name], repeats)

    def trips(self, loop: Instruction) -> int:
        """How often a while loop's body runs, by the compiler's note or the loop's condition.

        The compiler does not report it before it generates machine code. JAX's loops count from 0 to below a
        constant.
        """
        condition = (loop.attribute("condition") or "").removeprefix("%")
        if "known_trip_count" in loop.attributes or condition not in self.computations:
            return trip_count(loop)
        root = self.computations[condition].root
        if root.opcode != "compare" or root.attribute("direction") != "LT":
            return trip_count(loop)
        limit = self.computations[condition].operand(root, 1)
        return int(limit.operands[0]) if limit.opcode == "constant" else trip_count(loop)

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """The instructions inside one, at any depth."""
        for name in instruction.called:
            computation = self.computations[name]
            for inner in computation.instructions.values():
                yield computation, inner
                yield from self.inside(inner)


def parse(text: str) -> Module:
    """Reads a module as `compiled.as_text()` gives it."""
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    for line in text.splitlines():
        line = line.strip()
        start = _COMPUTATION.match(line)
        if start:
            name = start[2]
            computations[name] = Computation(name, {})
            entry = name if start[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and name:
            instruction = _instruction(match[2], match[3], bool(match[1]))
            computations[name].instructions[instruction.name] = instruction
    return Module(computations, entry)


def trip_count(loop: Instruction) -> int:
    """How often a while loop's body runs; 1 where the compiler does not say."""
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    return int(match[1]) if match else 1


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """Reads the right side of the equals sign."""
    text = _COMMENT.sub("", text)
    shape = _balanced(text, " ")
    rest = text[len(shape) :].strip()
    opcode = _OPCODE.match(rest)
    assert opcode is not None, f"no operation in {text[:200]!r}"
    operands = _balanced(rest[opcode.end() :], ")")
    attributes = rest[opcode.end() + len(operands) + 1 :].lstrip(", ")
    literal = opcode[1] in ("constant", "parameter")  # the parameter's number
    names = [operands] if literal else _NAME.findall(operands)
    return Instruction(name, opcode[1], _arrays(shape), tuple(names), attributes, root)


def _arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a type, a tuple's one after the other."""
    return tuple(
        Array(
            dtype,
            tuple(int(extent.strip("<=")) for extent in extents.split(",") if extent),
            in_hbm=re.search(r"S\([1-9]\d*\)", layout) is None,
        )
        for dtype, extents, layout in _ARRAY.findall(shape)
    )


def _balanced(text: str, stop: str) -> str:
    """The beginning of a text up to a character outside all brackets and quotes."""
    depth, quoted = 0, False
    for index, character in enumerate(text):
        if character == '"' and text[index - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        if depth == 0 and character == stop:
            return text[:index]
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return text[:index]
    return text
