"""What a server allows."""

import dataclasses

from retro_jax.config import require


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on requests; what is beyond them is refused, and never cut.

    Attributes:
      rows: texts that are continued at once.
      length: tokens of a text, prompt and continuation; 0 for the length that the model reads at once.
      queue: samples that may wait for a row, of all requests.
      seconds: that a request may take, waiting included.
      body: bytes of a request.
      stop_seconds: that running requests have to end in, once the server was asked to stop.
      strides: of retrieval that requests may ask for, besides a chunk's length.
    """

    rows: int = 16
    length: int = 0
    queue: int = 256
    seconds: float = 300.0
    body: int = 4_000_000
    stop_seconds: float = 60.0
    strides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "seconds", "body", "stop_seconds"):
            require(getattr(self, name) > 0, self, name, "a positive number")
        require(self.length >= 0, self, "length", "a number of tokens, or 0")
