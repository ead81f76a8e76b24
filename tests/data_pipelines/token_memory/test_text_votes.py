"""The votes on a text: each token's own look-up, within its document."""

import numpy as np

from data_pipelines.token_memory.text_votes import votes_on
from tests.data_pipelines.token_memory.test_memory import BOS, EOS, build, write_documents


def test_each_token_is_looked_up_with_what_precedes_it_in_its_document(tmp_path):
    rng = np.random.default_rng(0)
    training = [rng.integers(3, 7, size).tolist() for size in (5, 100, 200)]
    held_out = [rng.integers(3, 7, size).tolist() for size in (90, 1, 63)]
    memory = build(tmp_path, training)
    text = write_documents(tmp_path / "text", held_out)
    ids = np.arange(len(text))
    chunks = text.chunks(ids)
    mask = (chunks != 0) & (chunks != BOS)
    seen: list[int] = []
    votes = votes_on(memory, text, ids, mask, longest=8, most_votes=0, on_chunks=seen.append)
    assert sum(seen) == len(text)
    row = 0
    for document in held_out:
        tokens = [BOS, *document, EOS]
        for place in range(1, len(tokens)):
            match = memory.match(np.array(tokens[:place]), longest=8, most_votes=0)
            assert votes.lengths[row] == match.length and votes.counts[row] == len(match.tokens)
            assert np.isclose(votes.shares[row], match.share(tokens[place]))
            best = max(match.share(token) for token in set(match.tokens.tolist()))
            assert np.isclose(votes.agreements[row], best)
            right = match.documents[match.tokens == tokens[place]]
            assert votes.documents[row] == (right[0] if len(right) else -1)
            row += 1
    assert row == len(votes.lengths) == mask.sum()


def test_some_tokens_of_some_documents(tmp_path):
    memory = build(tmp_path, [[3, 4, 5]])
    text = write_documents(tmp_path / "text", [[3, 4, 6], [3, 4, 5], [6, 6]])
    ids = np.array([1, 2])
    mask = np.zeros((2, 64), bool)
    mask[0, 3] = True
    votes = votes_on(memory, text, ids, mask)
    assert votes.shares.tolist() == [1.0] and votes.lengths.tolist() == [3]
    assert len(votes_on(memory, text, ids[:0], mask[:0]).lengths) == 0
