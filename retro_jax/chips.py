"""TPU chips as their public specifications state them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of Cloud TPU as its public specification states it.

    Attributes:
      name: as topologies name it. hbm: bytes. bandwidth: of HBM, bytes per second.
      peak: bfloat16 operations per second. ici: bytes per second out of all links together, one way.
      dimensions: of the torus; each has two links. wraps: extents of a slice along a dimension that
        are a multiple of this have links around.
    """

    name: str
    hbm: float
    bandwidth: float
    peak: float
    ici: float
    dimensions: int
    wraps: int

    @property
    def link(self) -> float:
        """Bytes per second over one link, one way."""
        return self.ici / (2 * self.dimensions)


# cloud.google.com/tpu/docs/v4, v5e, v5p and v6e; gigabits of interconnect there are divided by 8.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 1200e9, 275e12, 300e9, dimensions=3, wraps=4),
        Chip("v5e", 16 * 2**30, 800e9, 197e12, 200e9, dimensions=2, wraps=16),
        Chip("v5p", 95 * 2**30, 2765e9, 459e12, 600e9, dimensions=3, wraps=4),
        Chip("v6e", 32 * 2**30, 1600e9, 918e12, 400e9, dimensions=2, wraps=16),
    )
}
