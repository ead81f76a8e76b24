"""Text in, text out: prompts are encoded, continued and decoded."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from retro_jax.generate.generator import Generation, Generator
from retro_jax.generate.sampling import SamplingConfig

__all__ = ["Generation", "Generator", "Sample", "SamplingConfig", "TextCodec", "sample_text"]


class TextCodec(Protocol):
    """The methods that are needed of a tokenizer."""

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its continuation, as text (`text` is both) and as tokens."""

    prompt: str
    text: str
    generation: Generation


def sample_text(
    generator: Generator,
    codec: TextCodec,
    prompts: Sequence[str],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    *,
    on_step: Callable[[], object] = lambda: None,
) -> list[Sample]:
    """Continues prompts, all at once; give one several times for several samples of it.

    A text that a stop string ended reaches up to that string.
    """
    tokens = [np.concatenate([[codec.bos_id], codec.encode(prompt)]) for prompt in prompts]
    generations = generator.generate(tokens, sampling, on_step=on_step)
    special = (codec.bos_id, codec.eos_id, codec.pad_id)

    def text(prompt: str, generation: Generation) -> str:
        if generation.ended == "stop" and generation.text is not None:
            return prompt + generation.text
        return codec.decode([int(t) for t in generation.tokens if t not in special])

    return [
        Sample(prompt, text(prompt, generation), generation)
        for prompt, generation in zip(prompts, generations, strict=True)
    ]
