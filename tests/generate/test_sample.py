"""Generation: aligned with training, deterministic, filtered as asked, ended by eos."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.errors import UserError
from retro_jax.generate.sample import (
    Filters,
    Generation,
    Generator,
    SamplingConfig,
    draw,
    sample_text,
)
from tests.model.tiny import TINY, make_model

PAD, BOS, EOS = 0, 1, 2
M = 64
CONFIG = dataclasses.replace(TINY, chunk_length=M, neighbour_length=2 * M)
GREEDY = SamplingConfig(max_tokens=70, temperature=0)


@pytest.fixture(scope="module")
def model():
    """A random model with the real chunk length."""
    return make_model(CONFIG)


class FakeRetriever:
    """Neighbours that depend on the chunk asked for; remembers what it was asked."""

    def __init__(self, k: int = 2):
        self.k = k
        self.queries: list[list[int]] = []

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        self.queries += chunks.tolist()
        return np.stack([self.of(chunk) for chunk in chunks])

    def of(self, chunk: np.ndarray) -> np.ndarray:
        """[K, R] for one chunk; the last slot has no continuation."""
        rng = np.random.default_rng(int(np.dot(chunk, np.arange(1, M + 1))))
        tokens = rng.integers(4, CONFIG.vocab_size, (self.k, 2 * M)).astype(np.int32)
        tokens[-1, M:] = PAD
        return tokens


class Recording(Generator):
    """A Generator that keeps the logits of every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps: list[np.ndarray] = []

    def next_logits(self, tokens, neighbours, last):
        logits = super().next_logits(tokens, neighbours, last)
        self.steps.append(np.asarray(logits))
        return logits


def _prompt(length: int, seed: int = 0) -> np.ndarray:
    """bos and random text, `length` tokens in all."""
    text = np.random.default_rng(seed).integers(4, CONFIG.vocab_size, length - 1)
    return np.concatenate([[BOS], text]).astype(np.int32)


def _generator(model, retrieve, cls: Any = Generator, chunks: int = 8, eos_id: int = 99) -> Any:
    """A generator whose eos never comes, unless given."""
    return cls(model, chunks=chunks, eos_id=eos_id, retrieve=retrieve, forbidden=(PAD, BOS))


@partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, tokens, neighbours):
    return nnx.merge(graphdef, params)(tokens, neighbours)


