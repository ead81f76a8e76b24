"""MinHash: candidates are what is similar, and bands do what their arithmetic says."""

import numpy as np
import pytest

from data_pipelines.leakage import minhash
from tests.data_pipelines import planted


def sets(rng, similarity, count):
    """Pairs of sets of 200 hashes with a Jaccard similarity."""
    common = round(400 * similarity / (1 + similarity))
    every = rng.integers(0, 1 << 63, (count, 400 - common), np.uint64)
    return every[:, :200], np.concatenate([every[:, :common], every[:, 200:]], axis=1)


def test_grams_and_jaccard_are_those_of_the_definition():
    for one, other in (("a", "a"), ("a", "b"), ("a b", "b a"), ("", ""), ("", "a"), ("a", "a b")):
        got = minhash.jaccard(minhash.grams(one.split()), minhash.grams(other.split()))
        assert got == float(planted.similarity(one, other))
    for changed in (1, 9, 10, 11, 40, 102):
        pair = planted.text("w"), planted.text("w", changed=changed)
        got = minhash.jaccard(*(minhash.grams(text.split()) for text in pair))
        assert got == float(planted.similarity(*pair)) == max(0, (90 - changed) / (90 + changed))


@pytest.mark.parametrize("text", ["", "a", "a b c", planted.text("x"), "a " * 40])
def test_hashes_are_one_for_each_gram_in_order(text):
    words = text.split()
    hashes = minhash.gram_hashes(minhash.word_numbers(words))
    assert len(hashes) == (max(1, len(words) - 12) if words else 0)
    assert len(set(hashes.tolist())) == len(minhash.grams(words))
    for place in range(len(hashes)):
        alone = minhash.gram_hashes(minhash.word_numbers(words[place : place + 13]))
        assert alone.tolist() == [hashes[place]]


def test_hashes_of_rows_are_those_of_each():
    tokens = np.random.default_rng(0).integers(0, 9, (3, 20))
    together = minhash.gram_hashes(minhash.token_numbers(tokens))
    assert together.shape == (3, 8)
    for row, hashes in zip(tokens, together):
        np.testing.assert_array_equal(minhash.gram_hashes(minhash.token_numbers(row)), hashes)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_bands_are_the_longest_that_miss_little(threshold):
    bands, rows = minhash.plan_bands(threshold, 256)
    assert bands * rows <= 256
    assert (1 - threshold**rows) ** bands <= minhash.MISSED
    longer = rows + 1
    assert longer > 256 or (1 - threshold**longer) ** (256 // longer) > minhash.MISSED


def test_too_few_permutations_have_no_plan():
    assert minhash.plan_bands(0.1, 128) is None


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.8])
def test_candidates_come_as_often_as_the_arithmetic_says(similarity):
    sketch = minhash.Sketch(16, 4)
    one, other = sets(np.random.default_rng(1), similarity, 400)
    table = minhash.BandTable.of(sketch(list(one)))
    pairs = table.candidates(sketch(list(other)))
    share = np.mean(np.isin(np.arange(400), pairs[pairs[:, 0] == pairs[:, 1], 0]))
    common = round(400 * similarity / (1 + similarity))
    exact = common / (400 - common)
    expected = 1 - (1 - exact**4) ** 16
    assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 400) + 0.02)
    assert len(pairs) == (pairs[:, 0] == pairs[:, 1]).sum(), "sets of nothing in common"


def test_sketches_depend_on_the_set_alone():
    sketch = minhash.Sketch.of(0.8, 128)
    hashes = np.random.default_rng(2).integers(0, 1 << 63, 50, np.uint64)
    again = np.concatenate([hashes[::-1], hashes[:7]])
    together = sketch([hashes, hashes + np.uint64(1), again])
    np.testing.assert_array_equal(together[0], together[2])
    np.testing.assert_array_equal(together[:1], sketch([hashes]))
    assert (together[0] != together[1]).all()
    assert sketch([]).shape == (0, sketch.bands)


def test_a_table_gives_every_set_with_an_equal_band_once():
    rng = np.random.default_rng(3)
    held, asked = rng.integers(0, 6, (40, 5), np.uint64), rng.integers(0, 6, (30, 5), np.uint64)
    expected = [[q, h] for q in range(30) for h in range(40) if (asked[q] == held[h]).any()]
    assert minhash.BandTable.of(held).candidates(asked).tolist() == expected
    empty = minhash.BandTable.of(np.zeros((0, 5), np.uint64))
    assert empty.candidates(asked).tolist() == []


def test_a_missing_package_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(minhash.UserError, match="threshold needs the package rensa: expected it"):
        minhash.import_rensa()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plain words\tand\nlines", ["plain", "words", "and", "lines"]),
        ("naïve Ελληνικά\u2003русский", ["naïve", "Ελληνικά", "русский"]),
        ("港の朝と夜 abc", [*"港の朝と夜", "abc"]),
        ("港の朝は静か abc港", [*"港の朝は静か", "abc", "港"]),
        ("the harbour is 港", ["the", "harbour", "is", "港"]),
        ("the harbour 港の朝", ["the", "harbour", "港の朝"]),
        ("ท่าเรือ", list("ท่าเรือ")),
        ("한국어 문장", ["한국어", "문장"]),
        ("\U00020000\U00020001", ["\U00020000", "\U00020001"]),
        (" \n", []),
    ],
)
def test_words_of_any_script(text, words):
    assert minhash.words_of(text) == words


def test_near_copies_without_spaces_share_most_grams():
    """A text of 400 characters with one changed in a hundred; split at spaces it would share none."""
    rng = np.random.default_rng(0)
    text = [chr(0x4E00 + n) for n in rng.integers(0, 3000, 400)]
    other = list(text)
    for place in range(50, 400, 100):
        other[place] = "。" if other[place] != "。" else "一"
    one, two = (minhash.grams(minhash.words_of("".join(each))) for each in (text, other))
    assert minhash.jaccard(one, two) > 0.7
