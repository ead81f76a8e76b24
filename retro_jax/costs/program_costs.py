"""The work of one device in a compiled program: operations, bytes of HBM, collectives.

Counted over everything that is scheduled, loops as often as they run (XLA's own cost analysis counts
a loop's body once):

    operations    2 x multiply-adds of dots and convolutions (TPUs turn dots into these), and of
                  attention's kernels, whose text has their operands only
    HBM           bytes that an instruction reads and writes at its border; none inside of a fusion.
                  A slice of a larger array counts as the slice, an update in place as the update,
                  the chip's own vector memory not at all
    collectives   bytes that one device receives, which a ring or torus cannot do with less of:
                  (g - 1) / g of the bytes gathered, scattered or exchanged by g devices, twice that
                  for an all-reduce, all of it for a permutation
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from retro_jax.costs.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
    "collective-permute",
)
# Neither reads nor writes memory, or is counted where its parts are.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "opt-barrier",
    "optimization-barrier",
    "partition-id",
    "replica-id",
    "add-dependency",
    "domain",
}
# Products of queries, keys and head_dim; the longer name first. Two are with a block's 2T distances.
_KERNEL_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 5,
    "relative_attention_gradients": 11,
    "relative_attention": 4,
}
_SHORT = "short_attention"
_SLICES = ("dynamic-slice", "slice", "gather")
_PAIRS = re.compile(r"\{(\d+),(\d+)\}")
_IOTA = re.compile(r"^\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"^mesh\[(.*?)\].*\{(.*?)\}$")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of COLLECTIVES. arrays: those each device ends with, or for a reduce-scatter begins
        with. groups: device numbers that exchange with one another. times: count per step.
      operation: where the program asks for it, as JAX names it.
    """

    kind: str
    arrays: tuple[Array, ...]
    groups: tuple[tuple[int, ...], ...]
    times: int
    operation: str

    @property
    def received(self) -> float:
        """Bytes that a device receives each time."""
        whole, group = sum(array.nbytes for array in self.arrays), len(self.groups[0])
        if self.kind in ("collective-permute", "collective-broadcast"):
            return whole
        return (2 if self.kind == "all-reduce" else 1) * whole * (group - 1) / group


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one device and one run: operations, bytes of HBM, collectives."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]


def program_costs(module: Module, devices: int) -> Costs:
    """Counts a compiled program.

    Args:
      module: the parsed text. devices: that the program runs on.
    """
    flops = hbm = 0.0
    collectives: list[Collective] = []
    for computation, instruction, times in module.executed():
        hbm += times * hbm_bytes(module, computation, instruction)
        for where, inner in [(computation, instruction), *_parts(module, instruction)]:
            flops += times * product_flops(where, inner)
            collective = _collective(where, inner, times, devices)
            if collective is not None:
                collectives.append(collective)
    return Costs(flops, hbm, tuple(collectives))


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """Operations of a dot, a convolution or an attention kernel; 0 for anything else."""
    if instruction.opcode == "custom-call":
        return _kernel_flops(computation, instruction)
    if instruction.opcode == "dot":
        left = _array(computation, instruction, 0)
        contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
        depth = math.prod(left.extents[axis] for axis in contracted)
        return 2.0 * instruction.arrays[0].size * depth
    if instruction.opcode != "convolution":
        return 0.0
    left, right = (_array(computation, instruction, i) for i in range(2))
    labels = instruction.attribute("dim_labels") or ""
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    out = instruction.arrays[0]
    batch = out.extents[out_labels.index("b")]
    features = out.extents[out_labels.index("f")]
    depth = right.extents[right_labels.index("i")]
    taps = 1.0
    for label in sorted(set(left_labels) - {"b", "f"}):
        taps *= _taps(
            instruction,
            int(label),
            left.extents[left_labels.index(label)],
            out.extents[out_labels.index(label)],
        )
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * depth * taps / groups


def _kernel_flops(computation: Computation, instruction: Instruction) -> float:
    """Operations of an attention kernel, which computes the blocks on and below the diagonal."""
    products = [n for name, n in _KERNEL_PRODUCTS.items() if instruction.name.startswith(name)]
    short = instruction.name.startswith(_SHORT)
    if not (products or short):
        return 0.0
    operands = [_array(computation, instruction, i) for i in range(len(instruction.operands))]
    if short:
        gradients = instruction.name.startswith(f"{_SHORT}_gradients")
        return _short_flops(instruction.arrays[0], operands, gradients)
    batch, heads, length, head_dim = next(a.extents for a in operands if len(a.extents) == 4)
    if instruction.name.startswith("relative"):  # its table has a block more than the sequence
        rows = max(a.extents[1] for a in operands if len(a.extents) == 3)
        blocks = length // (rows - length)
    else:
        blocks = operands[0].extents[-1]  # a block of the mask for each of queries and keys
    square = 2.0 * batch * heads * length**2 * head_dim
    return products[0] * square * (blocks + 1) / (2 * blocks)


