"""Generation: aligned with training, equal to the uncached one, deterministic, ended as asked."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.errors import UserError
from retro_jax.generate.generator import Generation, Generator, GeneratorOptions
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.sharding import MeshConfig, make_mesh
from tests.generate.test_decoder import MESHED, on_mesh
from tests.generate.uncached import UncachedGenerator
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
    """A Generator of one text that keeps the logits of every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps: list[np.ndarray] = []
        fetch = self.decoder.on_one_device

        def recorded(logits):
            self.steps.append(np.asarray(logits))
            return fetch(logits)

        self.decoder.on_one_device = recorded  # type: ignore[method-assign]


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


def test_a_prompt_without_bos_is_refused(model):
    with pytest.raises(UserError, match="no token: expected bos"):
        _generator(model, None).generate([np.zeros(0, np.int32)], GREEDY)


PROMPTS = [_prompt(3), _prompt(130, 1), _prompt(64, 2), _prompt(127, 3)]


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("retrieval", [True, False])
def test_greedy_texts_equal_those_of_the_uncached_generator(positions: str, retrieval: bool):
    """Past the trained length too: two of the windows of two chunks move while generating."""
    model = make_model(dataclasses.replace(CONFIG, positions=positions))
    settings: dict[str, Any] = {"chunks": 2, "eos_id": EOS, "forbidden": (PAD, BOS)}
    settings["retrieve"] = FakeRetriever() if retrieval else None
    results = Generator(model, **settings).generate(PROMPTS, GREEDY)
    slow = UncachedGenerator(model, **settings).generate(PROMPTS, GREEDY.max_tokens)
    assert _tokens(results) == [tokens.tolist() for tokens in slow]


def test_the_baseline_and_retrieval_that_it_cannot_read():
    model = make_model(CONFIG.baseline())
    retrieve = FakeRetriever()
    (result,) = _generator(model, retrieve).generate([_prompt(70)], GREEDY)
    slow = UncachedGenerator(model, chunks=8, eos_id=99, forbidden=(PAD, BOS))
    assert result.tokens.tolist() == slow.generate([_prompt(70)], 70)[0].tolist()
    assert not retrieve.queries


def test_a_generator_on_a_mesh_gives_the_same_texts():
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    config = MESHED
    with jax.set_mesh(mesh):
        model = on_mesh(config, mesh)
    prompts = [np.array([BOS, *range(4, 4 + n)], np.int32) for n in (1, 6, 3)]
    sampling = SamplingConfig(max_tokens=14, temperature=0)
    settings: dict[str, Any] = {"chunks": 3, "eos_id": EOS, "forbidden": (PAD, BOS)}

    def retrieve(chunks: np.ndarray) -> np.ndarray:
        return np.stack([np.tile(chunks, 2), np.tile(chunks[:, ::-1], 2)], axis=1)

    made = Generator(model, retrieve=retrieve, mesh=mesh, **settings).generate(prompts, sampling)
    alone = Generator(make_model(config), retrieve=retrieve, **settings)
    assert _tokens(made) == _tokens(alone.generate(prompts, sampling))
    assert made[0].neighbours is not None


def test_samples_of_one_prompt_cost_one_prefill(model):
    generator = _generator(model, FakeRetriever())
    rows: list[int] = []
    prefill = generator.decoder.prefill

    def counted(windows, **kwargs):
        rows.append(len(windows))
        return prefill(windows, **kwargs)

    generator.decoder.prefill = counted
    results = generator.generate([_prompt(70)] * 8, SamplingConfig(max_tokens=4, seed=1))
    assert rows == [1]
    assert len({tuple(result.tokens) for result in results}) > 1


def test_the_same_seed_gives_the_same_text_in_any_batch(model):
    sampling = SamplingConfig(max_tokens=12, seed=5, top_p=0.9)
    a, b, c = _prompt(5), _prompt(9, 1), _prompt(70, 2)
    together = _tokens(_generator(model, None).generate([a, b, c], sampling))
    turned = _tokens(_generator(model, None).generate([c, a, b], sampling))
    alone = _tokens(_generator(model, None).generate([b], sampling))
    assert turned == [together[2], together[0], together[1]]
    assert alone == [together[1]]


