"""Sums by document: what chunks add up to, the same after a file, and refused when it is damaged."""

import dataclasses
import pathlib

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.evaluate.overlap import ScoredChunks, overlap_curve, overlap_sums
from retro_jax.evaluate.revisions import revision_figures
from retro_jax.evaluate.scored_text import (
    ScoredText,
    documents_file,
    read_scored_text,
    sum_documents,
    token_gains,
    write_scored_text,
)
from retro_jax.evaluate.uncertainty import compare, compared_pairs, with_intervals
from tests.evaluate.texts import Document

OWNERS = np.array([3, 3, 3, 5, 8, 8])
RECORDS = {3: Document("a", 10, 3, 1), 5: Document("b", 4, 1, 0), 8: Document("a", 20, 7, 2)}
TOKENS = np.array([4, 4, 1, 2, 4, 3])
RESULTS = {
    name: {
        "condition": name,
        "nll": f"test-{name}.npy",
        "model": {"run": name},
        "settings": {"max_documents": None},
        "manifests": {"chunks": "c"},
        "corpora": {"a": {}, "b": {}},
        "all": {},
    }
    for name in ("on", "k_2", "off")
}


def scored_text(seed: int = 0, neighbours: bool = True) -> tuple[ScoredText, dict[str, np.ndarray]]:
    """Six chunks of three documents, scored at random."""
    generator = np.random.default_rng(seed)
    nats = {name: generator.uniform(1, 9, 6) for name in ("off", "on", "k_2")}
    conditions = {n: {"nll": r["nll"], "sha256": "0"} for n, r in RESULTS.items()}
    source = {"split": "test", "max_documents": None, "chunks": "c", "conditions": conditions}
    overlap = None
    if neighbours:
        corpora = np.array([RECORDS[number].corpus for number in OWNERS.tolist()])
        runs = np.array([0, 8, 3, 4, 5, 0])
        sizes = 2 * TOKENS
        bits = {name: values / np.log(2) for name, values in nats.items()}
        overlap = overlap_sums(ScoredChunks(bits, sizes, OWNERS, corpora, runs, 8), 10)
    source["neighbours"] = "n" if neighbours else None
    more = {"tokens": TOKENS, "records": RECORDS, "source": source, "overlap": overlap}
    return sum_documents(nats, OWNERS, **more), nats


def test_without_words_there_is_no_perplexity():
    scored = dataclasses.replace(scored_text()[0], words=np.zeros(3, np.int64))
    figures = with_intervals(RESULTS, scored)["on"]["all"]["intervals"]
    assert set(figures["word_perplexity"].values()) == {None}
    assert figures["bits_per_byte"]["low"] > 0


def test_revisions_of_other_texts_are_refused():
    one = scored_text()[0]
    assert [row["revision"] for row in revision_figures({0: one, 1: one})] == [0, 1]
    other = dataclasses.replace(one, source={**one.source, "chunks": "d"})
    with pytest.raises(UserError, match="are of other texts: expected one split"):
        revision_figures({0: one, 1: other})


def test_sums_are_those_of_each_document():
    scored, nats = scored_text()
    assert scored.corpora.tolist() == ["a", "b", "a"]
    assert [scored.bytes.tolist(), scored.words.tolist()] == [[10, 4, 20], [4, 1, 9]]
    assert scored.tokens.tolist() == [9, 2, 7]
    assert scored.conditions == ["off", "on", "k_2"]
    for name, values in nats.items():
        wanted = [values[:3].sum(), values[3], values[4:].sum()]
        assert scored.nats[name] == pytest.approx(wanted)
    half = list(scored.overlap.thresholds).index(0.5)
    assert scored.overlap.chunks[:, half].tolist() == [2, 1, 1]
    assert scored.overlap.bytes[:, half].tolist() == [10, 4, 6]
    wanted = np.array([nats["on"][[0, 2]].sum(), nats["on"][3], nats["on"][5]]) / np.log(2)
    assert scored.overlap.bits["on"][:, half] == pytest.approx(wanted)


@pytest.mark.parametrize("neighbours", [True, False])
def test_a_file_gives_the_same_figures_and_equal_sums_equal_bytes(neighbours, tmp_path):
    scored, _ = scored_text(neighbours=neighbours)
    path = documents_file(tmp_path, "test")
    write_scored_text(path, scored)
    found = read_scored_text(path)
    write_scored_text(tmp_path / "again.npz", found)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    assert found.conditions == scored.conditions
    assert with_intervals(RESULTS, found) == with_intervals(RESULTS, scored)
    if neighbours:
        curves = [overlap_curve(each.overlap, [("on", "off")]) for each in (found, scored)]
        assert str(curves[0]) == str(curves[1])  # NaN is not itself
    else:
        assert found.overlap is None
    assert found.has(RESULTS["on"]) and found.is_of(scored.source)
    assert not found.has(RESULTS["on"] | {"nll": "other.npy"})
    assert not found.has(RESULTS["on"] | {"condition": "baseline"})
    assert not found.is_of({**scored.source, "neighbours": "m"})


def test_a_damaged_file_is_one_line(tmp_path: pathlib.Path):
    path = documents_file(tmp_path, "test")
    write_scored_text(path, scored_text()[0])
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], b"x" * 100, b""):
        path.write_bytes(part)
        with pytest.raises(UserError, match="is damaged: move it away"):
            read_scored_text(path)


def test_two_results_are_compared_by_their_sums_alone():
    first, other = scored_text(0)[0], scored_text(1)[0]
    found = compare([(RESULTS["on"], first), (RESULTS["off"], other)])
    values = [first.nats["on"].sum(), other.nats["off"].sum()]
    assert found["bits_per_byte"] == pytest.approx(np.array(values) / np.log(2) / 34)
    assert (found["documents"], found["bytes"]) == (3, 34)
    assert found["conditions"] == ["on", "off"]
    assert found["better_documents"] == (first.nats["on"] < other.nats["off"]).sum()
    fewer = RESULTS["off"] | {"settings": {"max_documents": 2}}
    with pytest.raises(UserError, match="are of other texts: expected one split, data and number"):
        compare([(RESULTS["on"], first), (fewer, other)])
    sample = RESULTS["off"] | {"settings": {"max_documents": None, "sample_chunks": 4}}
    with pytest.raises(UserError, match="are of other texts"):
        compare([(RESULTS["on"], first), (sample, other)])
    short = dataclasses.replace(other, bytes=other.bytes[:2])
    with pytest.raises(UserError, match="are of other texts"):
        compare([(RESULTS["on"], first), (RESULTS["off"], short)])


def test_gains_are_bits_of_the_tokens_that_count():
    on, off = np.array([[1.0, 2.0], [0.5, 3.0]]), np.array([[2.0, 1.0], [1.0, 9.0]])
    counted = np.array([[True, True], [True, False]])
    found = token_gains(on, off, counted)
    assert found.gains * np.log(2) == pytest.approx(np.array([[1.0, -1.0], [0.5, 0.0]]))
    assert found.bits * np.log(2) == pytest.approx(np.array([3.0, 1.0]))


def test_neighbours_read_are_compared_with_as_many_in_the_context():
    names = ["baseline", "off", "on", "context", "k_1", "k_4", "context_4", "context_8"]
    pairs = [("on", "off"), ("on", "baseline"), ("on", "context"), ("k_4", "context_4")]
    assert compared_pairs(names) == pairs
    assert compared_pairs(["off"]) == []