def _short_flops(out: Array, operands: list[Array], gradients: bool) -> float:
    """Operations of the kernel over few keys (model/short_kernel.py).

    Args:
      out: a forward kernel's result. operands: of the instruction; flags are [I, 1, T] and [I, 1, S], and
        four arrays [T or S, W] turn queries and keys, or three [rows, H * W] have relative positions.
      gradients: whether it is the backward kernel, whose last operand is like `out`.
    """
    items, queries, width = (operands[-1] if gradients else out).extents
    keys = [a.extents[2] for a in operands if len(a.extents) == 3 and a.extents[1] == 1][1]
    small = [array.extents for array in operands if len(array.extents) == 2]
    total = queries * keys * (5 if gradients else 2)
    if len(small) == 3:
        total += queries * small[2][0] * (3 if gradients else 1)
    elif small:  # by a matrix [W, W]; of gradients too
        total += (queries + keys) * small[0][1] * (2 if gradients else 1)
    return 2.0 * items * width * total


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction moves between HBM and the chip."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode.endswith("-start") or opcode in COLLECTIVES:
        return _bytes_of_copy(computation, instruction)
    if opcode == "fusion":
        return _bytes_of_fusion(module, computation, instruction)
    written = sum(_bytes(array) for array in instruction.arrays)
    if opcode in _SLICES:
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2 * _bytes(_array(computation, instruction, 1))
    read = sum(_bytes(a) for name in instruction.operands for a in _arrays_of(computation, name))
    return written + read


def _bytes_of_copy(computation: Computation, instruction: Instruction) -> float:
    """The bytes that a copy or exchange reads and writes; a start's shape repeats its operands."""
    read = [a for name in instruction.operands for a in _arrays_of(computation, name)]
    written = list(instruction.arrays)
    if instruction.opcode.endswith("-start"):
        sliced = instruction.opcode in ("slice-start", "dynamic-slice-start", "async-start")
        arrays = [array for array in written if array.size > 1]
        target = arrays[0] if sliced or instruction.opcode == "copy-start" else arrays[-1]
        if sliced:
            target = min(arrays, key=lambda array: array.size)
            read = [dataclasses.replace(target, in_hbm=any(a.in_hbm for a in read))]
        written = [target]
    return sum(map(_bytes, read)) + sum(map(_bytes, written))


