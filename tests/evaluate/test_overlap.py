"""Overlap with the training data is measured exactly, and filtered exactly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.batch import RetroBatch, text_mask
from retro_jax.evaluate.bits_per_byte import measure
from retro_jax.evaluate.bootstrap import intervals, paired_test, resampled_sums
from retro_jax.evaluate.overlap import (
    THRESHOLDS,
    ScoredChunks,
    longest_shared_runs,
    overlap_curve,
    overlap_sums,
    shared_ngrams,
)
from retro_jax.evaluate.score import WindowConfig, score_chunks
from tests.evaluate.texts import BOS, EOS, PAD, Document, chunked, documents_of

IGNORED = (PAD, BOS, EOS)


def _obvious(chunk: list[int], neighbours: list[list[int]]) -> int:
    """The longest run, by looking for every run."""
    runs = [chunk[i:j] for i in range(len(chunk)) for j in range(i + 1, len(chunk) + 1)]
    found = [
        len(run)
        for run in runs
        for near in neighbours
        for start in range(len(near))
        if near[start : start + len(run)] == run and not set(run) & set(IGNORED)
    ]
    return max(found, default=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(2, 6))
def test_the_longest_shared_run_is_the_obvious_one(seed: int, k: int, tokens: int):
    generator = np.random.default_rng(seed)
    chunks = generator.integers(0, tokens, (5, 6))
    neighbours = generator.integers(0, tokens, (5, k, 12))
    expected = [_obvious(c, n) for c, n in zip(chunks.tolist(), neighbours.tolist(), strict=True)]
    assert longest_shared_runs(chunks, neighbours, IGNORED).tolist() == expected


def test_many_chunks_and_a_run_over_the_whole_chunk():
    chunks = np.random.default_rng(0).integers(3, 60_000, (700, 64)).astype(np.uint16)
    neighbours = np.random.default_rng(1).integers(3, 60_000, (700, 2, 128))
    neighbours[600, 1, 64:] = chunks[600]
    neighbours[601, 0, 5:37] = chunks[601, 20:52]
    runs = longest_shared_runs(chunks, neighbours, IGNORED)
    assert (runs[600], runs[601]) == (64, 32)
    assert np.delete(runs, [600, 601]).max() < 4


def test_the_share_of_ngrams_is_the_obvious_one():
    generator = np.random.default_rng(0)
    texts = generator.integers(0, 5, (300, 12))
    neighbours = generator.integers(0, 5, (300, 2, 16))
    texts[299] = PAD
    shares = shared_ngrams(texts, neighbours, IGNORED, size=3)
    assert 0 < np.count_nonzero(shares) < shares.size
    for text, near, found in zip(texts.tolist(), neighbours.tolist(), shares, strict=True):
        grams = [tuple(text[i : i + 3]) for i in range(10) if not set(text[i : i + 3]) & {0, 1, 2}]
        for value, share in zip(near, found, strict=True):
            held = {tuple(value[i : i + 3]) for i in range(14)}
            assert share == sum(gram in held for gram in grams) / max(1, len(grams))


def _copying_losses(batch: RetroBatch) -> np.ndarray:
    """A model that is sure of a token that its chunk's neighbours hold after this one, else uniform.

    As in RETRO, a position reads the neighbours of the chunk whose last token is before or at it.
    """
    assert batch.neighbours is not None
    rows, chunks, _, _ = batch.neighbours.shape
    m = batch.tokens.shape[1] // chunks
    losses = np.where(batch.targets != PAD, math.log(50), 0.0)
    for row in range(rows):
        for i in range(m - 1, batch.tokens.shape[1]):
            here, read = i // m, (i + 1) // m - 1
            pair = [batch.tokens[row, i], batch.targets[row, i]]
            near = batch.neighbours[row, read]
            held = any((n[j : j + 2] == pair).all() for n in near for j in range(len(n) - 1))
            if held and batch.documents[row, here] == batch.documents[row, read]:
                losses[row, i] = 0.001
    return losses


def test_a_copying_model_is_near_zero_on_planted_copies_and_the_filter_removes_exactly_these():
    m, planted = 8, [2, 7]
    documents = documents_of([38, 54], vocab_size=50)
    text, table = chunked(documents, m)
    generator = np.random.default_rng(3)
    neighbours = generator.integers(51, 99, (len(table), 2, 2 * m))  # of a vocabulary of their own
    for chunk in planted:
        neighbours[chunk - 1, 1] = table[chunk - 1 : chunk + 1].ravel()  # to be copied
        neighbours[chunk, 0, :m] = table[chunk]  # what the filter looks at
    neighbours[[chunk - 1 for chunk in planted], 1, :m] = 99
    text, _ = chunked(documents, m, neighbours)
    nll = score_chunks(_copying_losses, text, WindowConfig(chunks=4, stride=1, batch_size=2))
    mask = text_mask(table, text.documents, eos_id=EOS, pad_id=PAD)
    bits = np.where(mask, nll, 0).sum(axis=1) / math.log(2)
    runs = longest_shared_runs(table, neighbours, IGNORED)
    assert np.flatnonzero(runs > m // 2).tolist() == planted
    # Within a planted chunk each token is copied but the first, which nothing before it announces.
    uniform = math.log2(50)
    assert bits[planted] == pytest.approx(uniform + (m - 1) * 0.001 / math.log(2), rel=1e-5)
    rest = np.delete(np.arange(len(table)), planted)
    assert bits[rest] == pytest.approx(mask[rest].sum(axis=1) * uniform, rel=1e-6)

    scored = ScoredChunks(
        {"on": bits}, mask.sum(axis=1), text.documents, np.array(["x"] * len(table)), runs, m
    )
    half, everything = overlap_curve(overlap_sums(scored, 2, (0.5, 1.0)), [], samples=10)[:2]
    assert (half.chunks, everything.chunks) == (len(rest), len(table))
    assert half.bits_per_byte["on"].value == pytest.approx(uniform, rel=1e-6)
    assert everything.bits_per_byte["on"].value < uniform


def _scored(seed: int = 0) -> tuple[ScoredChunks, np.ndarray, np.ndarray]:
    """Chunks of three documents in two corpora under two conditions, a byte a token."""
    documents = documents_of([30, 0, 41, 9], vocab_size=50)
    text, table = chunked(documents, 8)
    generator = np.random.default_rng(seed)
    nll = generator.uniform(0, 5, table.shape).astype(np.float32)
    mask = text_mask(table, text.documents, eos_id=EOS, pad_id=PAD)
    bits = np.where(mask, nll, 0).sum(axis=1, dtype=np.float64) / math.log(2)
    corpora = np.array(["a", "a", "b", "b"])[text.documents]
    runs = generator.integers(0, 9, len(table))
    both = {"on": bits, "off": bits + 0.25 * mask.sum(axis=1)}
    scored = ScoredChunks(both, mask.sum(axis=1), text.documents, corpora, runs, 8)
    return scored, nll, table


def test_without_a_filter_the_curve_is_the_plain_figure():
    scored, nll, table = _scored()
    points = overlap_curve(overlap_sums(scored, 2), [("on", "off")], samples=200)
    assert [(p.corpus, p.at_most) for p in points] == [(c, a) for c in "ab" for a in THRESHOLDS] + [
        ("", a) for a in THRESHOLDS
    ]
    records = {i: Document("ab"[i // 2], size, 0, 0) for i, size in enumerate((30, 0, 41, 9))}
    expected = measure(nll, table, scored.documents, records=records, eos_id=EOS, pad_id=PAD)
    for point in points:
        if point.at_most == 1.0 and point.corpus:
            wanted = expected[point.corpus]
            assert point.bytes == wanted.bytes
            assert point.bits_per_byte["on"].value == pytest.approx(wanted.bits_per_byte)
    assert points[-1].bytes == 80
    assert points[-1].documents == 3  # the empty one has no text


def test_each_threshold_keeps_what_is_at_most_it():
    scored, _, _ = _scored()
    points = overlap_curve(overlap_sums(scored, 2), [("on", "off")], samples=200)
    assert sum(point.chunks > 0 for point in points) > 18
    for point in points:
        kept = (scored.runs <= 8 * point.at_most) & (scored.bytes > 0)
        kept &= (scored.corpora == point.corpus) | (point.corpus == "")
        assert point.chunks == kept.sum()
        if not point.chunks:
            continue
        for name, figure in point.bits_per_byte.items():
            wanted = scored.bits[name][kept].sum() / scored.bytes[kept].sum()
            assert figure.value == pytest.approx(wanted)
            assert figure.low <= wanted <= figure.high
        # The second condition costs a quarter of a bit a byte everywhere: no doubt about it.
        difference = point.differences["on", "off"]
        assert [difference.value, difference.low, difference.high] == pytest.approx([-0.25] * 3)


def test_nothing_under_a_threshold_is_no_figure():
    scored, _, _ = _scored()
    point = overlap_curve(overlap_sums(scored, 2, (-1.0,)), [("on", "off")], samples=20)[-1]
    assert (point.chunks, point.bytes) == (0, 0)
    assert math.isnan(point.bits_per_byte["on"].value)
    assert math.isnan(point.differences["on", "off"].low)


def test_the_bootstrap_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(0).normal(5, 2, (400, 1))
    sums = resampled_sums(np.concatenate([values, np.ones((400, 1))], axis=1), samples=4000, seed=1)
    assert (sums[:, 1] == 400).all()  # as many documents as there are
    (found,) = intervals(values.mean(axis=0), sums[:, :1] / sums[:, 1:])
    error = values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    again = resampled_sums(np.ones((400, 1)), samples=4000, seed=1)
    assert (again == sums[:, 1:]).all()
    assert resampled_sums(np.zeros((0, 2)), samples=3, seed=0).tolist() == [[0.0, 0.0]] * 3


def test_the_paired_test_counts_signs():
    # Of 2^5 signs of equal differences, two are as extreme as all alike: p = 1/16.
    assert paired_test(np.ones(5), samples=20_000, seed=0) == pytest.approx(1 / 16, abs=0.006)
    assert paired_test(np.array([1.0, -1.0]), samples=100, seed=0) == 1.0
    assert paired_test(np.full(40, 0.1), samples=1000, seed=0) == 1 / 1001
    noise = np.random.default_rng(0).normal(size=(200, 30))
    values = [paired_test(row, samples=500, seed=0) for row in noise]
    assert 0.01 < np.mean(np.array(values) < 0.05) < 0.11  # as often as it says
