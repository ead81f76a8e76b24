"""Sorting on disk equals sorting in memory, for any number of runs and ranges."""

import hashlib
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.documents.external_sort import Entry, Runs, RunWriter, read_lines, repeated


def _hash(value):
    return hashlib.sha256(value.encode()).digest()[:16]


def _entry(corpus, name, text):
    line = f"{corpus} {name} {text}\n".encode()
    return Entry(corpus, _hash(name), _hash(text) if text else None, "test", len(text), line)


def _filled(folder, records, sort_bytes):
    """Runs of the records, which two processes may have written."""
    folders = [folder / "one", folder / "two"]
    for i, place in enumerate(folders):
        place.mkdir(parents=True)
        writer = RunWriter(place, place, sort_bytes)
        for record in records[i::2]:
            writer.add(_entry(*record))
        writer.flush()
    return Runs(folders, sort_bytes)


def _read(runs, corpus):
    """Lines of a corpus in order, and which are duplicates."""
    parts = list(runs.sorted(corpus))
    lines = [line for rows, _ in parts for line in read_lines(runs.stems, rows)]
    return lines, np.concatenate([mask for _, mask in parts]).tolist()


@settings(max_examples=50, deadline=None)
@given(
    records=st.dictionaries(
        st.tuples(st.sampled_from(["a", "b"]), st.text("xyz", min_size=1)),
        st.sampled_from(["", "x", "y", "z"]),
    ),
    sort_bytes=st.sampled_from([1, 2000, 1 << 20]),
)
def test_sorted_and_without_duplicates_as_in_memory(records, sort_bytes):
    entries = [_entry(*name, text) for name, text in records.items()]
    seen, again = set(), {}
    for entry in sorted(entries, key=lambda e: (e.order, _numbered(e.corpus))):
        again[entry.corpus, entry.order] = entry.content in seen
        seen |= {entry.content} - {None}
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        runs = _filled(folder, [(*name, text) for name, text in records.items()], sort_bytes)
        assert runs.find_duplicates(folder) == sum(again.values())
        assert runs.corpora == sorted({corpus for corpus, _ in records})
        for corpus in runs.corpora:
            ordered = sorted((e for e in entries if e.corpus == corpus), key=lambda e: e.order)
            expected = [entry.line for entry in ordered]
            duplicates = [again[corpus, entry.order] for entry in ordered]
            assert _read(runs, corpus) == (expected, duplicates)
            assert all(repeated(rows) is None for rows, _ in runs.sorted(corpus))


def _numbered(corpus):
    """Where two corpora hold one text under one id, the one of the smaller hash counts as first."""
    from data_pipelines.documents.external_sort import _corpus_hash

    return _corpus_hash(corpus)


@pytest.mark.parametrize("sort_bytes", [1, 1 << 20])
def test_repeated_order_is_found(tmp_path, sort_bytes):
    records = [("c", "a", "x"), ("c", "b", "y"), ("c", "d", "z"), ("c", "b", "w"), ("c", "e", "")]
    runs = _filled(tmp_path, records, sort_bytes)
    found = [row for rows, _ in runs.sorted("c") if (row := repeated(rows)) is not None]
    assert [runs.line(row).split()[1] for row in found] == [b"b"]


def test_a_row_tells_split_size_and_length(tmp_path):
    runs = _filled(tmp_path, [("c", "a", "text")], 1)
    ((rows, _),) = runs.sorted("c")
    assert (rows["size"][0], rows["length"][0], rows["split"][0]) == (4, len("c a text\n"), 2)
