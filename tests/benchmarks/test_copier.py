"""The copier of benchmarks/copier.py against a plain search over every place."""

import numpy as np

from benchmarks.copier import copier_votes, cross_tuned, length_rows
from retro_jax.evaluate.token_mixture import Votes

_PAD = 0


def plain_votes(text, at, passages, own_from, most):
    """Length of the longest ending of text[:at], and the tokens that follow it in the passages."""
    best, followers = 0, []
    sources = [(passage, len(passage)) for passage in passages] + [(text[own_from:], at - own_from)]
    for source, end in sources:
        for place in range(1, end):
            size = 0
            while size < min(most, place, at) and source[place - 1 - size] == text[at - 1 - size]:
                size += 1
            if _PAD in (source[place], source[place - 1]) or not size:
                continue
            if size > best:
                best, followers = size, []
            if size == best:
                followers.append(source[place])
    return best, sorted(followers)


def test_votes_are_those_of_a_search_over_every_place():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4, (5, 64))
    tokens[1, 40:] = _PAD
    owners = np.array([0, 0, 1, 1, 1])
    passages = rng.integers(1, 4, (5, 2, 30))
    passages[:, 1, 25:] = _PAD
    mask = tokens != _PAD
    for most, before in ((2, 0), (5, 0), (3, 70)):
        votes = copier_votes(
            tokens, owners, mask, lambda row: passages[row], pad_id=_PAD, most=most, before=before
        )
        place = 0
        for row in range(5):
            text = tokens[owners == owners[row]]
            text = text[: row - int(np.argmax(owners == owners[row])) + 1].ravel()
            text = text[text != _PAD]
            start = len(text) - mask[row].sum()
            own = max(0, start - before) if before else len(text)
            for at in range(start, len(text)):
                length, followers = plain_votes(text, at, passages[row], own, most)
                assert (votes.lengths[place], votes.counts[place]) == (length, len(followers))
                share = np.mean(np.array(followers) == text[at]) if followers else 0
                assert votes.shares[place] == share
                place += 1
        assert place == len(votes)


def test_a_half_is_mixed_by_the_weights_of_the_other():
    rng = np.random.default_rng(1)
    tokens = np.tile(rng.integers(1, 9, 64), (40, 1))
    mask, half = tokens > 0, np.arange(40).repeat(64) % 2 == 0
    copied = copier_votes(
        tokens, np.arange(40), mask, lambda row: tokens[:1], pad_id=_PAD, most=8, before=0
    )
    nll = np.full(mask.sum(), 3.0)
    mixed = cross_tuned(nll, copied, half)
    assert mixed.mean() < 0.5
    np.testing.assert_array_equal(cross_tuned(nll, copied, ~half), mixed)


def test_every_token_is_in_one_class_of_lengths():
    lengths = np.array([0, 1, 1, 4, 5, 11, 32, 32])
    shares = np.array([0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 0.0])
    votes = Votes(lengths, np.ones(8, int), np.ones(8), shares)
    nats = np.arange(8.0)
    rows = length_rows(votes, {"on": nats})
    found = [(row["ending"], row["what follows"], row["count"], row["on"]) for row in rows]
    assert found == [
        ("0", "wrong", 1, 0.0),
        ("1", "right", 1, 1.0),
        ("1", "some", 1, 2.0),
        ("4 to 5", "right", 1, 4.0),
        ("4 to 5", "wrong", 1, 3.0),
        ("11 to 32", "right", 2, 5.5),
        ("11 to 32", "wrong", 1, 7.0),
    ]
