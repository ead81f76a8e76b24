"""Texts that join and leave: each is what it is alone, whatever else runs, and nothing compiles late."""

import dataclasses

import jax
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.generate.generator import Generator, GeneratorOptions
from retro_jax.generate.live_database import Lookup, Retrieval
from retro_jax.generate.running_texts import row_counts
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.generate.text_progress import RunningText
from tests.model.tiny import make_model
from tests.serve.fakes import CONFIG, FakeDatabase, make_generator

LONG = "the quick brown fox jumps over the lazy dog and runs"  # longer than a window


@pytest.fixture(scope="module", name="running")
def _running():
    """Four rows, compiled."""
    running = make_generator().running(4, strides=(4, 2))
    running.warm_up()
    return running


def alone(running, prompt, sampling, lookup, samples=1) -> list[list[int]]:
    """The tokens of a prompt's samples, with nothing else under way."""
    generator = make_generator()
    tokens = generator.encode(prompt)
    texts = [generator.text(tokens, sampling, lookup=lookup, number=i) for i in range(samples)]
    running.join(texts)
    while running.texts:
        running.step()
    return [text.tokens for text in texts]


def test_a_text_equals_that_of_the_generator(running):
    """Past the window's end, with live retrieval."""
    lookup, sampling = Lookup(FakeDatabase(0), 2), SamplingConfig(max_tokens=20, seed=7)
    generator = Generator(
        make_model(CONFIG),
        chunks=4,
        eos_id=2,
        forbidden=(0, 1),
        retrieve=lookup,
        options=GeneratorOptions(2),
    )
    tokens = np.array(make_generator().encode(LONG[:20]), np.int32)
    (result,) = generator.generate([tokens], sampling)
    assert [result.tokens.tolist()] == alone(running, LONG[:20], sampling, lookup)


def test_a_stride_is_that_of_the_generator(running):
    """With prompts of less than a chunk, and past the window's end; all neighbours are named."""
    lookup, sampling = Lookup(FakeDatabase(0), 2, stride=4), SamplingConfig(max_tokens=20, seed=7)
    generator = Generator(
        make_model(CONFIG),
        chunks=4,
        eos_id=99,
        forbidden=(0, 1, 2),
        retrieve=lookup,
        options=GeneratorOptions(2, stride=4),
    )
    texts, without_eos = make_generator(), dataclasses.replace(sampling, forbidden_tokens=(2,))
    for prompt in (LONG[:5], LONG[:45]):
        tokens = texts.encode(prompt)
        (result,) = generator.generate([np.array(tokens, np.int32)], sampling)
        text = texts.text(tokens, without_eos, lookup=lookup)
        running.join([text])
        while running.texts:
            running.step()
        assert text.tokens == result.tokens.tolist()
        assert len(texts.by_chunk(text, lookup)) == (len(tokens) + 20) // 4 - 1
    text = texts.text(tokens, sampling, lookup=Lookup(FakeDatabase(0), 2, stride=3))
    with pytest.raises(UserError, match=r"a stride of 3: expected one of \(8, 4, 2\)"):
        running.join([text])


def test_each_text_is_as_alone(running):
    """They begin at other times, with settings, revisions and neighbours of their own."""
    generator = make_generator()
    lookups = [Lookup(FakeDatabase(i), 2) for i in range(2)]
    strided = Lookup(FakeDatabase(0), 2, stride=4)
    mixed = generator.lookup(Retrieval(stride=2, tokens=True), FakeDatabase(1))
    cases = [
        ("hello", SamplingConfig(max_tokens=40, temperature=0), lookups[0], 1),
        ("a b c d e f g h", SamplingConfig(max_tokens=9, seed=3, top_p=0.9), lookups[1], 2),
        (LONG, SamplingConfig(max_tokens=20, seed=4), None, 1),
        ("seven c", SamplingConfig(max_tokens=12, repetition_penalty=2.0), lookups[0], 1),
        ("hello", SamplingConfig(max_tokens=30, temperature=0, stop=("ab",)), lookups[1], 1),
        ("hello", SamplingConfig(max_tokens=25, seed=9), strided, 2),
        ("a b c d", SamplingConfig(max_tokens=25, seed=9), mixed, 1),
    ]
    texts: list[list[RunningText]] = [
        [generator.text(generator.encode(p), s, lookup=l, number=i) for i in range(n)]
        for p, s, l, n in cases
    ]
    waiting, streamed = list(texts), {}
    while waiting or running.texts:
        if waiting and len(waiting[0]) <= running.room:
            running.join(waiting.pop(0))
        for _ in range(3):
            for each in running.step():
                streamed[id(each.text)] = streamed.get(id(each.text), "") + each.piece
    for (prompt, sampling, lookup, samples), group in zip(cases, texts, strict=True):
        assert [text.tokens for text in group] == alone(running, prompt, sampling, lookup, samples)
        for text in group:
            assert streamed[id(text)] == text.stream.text
            assert text.ended in ("eos", "stop", "length")
    assert running.room == running.most == 4


