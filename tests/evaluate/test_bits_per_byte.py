"""Figures follow from the right tokens and the right denominators."""

import math

import numpy as np
import pytest

from retro_jax.evaluate.bits_per_byte import measure, total
from tests.evaluate.texts import EOS, PAD, Document, chunked, documents_of

M, V = 4, 50
RECORDS = {
    0: Document("code", bytes=40, words=7, lines=3),
    1: Document("wiki", bytes=11, words=2, lines=0),
    2: Document("wiki", bytes=5, words=1, lines=1),
}


def _measure(nll: np.ndarray, table: np.ndarray, owners: np.ndarray):
    return measure(nll, table, owners, records=RECORDS, eos_id=EOS, pad_id=PAD)


def _uniform() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three documents under a model that finds every token equally likely."""
    text, table = chunked(documents_of([9, 3, 0], V), M)
    nll = np.full(table.shape, math.log(V), np.float32)
    nll[table == PAD] = 0
    nll[np.flatnonzero(np.diff(text.documents, prepend=-1)), 0] = 0
    return nll, table, text.documents


def test_a_uniform_model_scores_log2_of_the_vocabulary():
    scores = _measure(*_uniform())
    for score in [*scores.values(), total(scores.values())]:
        assert score.bits_per_token == pytest.approx(math.log2(V), rel=1e-7)
        assert score.bits_per_eos == pytest.approx(math.log2(V), rel=1e-7)


def test_denominators_are_the_documents_own_and_the_end_stands_apart():
    scores = _measure(*_uniform())
    assert list(scores) == ["code", "wiki"]
    code, wiki, both = scores["code"], scores["wiki"], total(scores.values())
    assert (code.documents, code.chunks, code.tokens, code.eos_tokens) == (1, 3, 9, 1)
    assert (wiki.documents, wiki.chunks, wiki.tokens, wiki.eos_tokens) == (2, 3, 3, 2)
    assert (both.bytes, both.words, both.lines, both.tokens) == (56, 10, 4, 12)
    nat = float(np.float32(math.log(V)))
    assert code.nats == pytest.approx(9 * nat)
    assert code.eos_nats == pytest.approx(nat)
    assert code.bits_per_byte == pytest.approx(9 * nat / math.log(2) / 40)
    assert code.word_perplexity == pytest.approx(math.exp(9 * nat / 10))
    assert both.bits_per_byte == pytest.approx(12 * nat / math.log(2) / 56)


def test_a_loss_at_the_end_of_a_document_changes_no_figure_of_the_text():
    nll, table, owners = _uniform()
    before = _measure(nll, table, owners)["code"]
    nll[table == EOS] += 100
    after = _measure(nll, table, owners)["code"]
    assert after.bits_per_byte == before.bits_per_byte
    assert after.bits_per_eos > 100


def test_sums_are_float64():
    table = np.full((200_000, M), 7, np.int32)
    nll = np.full(table.shape, 0.1, np.float32)
    records = {0: Document("code", bytes=1, words=1, lines=0)}
    score = measure(nll, table, np.zeros(len(table), int), records=records, eos_id=EOS, pad_id=PAD)[
        "code"
    ]
    assert score.tokens == table.size - 1
    assert score.nats == pytest.approx(score.tokens * float(np.float32(0.1)), rel=1e-9)


def test_figures_without_a_denominator_are_not_numbers():
    text, table = chunked([[1, EOS]], M)
    records = {0: Document("code", bytes=0, words=0, lines=0)}
    score = measure(
        np.zeros(table.shape),
        table,
        text.documents,
        records=records,
        eos_id=EOS,
        pad_id=PAD,
    )["code"]
    assert math.isnan(score.bits_per_byte)
    assert math.isnan(score.bits_per_token)
    assert score.to_dict()["eos_tokens"] == 1
