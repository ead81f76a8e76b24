"""What happens at a batch whose loss is not finite or jumps."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class BadBatches:
    """What happens at a bad batch.

    Attributes:
      skip: whether the run goes on. describe: says of a step's batch, counted from 1, what it was
        made of, and what is saved.
    """

    skip: bool = False
    describe: Callable[[int], str] = lambda step: ""
