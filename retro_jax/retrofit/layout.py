"""Where each canonical tensor is within the tensors of a file, as data that reads and writes.

A canonical tensor is a view of a file's tensor: axes cut apart, one index of a fused axis picked,
axes put in order. GPT-NeoX's query kernel, fused by head with keys and values, for example:

    file [H * 3 * K, D] -> split [H, 3, K, D] -> pick axis 1, index 0: [H, K, D] -> order (2, 0, 1)
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Shape = tuple[int, ...]
Rows = Callable[[int, int], np.ndarray]
_BLOCK = 1 << 18  # values that are converted at once


@dataclasses.dataclass(frozen=True)
class Part:
    """One canonical tensor within a tensor of a file.

    Attributes:
      name, shape: the canonical tensor's.
      split: the file tensor's shape with its axes cut apart.
      order: the axes of split, without the picked one, in the canonical order.
      pick: the axis of split, and the index along it, that belongs to this part; None for all of it.
    """

    name: str
    shape: Shape
    split: Shape
    order: tuple[int, ...]
    pick: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of a file: its name and shape there, and the canonical tensors within it."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]


def same(file_name: str, name: str, shape: Shape) -> FileTensor:
    """A tensor that the file has in the canonical form."""
    return FileTensor(file_name, shape, (Part(name, shape, shape, tuple(range(len(shape)))),))


def flat(file_name: str, name: str, shape: Shape) -> FileTensor:
    """A tensor that the file has with its axes joined into one: a bias of heads."""
    part = Part(name, shape, shape, tuple(range(len(shape))))
    return FileTensor(file_name, (math.prod(shape),), (part,))


def linear(file_name: str, name: str, inputs: Shape, outputs: Shape) -> FileTensor:
    """PyTorch's Linear: [outputs, inputs] in the file, [*inputs, *outputs] in the canonical form."""
    file_shape = (math.prod(outputs), math.prod(inputs))
    axes = range(len(outputs) + len(inputs))
    order = (*axes[len(outputs) :], *axes[: len(outputs)])
    part = Part(name, (*inputs, *outputs), (*outputs, *inputs), order)
    return FileTensor(file_name, file_shape, (part,))


def conv1d(file_name: str, name: str, inputs: Shape, outputs: Shape) -> FileTensor:
    """GPT-2's Conv1D: [inputs, outputs], the canonical order with axes joined."""
    shape = (*inputs, *outputs)
    part = Part(name, shape, shape, tuple(range(len(shape))))
    return FileTensor(file_name, (math.prod(inputs), math.prod(outputs)), (part,))


def view(part: Part, array: np.ndarray) -> np.ndarray:
    """The part of a C-ordered file tensor, in canonical order; its axes may be cut apart.

    Writing to the view writes to the array. `view(part, array).reshape(part.shape)` has the values.
    """
    cut = array.reshape(part.split)
    if part.pick is not None:
        axis, index = part.pick
        cut = cut[(slice(None),) * axis + (index,)]
    return cut.transpose(part.order)


def read_part(rows: Rows, count: int, part: Part, dtype: np.typing.DTypeLike) -> np.ndarray:
    """Reads one canonical tensor from a file tensor, block by block.

    Args:
      rows: gives rows [a, b) of the file's tensor; a map of the file, or dequantised then.
      count: how many rows there are.
      part: the part to read.
      dtype: of the result.

    Returns:
      A new C-ordered array of part.shape. No other array is larger than a block.
    """
    split, pick, start = part.split, part.pick, 0
    if pick is not None and pick[0] == 0:
        count //= split[0]
        start, split, pick = pick[1] * count, split[1:], None
    rest = [size for axis, size in enumerate(split) if pick is None or axis != pick[0]]
    out = np.empty(part.shape, dtype)
    target = out.reshape([rest[axis] for axis in part.order])
    leading = (slice(None),) * part.order.index(0)
    step = count // split[0]
    group = max(1, _BLOCK // max(1, math.prod(split[1:])))
    for first in range(0, split[0], group):
        last = min(split[0], first + group)
        block = rows(start + first * step, start + last * step)
        block_part = dataclasses.replace(part, split=(last - first, *split[1:]), pick=pick)
        target[(*leading, slice(first, last))] = view(block_part, block)
    return out


def write_part(part: Part, value: np.ndarray, array: np.ndarray) -> None:
    """Writes a canonical tensor into a file's C-ordered array, in that array's dtype."""
    target = view(part, array)
    target[...] = value.reshape(target.shape)


def parts_of(tensors: Sequence[FileTensor]) -> dict[str, tuple[FileTensor, Part]]:
    """canonical name -> where it is."""
    return {part.name: (tensor, part) for tensor in tensors for part in tensor.parts}
