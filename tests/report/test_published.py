"""The paper's figures stand beside ours of the same text, and of no other."""

from data_pipelines.evaluation.texts import TEXTS, evaluation_text
from retro_jax.report.published import beside_paper


def _beside(split: str, words: int, **more: dict):
    """The table of a text."""
    return beside_paper(_results(split, words, **more), evaluation_text(split).published)


def _results(split: str, words: int, **more: dict) -> dict:
    """Two conditions of a text of so many words."""
    every = {"words": words - 10, "lines": 10, "word_perplexity": 33.333}
    return {
        name: {"settings": {"split": split}, "all": every, "corpora": {"x": {}}, **more}
        for name in ("off", "baseline")
    }


def test_wikitext_stands_in_the_column_of_its_set():
    found = _beside("wikitext103_detokenised", 217_646)
    assert list(found.header) == ["perplexity by word", "validation", "test"]
    assert ["RETRO, Wikipedia", "18.46", "18.97"] in found.rows
    assert found.rows[-2:] == [
        ["ours: baseline", "33.33", ""],
        ["ours: RETRO[OFF]", "33.33", ""],
    ]
    assert "217,646, the whole validation set" in found.caption


def test_a_part_of_wikitext_is_in_neither_column():
    found = _beside("wikitext103-first2", 5_000)
    assert list(found.header) == ["perplexity by word", "validation", "test", "a part"]
    assert found.rows[-1] == ["ours: RETRO[OFF]", "", "", "33.33"]
    assert {len(row) for row in found.rows} == {4}
    assert "5,000, a part of a set" in found.caption


def test_lambada_stands_beside_its_sizes():
    right = {"value": 0.25, "low": 0.2, "high": 0.3}
    found = _beside("lambada", 10, last_word_accuracy=right)
    assert found.rows[0] == ["paper: 172m", "0.42", "0.52"]
    assert found.rows[-1] == ["ours", "0.2500 [0.2000, 0.3000]", ""]


def test_other_texts_stand_alone():
    assert _beside("test", 10) is None
    assert _beside("pile-unknown", 10) is None


def test_rows_are_as_wide_as_their_columns():
    for text in TEXTS.values():
        if text.published:
            widths = {len(row) for row in text.published.rows.values()}
            assert widths == {len(text.published.columns)}
