"""Greedy answers to prompts: what a question is answered by, up to the end of a line."""

from collections.abc import Sequence

import numpy as np

from retro_jax.generate.generator import Generator
from retro_jax.generate.sampling import SamplingConfig


def greedy_answers(
    generator: Generator, prompts: Sequence[np.ndarray], *, max_tokens: int, at_once: int = 32
) -> list[str]:
    """The most likely continuation of each prompt, token by token, without spaces around it.

    Args:
      generator: with a decoder of tokens. prompts: each [n] token ids.
      max_tokens: of an answer; eos and the end of a line end it too.
      at_once: prompts in a batch. Longer lists are answered batch by batch.
    """
    sampling = SamplingConfig(max_tokens=max_tokens, temperature=0, stop=("\n",))
    texts: list[str] = []
    for first in range(0, len(prompts), at_once):
        block = generator.generate(prompts[first : first + at_once], sampling)
        texts += [(each.text or "").strip() for each in block]
    return texts