def _teacher_forced(model, tokens: np.ndarray, first_chunk: int = 0, retrieve=None) -> np.ndarray:
    """Logits [n, V] of a finished text from `first_chunk` on, neighbours for all complete chunks."""
    tokens = tokens[first_chunk * M :]
    padded = np.full((1, 4 * M), PAD, np.int32)
    padded[0, : len(tokens)] = tokens
    neighbours = np.full((1, 4, 2, 2 * M), PAD, np.int32)
    if retrieve is not None:
        for u in range(len(tokens) // M):
            neighbours[0, u] = retrieve.of(tokens[u * M : (u + 1) * M])
    return np.asarray(_forward(*nnx.split(model), padded, neighbours))[0, : len(tokens)]


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal within the tolerance of float32, relative to the largest logit."""
    return bool(np.abs(a - b).max() <= 1e-5 * np.abs(b).max())


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_greedy_logits_equal_the_teacher_forced_ones(model, length: int):
    retrieve = FakeRetriever()
    generator = _generator(model, retrieve, Recording)
    (result,) = generator.generate([_prompt(length)], GREEDY)
    assert result.tokens.shape == (length + 70,)
    assert result.prompt_length == length
    forced = _teacher_forced(model, result.tokens, retrieve=FakeRetriever())
    steps = np.concatenate(generator.steps)
    assert _close(steps, forced[length - 1 : -1])
    # Neighbours matter here: without them, logits differ from the first complete chunk on.
    off = _teacher_forced(model, result.tokens)
    assert _close(off[: M - 1], forced[: M - 1])
    assert not _close(off[M - 1 :], forced[M - 1 :])

    complete = (length + 69) // M  # before the last token was drawn
    expected = [result.tokens[u * M : (u + 1) * M].tolist() for u in range(complete)]
    assert retrieve.queries == expected
    assert result.neighbours is not None
    assert len(result.neighbours) == complete
    for u, query in enumerate(expected):
        assert (result.neighbours[u] == retrieve.of(np.array(query))).all()


def test_log_probabilities_are_those_of_the_model(model):
    sampling = SamplingConfig(max_tokens=5, temperature=0.5, top_k=3, top_p=0.9)
    (result,) = _generator(model, None).generate([_prompt(10)], sampling)
    logits = _teacher_forced(model, result.tokens).astype(np.float64)[9:-1]
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = logits[np.arange(5), result.tokens[10:]]
    assert np.allclose(result.log_probabilities, expected, atol=1e-5)
    assert result.neighbours is None


def test_texts_of_different_lengths_do_not_disturb_each_other(model):
    together = _generator(model, FakeRetriever()).generate([_prompt(3), _prompt(130, 1)], GREEDY)
    alone = [
        _generator(model, FakeRetriever()).generate([prompt], GREEDY)[0]
        for prompt in (_prompt(3), _prompt(130, 1))
    ]
    for a, b in zip(together, alone, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()


def test_past_the_trained_length_the_window_moves_by_chunks(model):
    retrieve = FakeRetriever()
    generator = _generator(model, retrieve, Recording, chunks=2)
    (result,) = generator.generate([_prompt(120)], dataclasses.replace(GREEDY, max_tokens=80))
    tokens, steps = result.tokens, np.concatenate(generator.steps)
    assert _close(steps[:9], _teacher_forced(model, tokens[:128], retrieve=retrieve)[119:])
    moved = _teacher_forced(model, tokens[:192], 1, retrieve)
    assert _close(steps[9:73], moved[64:128])
    assert _close(steps[73:80], _teacher_forced(model, tokens, 2, retrieve)[64:-1])
    assert result.neighbours is not None
    assert len(result.neighbours) == 3


def _tokens(results: list[Generation]) -> list[list[int]]:
    return [result.tokens.tolist() for result in results]


def test_the_seed_decides_and_each_sample_has_its_own_stream(model):
    prompt = _prompt(5)
    sampling = SamplingConfig(max_tokens=20, seed=3)
    first = _tokens(_generator(model, None).generate([prompt] * 3, sampling))
    again = _tokens(_generator(model, None).generate([prompt] * 3, sampling))
    fewer = _tokens(_generator(model, None).generate([prompt] * 2, sampling))
    other = _tokens(
        _generator(model, None).generate([prompt] * 3, dataclasses.replace(sampling, seed=4))
    )
    assert first == again
    assert first[:2] == fewer
    assert first != other
    assert len({tuple(tokens) for tokens in first}) == 3


def test_equal_chunks_are_retrieved_once_a_run(model):
    retrieve = FakeRetriever()
    _generator(model, retrieve).generate(
        [_prompt(64)] * 3, dataclasses.replace(GREEDY, max_tokens=2)
    )
    assert len(retrieve.queries) == 1


def test_eos_ends_a_text_and_the_others_go_on(model):
    prompts, sampling = [_prompt(5), _prompt(7, 1)], SamplingConfig(max_tokens=12, seed=1)
    free = _tokens(_generator(model, None).generate(prompts, sampling))

    def cut(i: int, eos: int) -> list[int]:
        """Text i up to the first eos after its prompt."""
        generated = free[i][len(prompts[i]) :]
        stop = generated.index(eos) + 1 if eos in generated else len(generated)
        return free[i][: len(prompts[i]) + stop]

    eos = next(t for t in free[0][5:-1] if len(cut(0, t)) - 5 < len(cut(1, t)) - 7)
    ended = _generator(model, None, eos_id=eos).generate(prompts, sampling)
    assert _tokens(ended) == [cut(0, eos), cut(1, eos)]
    assert ended[0].finished
    assert len(ended[0].log_probabilities) == len(cut(0, eos)) - 5
    assert ended[1].finished == (ended[1].tokens[-1] == eos)


def test_eos_is_not_drawn_before_min_tokens(model):
    sampling = SamplingConfig(max_tokens=12, seed=1)
    free = _tokens(_generator(model, None).generate([_prompt(5)], sampling))[0]
    later = dataclasses.replace(sampling, min_tokens=8)
    generator = _generator(model, None, eos_id=free[5])
    assert len(generator.generate([_prompt(5)], sampling)[0].tokens) == 6
    held = generator.generate([_prompt(5)], later)[0].tokens[5:].tolist()
    assert free[5] not in held[:8]
    assert len(held) >= 8


def test_forbidden_tokens_are_never_drawn(model):
    favourite = int(_generator(model, None).generate([_prompt(5)], GREEDY)[0].tokens[5])
    generator = Generator(model, chunks=8, eos_id=99, forbidden=(PAD, BOS, favourite))
    for temperature in (0, 5.0):
        sampling = SamplingConfig(max_tokens=60, temperature=temperature)
        tokens = generator.generate([_prompt(5)], sampling)[0].tokens[5:]
        assert not {PAD, BOS, favourite} & set(tokens.tolist())


def test_filters_leave_what_they_should():
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)
    rows = 4000
    logits = np.tile(np.log(probabilities), (rows, 1))
    keys = jax.random.split(jax.random.key(0), rows)

    def frequencies(temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
        filters = Filters(temperature, top_k, top_p)
        tokens, _ = draw(logits, np.ones(5, bool), keys=keys, step=0, filters=filters)
        return np.bincount(np.asarray(tokens), minlength=5) / rows

    def near(observed: np.ndarray, weights: list[float]) -> bool:
        expected = np.array(weights) / sum(weights)
        absent_too = ((observed > 0) == (expected > 0)).all()
        return bool(absent_too and np.abs(observed - expected).max() < 0.04)

    assert near(frequencies(), probabilities.tolist())
    assert near(frequencies(temperature=0.5), (probabilities**2).tolist())
    assert near(frequencies(top_k=2), [0.4, 0.3, 0, 0, 0])
    assert near(frequencies(top_p=0.75), [0.4, 0.3, 0.15, 0, 0])
    assert near(frequencies(top_p=0.001), [1, 0, 0, 0, 0])
    assert near(frequencies(top_k=3, top_p=0.8), [0.4, 0.3, 0, 0, 0])  # of 0.85 that are left
    assert near(frequencies(temperature=0), [1, 0, 0, 0, 0])


class Letters:
    """A tokenizer of single letters."""

    bos_id, eos_id, pad_id = BOS, EOS, PAD

    def encode(self, text: str) -> np.ndarray:
        return np.array([4 + ord(c) - ord("a") for c in text], np.int32)

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + int(i) - 4) for i in ids)


def test_text_in_text_out(model):
    generator = _generator(model, FakeRetriever(), eos_id=EOS)
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
)
def test_bad_sampling_settings_are_refused(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"SamplingConfig\.{name} is"):
        SamplingConfig(**wrong)


def test_a_prompt_without_bos_is_refused(model):
    with pytest.raises(UserError, match="no token: expected bos"):
        _generator(model, None).generate([np.zeros(0, np.int32)], GREEDY)
