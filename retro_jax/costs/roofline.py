"""The peak rates of a chip, and so the least time of a program.

    bound = max( operations / peak,  bytes to and from HBM / bandwidth,  bytes over links / links )

Everything is assumed to overlap and to run at the published rate, so no run is faster than its bound.
The largest of the three binds. MFU's bound is the model's own operations over those that
the chips could have done in that time. All figures are for one chip, and links count one way.
"""

import dataclasses
import math
from collections.abc import Mapping

from retro_jax.chips import CHIPS, Chip
from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips wired as a grid: `v5p:4x4x8` is 128 of them."""

    chip: Chip
    extents: tuple[int, ...]

    @property
    def size(self) -> int:
        """Chips."""
        return math.prod(self.extents)

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{self.chip.name}:{'x'.join(map(str, self.extents))}"

    def bandwidth(self, chips: list[tuple[int, ...]]) -> float:
        """Bytes per second that each of a group of chips can receive from the others.

        A dimension that the group fills from end to end, and that wraps, carries them over both of
        its links; any other over one, as its ends have but one.

        Args:
          chips: the group's coordinates.
        """
        links = 0
        for dimension, extent in enumerate(self.extents):
            filled = len({chip[dimension] for chip in chips})
            around = filled == extent and extent % self.chip.wraps == 0
            links += 0 if filled == 1 else 2 if around else 1
        return self.chip.link * links


def parse_slice(name: str) -> Slice:
    """Reads `GENERATION:AxBxC`.

    Raises:
      UserError: an unknown generation, or extents that are not of its torus.
    """
    generation, _, grid = name.partition(":")
    if generation not in CHIPS:
        raise UserError(
            f"topology {name!r} names no known chip: expected one of "
            f"{', '.join(CHIPS)} and extents, as in v5p:4x4x4, or cpu:8"
        )
    chip, parts = CHIPS[generation], grid.split("x")
    if len(parts) != chip.dimensions or not all(part.isdigit() and int(part) for part in parts):
        example = "x".join(["4"] * chip.dimensions)
        raise UserError(
            f"topology {name!r} has no grid of {generation}: expected {chip.dimensions} positive "
            f"extents, as in {generation}:{example}"
        )
    return Slice(chip, tuple(map(int, parts)))


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time a step can take.

    Attributes:
      seconds: by resource ("compute", "HBM", "ICI"). model_flops: the model's own operations
        a chip and step. peak: the chip's.
    """

    seconds: Mapping[str, float]
    model_flops: float
    peak: float

    @property
    def step(self) -> float:
        """Seconds; nothing is hidden behind anything slower."""
        return max(self.seconds.values())

    @property
    def binds(self) -> str:
        """The resource that takes the most time."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def mfu(self) -> float:
        """The largest part of the chips' operations that can be the model's own."""
        return self.model_flops / (self.peak * self.step)

    @property
    def serial_mfu(self) -> float:
        """The same if nothing overlapped: compute, then HBM, then links."""
        return self.model_flops / (self.peak * sum(self.seconds.values()))