def test_each_text_has_settings_of_its_own(model):
    greedy = dataclasses.replace(GREEDY, max_tokens=9)
    random = SamplingConfig(max_tokens=4, seed=2, top_k=5)
    both = _generator(model, None).generate([_prompt(5), _prompt(6, 1)], [greedy, random])
    assert [len(result.log_probabilities) for result in both] == [9, 4]
    for result, prompt, setting in zip(
        both, (_prompt(5), _prompt(6, 1)), (greedy, random), strict=True
    ):
        (alone,) = _generator(model, None).generate([prompt], setting)
        assert alone.tokens.tolist() == result.tokens.tolist()
    with pytest.raises(UserError, match="2 settings of sampling: expected 1"):
        _generator(model, None).generate([_prompt(5)], [greedy, random])


def test_a_repetition_penalty_reads_prompt_and_continuation(model):
    never = dataclasses.replace(GREEDY, max_tokens=12, repetition_penalty=1e9)
    generator = _generator(model, None)
    free = generator.generate([_prompt(5)] * 2, dataclasses.replace(never, repetition_penalty=1))
    assert len(set(free[0].tokens[5:].tolist())) < 12
    for result in generator.generate([_prompt(5)] * 2, never):
        made = result.tokens[5:].tolist()
        # A logit that is positive becomes small, so a token comes twice only where all others are negative.
        assert len(set(made)) > len(set(free[0].tokens[5:].tolist()))


def test_finished_texts_leave_the_batch(model):
    """Eight texts, seven of which end early: the last one goes on in a batch of one row."""
    settings = [SamplingConfig(max_tokens=2 if i else 9, seed=3) for i in range(8)]
    generator = _generator(model, FakeRetriever())
    rows: list[int] = []
    step = generator.decoder.step

    def counted(cache, *args, **kwargs):
        rows.append(cache.rows)
        return step(cache, *args, **kwargs)

    generator.decoder.step = counted
    results = generator.generate([_prompt(50)] * 8, settings)
    assert rows == [8, *[1] * 7]
    (alone,) = _generator(model, FakeRetriever()).generate([_prompt(50)], settings[0])
    assert results[0].tokens.tolist() == alone.tokens.tolist()


def test_stop_strings_end_a_text(model):
    letters = lambda ids: "".join(chr(ord("a") + int(i)) for i in ids)  # noqa: E731
    generator = Generator(model, chunks=8, eos_id=99, forbidden=(PAD, BOS), decode=letters)
    sampling = SamplingConfig(max_tokens=20, seed=1)
    (free,) = generator.generate([_prompt(5)], sampling)
    assert free.text == letters(free.tokens[5:])
    assert free.ended == "length"
    stop = free.text[6:8]
    streamed: list[str] = []
    (result,) = generator.generate(
        [_prompt(5)],
        dataclasses.replace(sampling, stop=(stop, "no such text")),
        on_text=lambda _, text: streamed.append(text),
    )
    end = free.text.index(stop)
    assert (result.ended, result.finished) == ("stop", False)
    assert result.text == free.text[:end] == "".join(streamed)
    assert result.tokens.tolist() == free.tokens[: 5 + end + 2].tolist()
    with pytest.raises(UserError, match="without a decoder of tokens"):
        _generator(model, None).generate([_prompt(5)], dataclasses.replace(sampling, stop=("a",)))


def test_neighbours_of_a_bad_shape_are_refused(model):
    bad = lambda chunks: np.zeros((len(chunks), 2, 5), np.int32)  # noqa: E731
    with pytest.raises(UserError, match=r"shape \(1, 2, 5\): expected \[1, K >= 1, 128\]"):
        _generator(model, bad).generate([_prompt(64)], GREEDY)


def test_nothing_is_compiled_after_warm_up(model):
    settings: dict[str, Any] = {"chunks": 8, "eos_id": 99, "forbidden": (PAD, BOS)}
    generator = Generator(model, retrieve=FakeRetriever(), options=GeneratorOptions(2), **settings)
    compiled: list[str] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if "trace" in name or "compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    sampling = SamplingConfig(max_tokens=100, top_k=5)
    generator.generate([_prompt(30), _prompt(60, 1)], sampling)
    assert compiled
    compiled.clear()
    other = dataclasses.replace(sampling, seed=7, top_k=9, temperature=0.3)
    results = generator.generate([_prompt(45, 2), _prompt(17, 3)], other)
    assert not compiled
    assert [len(result.log_probabilities) for result in results] == [100, 100]