def test_a_mixture_is_that_of_the_generator(running):
    """Its log-probabilities too; a text without a memory has other ones."""
    texts, sampling = make_generator(), SamplingConfig(max_tokens=20, temperature=0)
    lookup = texts.lookup(Retrieval(tokens=True), FakeDatabase(1))
    generator = Generator(
        make_model(CONFIG),
        chunks=4,
        eos_id=2,
        forbidden=(0, 1),
        retrieve=lookup,
        options=GeneratorOptions(2, mixture=lookup.mixture),
    )
    tokens = texts.encode("hello")
    (result,) = generator.generate([np.array(tokens, np.int32)], sampling)
    text, plain = (
        texts.text(tokens, sampling, lookup=one) for one in (lookup, Lookup(FakeDatabase(1), 2))
    )
    running.join([text])
    running.join([plain])
    while running.texts:
        running.step()
    assert text.tokens == result.tokens.tolist() != plain.tokens
    np.testing.assert_allclose(text.log_probabilities, result.log_probabilities, atol=1e-5)
    with pytest.raises(UserError, match="revision 7 has no token memory"):
        texts.lookup(Retrieval(tokens=True), FakeDatabase(7))


def test_one_neighbour_of_two_is_padded(running):
    generator = make_generator()
    one = Lookup(FakeDatabase(0), 1)
    text = generator.text(generator.encode(LONG[:20]), SamplingConfig(max_tokens=9), lookup=one)
    running.join([text])
    while running.texts:
        running.step()
    assert {len(chunk) for chunk in generator.by_chunk(text, one)} == {1}
    assert all((each[1] == 0).all() and each[0].any() for each in text.neighbours)


def test_a_text_that_fails_or_leaves_harms_no_other(running):
    generator, sampling = make_generator(), SamplingConfig(max_tokens=25, temperature=0)
    lookup = Lookup(FakeDatabase(0), 2)

    def failing(chunks: np.ndarray) -> np.ndarray:
        raise OSError("gone")

    good, bad, left = (
        generator.text(generator.encode("hello"), sampling, lookup=lookup) for _ in range(3)
    )
    bad.retrieve = failing
    for text in (good, bad, left):
        running.join([text])
    for _ in range(4):
        running.step()
    assert running.end(left, "cancelled").ended == "cancelled"
    assert running.end(left, "cancelled") is None
    while running.texts:
        running.step()
    assert good.tokens == alone(running, "hello", sampling, lookup)[0]
    assert bad.ended == "error" and isinstance(bad.error, OSError)
    assert len(left.tokens) < len(good.tokens)
    for wrong in (np.zeros((1, 3, 16)), np.zeros((1, 2, 5)), np.zeros((1, 16))):
        text = generator.text(generator.encode("a" * 9), sampling, lookup=lookup)
        text.retrieve = lambda chunks, wrong=wrong: wrong
        with pytest.raises(UserError, match="expected"):
            running.join([text])
    assert not running.texts


def test_nothing_is_compiled_after_warm_up(running):
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _seconds, **_: compiled.append(name) if "compile" in name else None
    )
    generator = make_generator()
    lookups = [Lookup(FakeDatabase(5), 2), Lookup(FakeDatabase(5), 2, stride=4)]
    lookups.append(generator.lookup(Retrieval(tokens=True), FakeDatabase(5)))
    for count, lookup in zip((1, 3, 4, 2), [*lookups, lookups[1]], strict=True):
        penalty, top_p = (1.5, 1) if count == 4 else (1, 0.5)
        sampling = SamplingConfig(12, seed=count, top_p=top_p, repetition_penalty=penalty)
        text = "quite another text " * count
        running.join(
            [
                generator.text(generator.encode(text), sampling, lookup=lookup, number=i)
                for i in range(count)
            ]
        )
        while running.texts:
            running.step()
    assert not compiled


def test_numbers_of_rows():
    assert [row_counts(most) for most in (1, 2, 4, 6, 16, 20)] == [
        [1],
        [1, 2],
        [1, 4],
        [1, 4, 8],
        [1, 4, 16],
        [1, 4, 16, 32],
    ]