def _bytes_of_fusion(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Operands and results of a fusion, slices and updates in place as large as they are."""
    fused = module.computations[instruction.called[0]]
    total = 0.0
    updated: set[str] = set()
    root = fused.root
    outputs = root.operands if root.opcode == "tuple" else (root.name,)
    for name, array in zip(outputs, instruction.arrays):
        producer = _behind_bitcasts(fused, name)
        if producer.opcode == "dynamic-update-slice":
            updated.add(_behind_bitcasts(fused, producer.operands[0]).name)
            update = _array(fused, producer, 1)
            total += update.nbytes * array.in_hbm
        else:
            total += _bytes(array)
    for inner in fused.instructions.values():
        if inner.opcode != "parameter" or inner.name in updated:
            continue
        operand = instruction.operands[int(inner.operands[0])]
        arrays = _arrays_of(computation, operand)
        slices = _slices_of(module, fused, inner.name)
        if slices is None:
            total += sum(map(_bytes, arrays))
        elif arrays and arrays[0].in_hbm:
            total += min(sum(array.nbytes for array in slices), arrays[0].nbytes)
    return total


def _slices_of(module: Module, fused: Computation, name: str) -> list[Array] | None:
    """The slices that a fusion, or fusions in it, take of a parameter, if they read nothing else of it."""
    slices: list[Array] = []
    for user in fused.instructions.values():
        if name not in user.operands or user.opcode == "parameter":
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            slices.append(user.arrays[0])
            continue
        deeper = None
        if user.opcode == "bitcast":
            deeper = _slices_of(module, fused, user.name)
        elif user.opcode == "fusion":
            deeper = _slices_inside(module, user, name)
        if deeper is None:
            return None
        slices += deeper
    return slices


def _slices_inside(module: Module, fusion: Instruction, name: str) -> list[Array] | None:
    """The slices that a fusion takes of an operand, if it reads nothing else of it."""
    inner = module.computations[fusion.called[0]]
    slices: list[Array] = []
    for parameter in inner.instructions.values():
        if parameter.opcode != "parameter" or fusion.operands[int(parameter.operands[0])] != name:
            continue
        found = _slices_of(module, inner, parameter.name)
        if found is None:
            return None
        slices += found
    return slices


def _parts(module: Module, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """The parts of an instruction, where `executed` does not follow it."""
    if instruction.opcode not in ("while", "call", "conditional"):
        yield from module.inside(instruction)


def _collective(
    computation: Computation, instruction: Instruction, times: int, devices: int
) -> Collective | None:
    """The exchange that an instruction is or begins, if it is one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    operands = tuple(a for name in instruction.operands for a in _arrays_of(computation, name))
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(operands) : 2 * len(operands)]
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        arrays = operands
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    groups = _groups(instruction, devices)
    if len(groups[0]) == 1:
        return None
    return Collective(kind, arrays, groups, times, name[1] if name else "")


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Who exchanges with whom."""
    pairs = instruction.attribute("source_target_pairs")
    if pairs is not None:
        return tuple((int(source), int(target)) for source, target in _PAIRS.findall(pairs))
    text = instruction.attribute("replica_groups") or ""
    iota = _IOTA.match(text)
    if iota:
        shape, base, order = (_numbers(part) for part in iota.groups(default=""))
        ids = np.arange(math.prod(base)).reshape(base)
        ids = ids.transpose(order) if order else ids
        return tuple(tuple(map(int, row)) for row in ids.reshape(shape))
    mesh = _MESH.match(text)
    if mesh:
        return _mesh_groups(mesh[1], mesh[2])
    groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    return tuple(map(tuple, groups)) or (tuple(range(devices)),)


def _mesh_groups(axes: str, varying: str) -> tuple[tuple[int, ...], ...]:
    """Groups along some axes of a mesh, or along parts of axes: 'a':(2)4 is the 4 behind the first 2."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    parts: dict[str, list[tuple[int, bool]]] = {
        name: [(size, False)] for name, size in sizes.items()
    }
    for name, before, size in _GROUP_AXIS.findall(varying):
        first, length = (int(before), int(size)) if size else (1, sizes[name])
        rest = sizes[name] // (first * length)
        parts[name] = [(first, False), (length, True), (rest, False)]
    flat = [part for name in sizes for part in parts[name]]
    ids = np.arange(math.prod(sizes.values())).reshape([size for size, _ in flat])
    order = sorted(range(len(flat)), key=lambda axis: flat[axis][1])
    group = math.prod(size for size, varies in flat if varies)
    return tuple(tuple(map(int, row)) for row in ids.transpose(order).reshape(-1, group))


def _taps(instruction: Instruction, axis: int, size: int, out_size: int) -> float:
    """Pairs of an output position and a tap of the window that meet an element of the input."""
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window") or ""))

    def value(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    taps, stride = int(value("size", "1")), int(value("stride", "1"))
    low = int(value("pad", "0_0").split("_")[0])
    left, right = int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1"))
    places = np.arange(out_size)[:, None] * stride + np.arange(taps) * right - low
    return float(np.sum((places >= 0) & (places % left == 0) & (places // left < size)))


def _behind_bitcasts(computation: Computation, name: str) -> Instruction:
    """The source of a bitcast, or of a chain of them."""
    instruction = computation.instructions[name]
    while instruction.opcode == "bitcast":
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _array(computation: Computation, instruction: Instruction, index: int) -> Array:
    """The only array of an operand."""
    return computation.operand(instruction, index).arrays[0]


def _arrays_of(computation: Computation, name: str) -> tuple[Array, ...]:
    """An operand's arrays; none where the name is not an instruction's."""
    instruction = computation.instructions.get(name)
    return () if instruction is None else instruction.arrays


def _bytes(array: Array) -> float:
    """An array's bytes in HBM."""
    return array.nbytes if array.in_hbm else 0.0


def _numbers(text: str | None) -> list[int]:
    """The whole numbers in a text such as {0,2}."""
    return [int(number) for number in re.findall(r"\d+", text or "")]
