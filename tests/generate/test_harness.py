"""lm-eval's requests: numbers by the plain forward pass, greedy or not, whatever else is asked; no lm-eval."""

import functools
import importlib
import sys
import types

import jax
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.generate.harness import Harness
from tests.serve.fakes import CONFIG, EOS, FakeDatabase, make_generator

_M, _CHUNKS = CONFIG.chunk_length, 4
_PAIRS = [
    ("the lobster is", " blue"),
    ("", "a text of its own"),
    ("abc", ""),
    ("of the sea", "z"),
    ("two chunks of letters", " x"),
]  # each at most 23 tokens, which every window sees whole


generator_of_all = functools.cache(make_generator)  # its programs are compiled once


def forced(text: str, retrieval: bool) -> np.ndarray:
    """[n + 1, V] log-probabilities of a text's tokens and of what follows, by one forward pass."""
    generator = generator_of_all()
    tokens = np.array([*generator.encode(text), EOS], np.int32)
    count = _CHUNKS
    chunks = np.zeros((count, _M), np.int32)
    chunks.reshape(-1)[: len(tokens)] = tokens
    neighbours = None
    if retrieval:
        database = FakeDatabase(0)
        found, _ = database.find(chunks, generator.neighbours)
        neighbours = database.values(found)[None]
    documents = np.zeros((1, count), np.int32)
    logits = _forward()(generator.model, chunks.reshape(1, -1), neighbours, documents)
    return np.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=-1))[0, : len(tokens) - 1]


@functools.cache
def _forward():
    """The whole pass, compiled."""
    return jax.jit(lambda model, *inputs: model(*inputs))


@pytest.mark.parametrize("retrieval", [True, False])
def test_continuations_are_scored_after_their_contexts(retrieval):
    answers = Harness(generator_of_all(), retrieval=retrieval).log_likelihoods(_PAIRS)
    for (context, continuation), (nats, greedy) in zip(_PAIRS, answers, strict=True):
        scores = forced(context + continuation, retrieval)[len(context) :]
        ids = generator_of_all().codec.encode(continuation)
        scores = scores[: len(ids)]
        assert nats == pytest.approx(float(scores[np.arange(len(ids)), ids].sum()), abs=2e-4)
        assert greedy == bool((scores.argmax(-1) == ids).all())
    assert answers[2] == (0.0, True)


def test_a_greedy_continuation_is_greedy_and_another_is_not():
    generator = generator_of_all()
    harness = Harness(generator)
    (text,) = harness.continuations([("the lobster", {"max_gen_toks": 6})])
    assert len(text) == 6
    other = "x" if text[3] != "x" else "y"
    pairs = [("the lobster", text), ("the lobster", text[:3] + other + text[4:])]
    assert [greedy for _, greedy in harness.log_likelihoods(pairs)] == [True, False]


def test_rolling_scores_are_those_of_score_and_of_no_context():
    generator, texts = generator_of_all(), ["a text", "of two chunks", "c"]
    harness = Harness(generator)
    rolling = harness.answers("loglikelihood_rolling", [(text,) for text in texts])
    sums = [float(one.log_probabilities.sum()) for one in generator.score(texts)]
    np.testing.assert_allclose(rolling, sums, rtol=1e-5)
    pairs = harness.answers("loglikelihood", [("", text) for text in texts])
    np.testing.assert_allclose([nats for nats, _ in pairs], rolling, rtol=1e-6)


def test_no_answer_depends_on_the_other_requests():
    """Texts of more than C - stride + 1 chunks are cut by windows, whose places must not move."""
    generator, counted = generator_of_all(), []
    long = "abcdefgh ijklmnop " * 6
    assert len(long) > generator.scorer.whole
    harness = Harness(generator)
    alone = harness.rolling_log_likelihoods([long])
    together = harness.rolling_log_likelihoods(["some text", long, "more"] * 30, counted.append)
    np.testing.assert_allclose(together[1::3], np.repeat(alone, 30), rtol=1e-5)
    assert counted == [64, 26]


def test_a_token_across_the_boundary_counts(monkeypatch):
    """Of a tokeniser whose token is two letters, a context that ends within one gives it away."""
    harness = Harness(generator_of_all())
    tokens = np.arange(4)
    monkeypatch.setattr(
        type(harness._generator.codec), "decode_bytes", lambda self, ids: b"ab" * len(ids)
    )
    assert [harness._first_after("x" * n, tokens) for n in (0, 1, 2, 3, 4)] == [0, 0, 1, 1, 2]


def test_continuations_end_as_they_are_asked_to():
    harness, counted = Harness(generator_of_all(), max_tokens=9), []
    (whole,) = harness.continuations([("some context", {})])
    assert len(whole) == 9
    stop = whole[4]
    requests = [
        ("some context", {"until": [stop, ""]}),
        ("some context", {"until": "never", "max_gen_toks": 4, "do_sample": False}),
        ("another one", {"max_gen_toks": 5, "do_sample": True, "temperature": 1.0, "seed": 3}),
    ]
    first, second, third = harness.answers("generate_until", requests)
    assert first == whole[: whole.index(stop)] and second == whole[:4]
    assert third == harness.continuations(requests[2:], counted.append)[0] and counted == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "generate_until has the setting 'num_beams': expected some of until"),
        ({"top_p": 0.0}, r"SamplingConfig.top_p is 0.0: expected 0 < top_p <= 1"),
        ({"max_gen_toks": 0}, r"SamplingConfig.max_tokens is 0: expected a positive integer"),
    ],
)
def test_bad_settings_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        Harness(generator_of_all()).continuations([("a", {}), ("b", arguments)])
    with pytest.raises(UserError, match="retrieval is 9 neighbours: expected 0 to 2"):
        Harness(generator_of_all(), retrieval=9)


def test_the_model_of_lm_eval(monkeypatch):
    """With stand-ins for the two modules of lm-eval that are used; docs have a run of the real ones."""
    registered, opened = {}, []

    def register_model(name):
        return lambda cls: registered.setdefault(name, cls)

    model = types.SimpleNamespace(LM=type("LM", (), {}))
    registry = types.SimpleNamespace(register_model=register_model)
    for name, module in {
        "": None,
        ".api": None,
        ".api.model": model,
        ".api.registry": registry,
    }.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module or types.ModuleType("lm_eval"))

    def open_generator(workdir, **more):
        opened.append((workdir, more))
        return generator_of_all()

    name = "retro_jax.generate.lm_eval_model"
    importlib.import_module(name).model_class(open_generator)
    monkeypatch.delitem(sys.modules, name)
    lm = registered["retro"](workdir="W", revision=2, batch_size=1, device=None)
    assert opened == [("W", {"revision": 2})]
    requests = [types.SimpleNamespace(args=pair) for pair in _PAIRS]
    assert lm.loglikelihood(requests, disable_tqdm=True) == Harness(
        generator_of_all()
    ).log_likelihoods(_PAIRS)
    one = [types.SimpleNamespace(args=("a text",))]
    assert len(lm.loglikelihood_rolling(one, disable_tqdm=True)) == 1
    one = [types.SimpleNamespace(args=("a text", {"max_gen_toks": 2}))]
    assert len(lm.generate_until(one, disable_tqdm=True)[0]) == 2
