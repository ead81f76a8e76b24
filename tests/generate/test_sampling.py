"""Draws: every filter against plain NumPy, distributions, seeds, and settings that are refused."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from retro_jax.errors import UserError
from retro_jax.generate.sampling import (
    SamplingConfig,
    draw,
    keep_likeliest,
    keep_near_best,
    make_sampler,
    needs,
    penalised,
)

V = 50


def _scores(rows: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (rows, V)).astype(np.float32)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _likeliest(scores: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The tokens that top-k, then top-p keep of one row, by a loop."""
    order = [int(token) for token in np.argsort(-scores)]
    order = order[: top_k or len(order)]
    probabilities = _softmax(scores[order].astype(np.float64))
    kept, total = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if top_p < 1 and total >= top_p:
            break
        kept.add(token)
        total += probability
    return kept


def _kept(filtered: Any) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(filtered)]


@pytest.mark.parametrize("top_k", [0, 1, 7, V, V + 9])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_top_k_and_top_p(top_k: int, top_p: float):
    scores = _scores()
    filtered = keep_likeliest(jnp.asarray(scores), jnp.full((8, 1), top_k), jnp.full((8, 1), top_p))
    assert _kept(filtered) == [_likeliest(row, top_k, top_p) for row in scores]


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(min_p: float):
    scores = _scores()
    filtered = keep_near_best(jnp.asarray(scores), jnp.full((8, 1), min_p))
    shares = [_softmax(row) / _softmax(row).max() for row in scores]
    assert _kept(filtered) == [set(np.flatnonzero(row >= min_p).tolist()) for row in shares]


def test_repetition_penalty():
    logits = np.array([2.0, -2.0, 0.0], np.float32)
    np.testing.assert_allclose(penalised(logits, jnp.asarray(1.5)), [2 / 1.5, -3.0, 0.0], rtol=1e-6)
    settings = [
        SamplingConfig(temperature=0, repetition_penalty=4.0),
        SamplingConfig(temperature=0),
    ]
    rows = np.tile(np.array([3.0, 2.0, 1.0], np.float32), (2, 1))
    seen = np.tile([True, False, False], (2, 1))
    tokens, scores = _draw(rows, settings, seen=seen)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(scores, np.log(_softmax(rows[0]))[[1, 0]], rtol=1e-5)


def _draw(
    logits: np.ndarray,
    settings: list[SamplingConfig],
    *,
    step: int = 0,
    barred: int = -1,
    allowed: np.ndarray | None = None,
    **more: Any,
) -> tuple[np.ndarray, np.ndarray]:
    rows, width = logits.shape
    allowed = np.ones(width, bool) if allowed is None else allowed
    tokens, scores = draw(
        jnp.asarray(logits),
        make_sampler(settings, range(rows), allowed),
        steps=np.full(rows, step, np.int32),
        barred=np.full(rows, barred, np.int32),
        needs=needs(settings),
        **more,
    )
    return np.asarray(tokens), np.asarray(scores)


@pytest.mark.parametrize(
    ("setting", "weights"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        ({"top_k": 2}, [0.4, 0.3, 0, 0, 0]),
        ({"top_p": 0.75}, [0.4, 0.3, 0.15, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.4, 0.3, 0, 0, 0]),  # of 0.85 that are left
        ({"min_p": 0.3}, [0.4, 0.3, 0.15, 0, 0]),
        ({"allowed_tokens": (1, 3)}, [0, 0.3, 0, 0.1, 0]),
        ({"forbidden_tokens": (0,)}, [0, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
    ],
)
def test_distributions(setting: dict[str, Any], weights: list[float]):
    """Chi-square over 10,000 samples of one prompt."""
    rows = 10_000
    logits = np.tile(np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)), (rows, 1))
    tokens, _ = _draw(logits, [SamplingConfig(seed=1, **setting)] * rows)
    counts, expected = np.bincount(tokens, minlength=5), np.array(weights) / sum(weights)
    assert not counts[expected == 0].any()
    drawn = expected > 0
    if drawn.sum() > 1:
        assert stats.chisquare(counts[drawn], rows * expected[drawn]).pvalue > 1e-3


def test_a_row_depends_on_its_seed_number_and_step_only():
    logits = _scores(1)
    settings = [SamplingConfig(seed=seed) for seed in (1, 2, 3)]
    tokens = [_draw(np.tile(logits, (3, 1)), settings, step=step)[0].tolist() for step in range(20)]
    for step, drawn in enumerate(tokens):
        one = make_sampler(settings[1:2], [1], np.ones(V, bool))
        steps, barred = np.full(1, step, np.int32), np.full(1, -1, np.int32)
        alone, _ = draw(logits, one, steps=steps, barred=barred, needs=needs(settings))
        assert int(alone[0]) == drawn[1]
    assert len({tuple(column) for column in np.array(tokens).T}) == 3


def test_barred_tokens_are_not_drawn_now():
    logits = np.array([[5.0, 1.0, 0.0]], np.float32)
    greedy = [SamplingConfig(temperature=0)]
    assert _draw(logits, greedy)[0] == [0]
    assert _draw(logits, greedy, barred=0)[0] == [1]
    assert _draw(logits, greedy, allowed=np.array([False, False, True]))[0] == [2]


def test_only_needed_parts_are_computed():
    greedy, plain = SamplingConfig(temperature=0, top_k=3), SamplingConfig()
    assert needs([greedy]) == (False, False, False)
    assert needs([greedy, plain]) == (True, False, False)
    assert needs([plain, SamplingConfig(top_p=0.5)]) == (True, True, False)
    assert needs([SamplingConfig(temperature=0, repetition_penalty=1.1)]) == (False, False, True)


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
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"allowed_tokens": (-1,)},
        {"forbidden_tokens": (3, -4)},
        {"stop": ("",)},
        {"stop": "text"},
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"SamplingConfig\.{name} is"):
        SamplingConfig(**wrong)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"allowed_tokens": (V,)}, f"allowed_tokens has {V}: expected ids less than {V}"),
        ({"forbidden_tokens": (V + 3,)}, f"forbidden_tokens has {V + 3}"),
        ({"allowed_tokens": (1,), "forbidden_tokens": (1,)}, "leaves none: expected one or more"),
    ],
)
def test_tokens_past_the_vocabulary_and_no_token_are_refused(setting: dict, message: str):
    with pytest.raises(UserError, match=message):
        make_sampler([dataclasses.replace(SamplingConfig(), **setting)], [0], np.ones(V, bool))
