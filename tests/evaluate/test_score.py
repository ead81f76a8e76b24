"""Every token is scored once, with the context it should have."""

import dataclasses
import itertools
import math
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.batch import RetroBatch
from retro_jax.errors import UserError
from retro_jax.evaluate.score import (
    WindowConfig,
    compiled_token_losses,
    score_chunks,
    window_batch,
    windows,
)
from tests.evaluate.texts import BOS, EOS, PAD, chunked, documents_of
from tests.model.tiny import TINY, make_model

M = 4


@st.composite
def _cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    chunks = draw(st.integers(1, 12))
    return draw(st.integers(1, 100)), chunks, draw(st.integers(1, chunks))


@given(_cuts())
def test_windows_score_every_chunk_once_and_with_enough_context(
    cut: tuple[int, int, int],
):
    num_chunks, chunks, stride = cut
    plan = windows(num_chunks, chunks, stride)
    scored = [chunk for _, begin, end in plan for chunk in range(begin, end)]
    assert scored == list(range(num_chunks))
    for start, begin, end in plan:
        assert start <= begin < end <= start + chunks
        assert start == 0 or begin - start >= chunks - stride


def test_no_chunks_no_windows():
    assert windows(0, 4, 2).shape == (0, 3)


def _context_losses(batch: RetroBatch) -> np.ndarray:
    """A fake model: loss 100 * token + target + context / 16, context = chunks seen before."""
    chunks = batch.documents.shape[1]
    owner = np.repeat(batch.documents, batch.tokens.shape[1] // chunks, axis=1)
    seen = np.zeros(owner.shape)
    for row in range(len(owner)):
        for i in range(owner.shape[1]):
            first = int(np.argmax(owner[row] == owner[row, i]))
            seen[row, i] = i // M - first // M
    return np.where(batch.targets != PAD, 100 * batch.tokens + batch.targets + seen / 16, 0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    chunks=st.integers(1, 6),
    stride=st.integers(1, 6),
    batch_size=st.integers(1, 4),
)
def test_each_token_gets_its_own_loss_and_its_context(
    lengths: list[int], chunks: int, stride: int, batch_size: int
):
    stride = min(stride, chunks)
    documents = documents_of(lengths, vocab_size=50)
    text, table = chunked(documents, M)
    config = WindowConfig(chunks=chunks, stride=stride, batch_size=batch_size)
    seen: list[int] = []
    nll = score_chunks(_context_losses, text, config, on_windows=seen.append)
    assert nll.shape == table.shape
    assert sum(seen) == len(windows(len(table), chunks, stride))

    flat = iter(range(len(table)))
    for tokens in documents:
        rows = [next(flat) for _ in range(0, len(tokens), M)]
        losses = nll[rows].ravel()
        assert losses[0] == 0
        assert not losses[len(tokens) :].any()
        for i in range(1, len(tokens)):
            pair = 100 * tokens[i - 1] + tokens[i]
            context = round((losses[i] - pair) * 16)
            assert abs(losses[i] - pair) < 1
            before = (i - 1) // M
            assert min(before, chunks - stride) <= context <= before


def test_a_batch_reads_past_its_window_for_the_last_target_only_inside_the_document():
    text, table = chunked(documents_of([9, 3], vocab_size=50), M)
    assert text.documents.tolist() == [0, 0, 0, 1, 1]
    batch = window_batch(text, np.array([0, 1, 4]), chunks=2)
    assert batch.targets[0, -1] == table[2, 0]
    assert batch.targets[1, -1] == PAD  # the next chunk is of another document
    assert batch.tokens[1].tolist() == table[1:3].ravel().tolist()
    assert batch.documents.tolist() == [[0, 0], [0, 0], [1, -1]]
    assert not batch.tokens[2, M:].any()
    assert not batch.targets[2, M - 1 :].any()
    assert batch.tokens[0, 0] == BOS
    assert BOS not in batch.targets


def test_neighbours_go_with_the_chunk_they_were_retrieved_for():
    documents = documents_of([9, 3], vocab_size=50)
    neighbours = np.arange(5 * 2 * 8).reshape(5, 2, 8) + 100
    text, _ = chunked(documents, M, neighbours)
    batch = window_batch(text, np.array([1, 4]), chunks=2)
    assert batch.neighbours is not None
    assert batch.neighbours.shape == (2, 2, 2, 8)
    assert (batch.neighbours[0] == neighbours[1:3]).all()
    assert (batch.neighbours[1, 0] == neighbours[4]).all()
    assert not batch.neighbours[1, 1].any()
    off = window_batch(dataclasses.replace(text, neighbours=None), np.array([1]), chunks=2)
    assert off.neighbours is None


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("retrieval", [True, False])
def test_scores_equal_a_slow_sum_one_window_at_a_time(stride: int, retrieval: bool):
    model = make_model(TINY)
    forward = jax.jit(lambda tokens, near, owners: model(tokens, near, owners))
    documents = documents_of([9, 3, 0, 21], TINY.vocab_size)
    _, table = chunked(documents, M)
    neighbours = np.random.default_rng(1).integers(0, TINY.vocab_size, (len(table), 2, 2 * M))
    text, _ = chunked(documents, M, neighbours if retrieval else None)
    config = WindowConfig(chunks=3, stride=stride, batch_size=4)
    nll = score_chunks(compiled_token_losses(*nnx.split(model)), text, config)

    expected = np.zeros(table.shape)
    flat = expected.ravel()
    begin = start = 0
    while begin < len(table):
        here = [i for i in range(start, start + 3) if i < len(table)]
        tokens, near = np.zeros((3, M), np.int32), np.zeros((3, 2, 2 * M), np.int32)
        owners = np.full(3, -1, np.int32)
        for row, i in enumerate(here):
            tokens[row], near[row], owners[row] = table[i], neighbours[i], text.documents[i]
        logits = forward(tokens.reshape(1, -1), near[None] if retrieval else None, owners[None])
        scores = np.asarray(logits, np.float64)[0]
        for p in range((begin - start) * M, len(here) * M):
            target = start * M + p + 1
            same = (
                target < table.size and text.documents[target // M] == text.documents[here[p // M]]
            )
            if same and table.ravel()[target] != PAD:
                flat[target] = np.log(np.exp(scores[p]).sum()) - scores[p, table.ravel()[target]]
        begin, start = here[-1] + 1, start + stride
    assert (expected > 0).sum() == sum(len(tokens) - 1 for tokens in documents)
    assert np.abs(nll - expected).max() < 1e-5 * expected.max()


@pytest.mark.parametrize("wrong", [{"chunks": 0}, {"stride": 0}, {"stride": 33}, {"batch_size": 0}])
def test_bad_window_settings_are_refused(wrong: dict[str, int]):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"WindowConfig\.{name} is"):
        WindowConfig(**wrong)


@pytest.mark.parametrize("overlap", [0, 0.5, 0.75, 0.875])
def test_bits_per_byte_equal_a_slow_scorer_on_real_text_for_every_overlap(overlap: float):
    """Bytes of this file as tokens, one window at a time in NumPy float64, against batches of them."""
    model = make_model(dataclasses.replace(TINY, vocab_size=260))
    data = pathlib.Path(__file__).read_bytes()[:1200]
    lengths = [0, 700, 701, 960, 1200]
    parts = [data[a:b] for a, b in itertools.pairwise(lengths)]
    documents = [[BOS, *(byte + 4 for byte in part), EOS] for part in parts]
    text, table = chunked(documents, M)
    chunks = 8
    stride = round(chunks * (1 - overlap))
    config = WindowConfig(chunks=chunks, stride=stride, batch_size=16)
    nll = score_chunks(compiled_token_losses(*nnx.split(model)), text, config)

    forward = jax.jit(lambda tokens, owners: model(tokens, None, owners))
    expected, counted = np.zeros(table.size), np.zeros(table.size, int)
    for start, begin, end in windows(len(table), chunks, stride).tolist():
        tokens, owners = np.zeros((chunks, M), np.int32), np.full(chunks, -1, np.int32)
        tokens[: end - start], owners[: end - start] = table[start:end], text.documents[start:end]
        logits = np.asarray(forward(tokens.reshape(1, -1), owners[None])[0], np.float64)
        for place in range(begin * M, end * M):
            target = place + 1
            if target == table.size or text.documents[target // M] != text.documents[place // M]:
                continue
            if table.ravel()[target] != PAD:
                row = logits[place - start * M]
                expected[target] = np.logaddexp.reduce(row) - row[table.ravel()[target]]
                counted[target] += 1
    assert counted.sum() == len(data) + len(documents)  # each byte and each document's end
    assert counted.max() == 1
    bits = [scores.sum(dtype=np.float64) / math.log(2) / len(data) for scores in (nll, expected)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)
    assert np.abs(nll.ravel() - expected).max() < 1e-5 * expected.max()
