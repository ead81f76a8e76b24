"""A text that is continued beside others, and what each step does to it."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from retro_jax.generate.mixture import Mixture
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.generate.text_stream import TextStream

Retrieve = Callable[[np.ndarray], np.ndarray]
Decode = Callable[[Sequence[int]], str]


@dataclasses.dataclass(eq=False)
class RunningText:
    """A text that is continued.

    Attributes:
      tokens: prompt (with bos) and continuation. prompt_length: how many are the prompt.
      sampling: its settings. number: among the samples of its prompt.
      retrieve: gives neighbours [n, k, R] of complete chunks [n, M], k <= K; None is retrieval off.
      stride: s, tokens between retrievals; 0 for a chunk, M.
      mixture: the token memory that the model is mixed with.
      alternatives: likeliest tokens to report at each position.
      neighbours: [K, R] after each s tokens; None before there are M. log_probabilities: of the
        continuation, in nats.
      ended: "" under way; "eos", "stop" (a stop string), "length", "cancelled", "timeout" or "error".
      error: what went wrong with this text alone.
    """

    tokens: list[int]
    prompt_length: int
    sampling: SamplingConfig
    stream: TextStream
    retrieve: Retrieve | None = None
    number: int = 0
    alternatives: int = 0
    stride: int = 0
    mixture: Mixture | None = None
    neighbours: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    ended: str = ""
    error: Exception | None = None
    first: int = 0

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.log_probabilities)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step did to a text.

    Attributes:
      text: which one. piece: new text, which may be "" where it is held back.
      token, log_probability: drawn now; None where the text ended without one.
      alternatives: the likeliest tokens there, likeliest first, as (token, log-probability).
      ended: as the text's; "" while it is under way.
    """

    text: RunningText
    piece: str
    token: int | None
    log_probability: float | None
    alternatives: tuple[tuple[int, float], ...]
    ended: str
