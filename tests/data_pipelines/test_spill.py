"""Sorting on disk equals sorting in memory, for any number of buckets."""

import hashlib
import pathlib
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.spill import Spill


def _hash(value):
    return hashlib.sha256(value.encode()).digest()[:16]


def _filled(folder, records, buckets):
    spill = Spill(folder, buckets)
    spill.start()
    for name, text in records:
        spill.add(_hash(name), _hash(text) if text else None, f"{name} {text}".encode())
    spill.close()
    return Spill(folder, buckets)  # as another process would open it


@settings(max_examples=50, deadline=None)
@given(
    records=st.dictionaries(st.text("abc", min_size=1), st.sampled_from(["", "x", "y", "z"])),
    buckets=st.sampled_from([1, 3, 64]),
)
def test_sorted_and_without_duplicates_as_in_memory(records, buckets):
    ordered = sorted(records.items(), key=lambda record: _hash(record[0]))
    seen, expected = set(), []
    for name, text in ordered:
        expected.append((_hash(name), f"{name} {text}".encode(), bool(text) and text in seen))
        seen.add(text)
    with tempfile.TemporaryDirectory() as folder:
        spill = _filled(pathlib.Path(folder) / "s", records.items(), buckets)
        assert list(spill.records()) == expected
        assert spill.duplicates() == sum(duplicate for _, _, duplicate in expected)
        assert spill.repeated() is None


@pytest.mark.parametrize("buckets", [1, 7])
def test_repeated_order_is_found(tmp_path, buckets):
    records = [("a", "x"), ("b", "y"), ("c", "z"), ("b", "w")]
    assert _filled(tmp_path / "s", records, buckets).repeated() in (b"b y", b"b w")


def test_starting_again_forgets_what_was_there(tmp_path):
    _filled(tmp_path / "s", [("a", "x"), ("b", "x")], 3)
    again = _filled(tmp_path / "s", [("c", "x")], 3)
    assert [payload for _, payload, _ in again.records()] == [b"c x"]
    assert not again.duplicates()
