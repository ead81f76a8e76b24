"""Text in, text out."""

import dataclasses

import numpy as np

from retro_jax.generate.sample import Generator, SamplingConfig, sample_text
from tests.model.tiny import TINY, make_model

PAD, BOS, EOS = 0, 1, 2
MODEL = make_model(TINY)


class Letters:
    """A tokenizer of single letters."""

    bos_id, eos_id, pad_id = BOS, EOS, PAD

    def encode(self, text: str) -> np.ndarray:
        return np.array([4 + ord(c) - ord("a") for c in text], np.int32)

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + int(i) - 4) for i in ids)


def test_text_in_text_out():
    generator = Generator(MODEL, chunks=8, eos_id=EOS, forbidden=(PAD, BOS))
    sampling = SamplingConfig(max_tokens=6, top_k=9)
    steps: list[int] = []
    samples = sample_text(
        generator, Letters(), ["hello"] * 2, sampling, on_step=lambda: steps.append(1)
    )
    assert len(samples) == 2
    assert len(steps) == max(len(sample.generation.log_probabilities) for sample in samples)
    for sample in samples:
        assert sample.generation.tokens[0] == BOS
        assert sample.generation.prompt_length == 6
        assert sample.prompt == "hello"
        assert sample.text.startswith("hello")
    (empty,) = sample_text(generator, Letters(), [""], SamplingConfig(max_tokens=2))
    assert empty.generation.prompt_length == 1


def test_a_stop_string_is_not_part_of_the_text():
    generator = Generator(
        MODEL, chunks=8, eos_id=99, forbidden=(PAD, BOS, 2, 3), decode=Letters().decode
    )
    sampling = SamplingConfig(max_tokens=12, seed=4)
    (free,) = sample_text(generator, Letters(), ["hello"], sampling)
    stop = free.text[9:11]
    (sample,) = sample_text(
        generator, Letters(), ["hello"], dataclasses.replace(sampling, stop=(stop,))
    )
    assert sample.text == "hello" + free.text[5:].partition(stop)[0]
