"""A short run of the fuzzing: the same changes each time. `python -m tests.fuzz` runs longer."""

import json

import pytest

from retro_jax.errors import UserError
from tests.fuzz import configurations, readers
from tests.fuzz.mutations import changed_bytes, changed_json
from tests.fuzz.target import fuzz, outcome


@pytest.mark.parametrize("target", readers.targets(), ids=lambda target: target.name)
def test_no_reader_fails_or_loses_a_document(target, tmp_path):
    counts = fuzz(target, tmp_path / "x", 40)
    assert counts["refused"]
    assert counts["read"] or ".gz" in target.name  # where nearly every change is damage


def test_no_configuration_fails(tmp_path):
    for number, target in enumerate(configurations.targets()):
        counts = fuzz(target, tmp_path / str(number), 12)
        assert sum(counts.values()) >= 12, target.name


def test_what_is_not_changed_is_read(tmp_path):
    """Else the fuzzing would see nothing but refusals."""
    for number, target in enumerate([*readers.targets(), *configurations.targets()][:-1]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert outcome(target, folder, [("insert", 1.0, 0.0, b"")]) == "read", target.name


def test_a_lost_document_and_a_traceback_are_seen(tmp_path, monkeypatch):
    lines = next(t for t in readers.targets() if t.name == "jsonl a.jsonl")
    monkeypatch.setattr(readers, "read_corpus", lambda config, reading: iter(()))
    with pytest.raises(AssertionError):
        outcome(lines, tmp_path, [("insert", 1.0, 0.0, b"")])

    def fails(config, reading):
        raise KeyError("text")

    monkeypatch.setattr(readers, "read_corpus", fails)
    with pytest.raises(KeyError):
        outcome(lines, tmp_path, [("insert", 1.0, 0.0, b"")])
    monkeypatch.setattr(readers, "read_corpus", lambda *_: _nameless())
    with pytest.raises(AssertionError, match="which file"):
        outcome(lines, tmp_path, [("insert", 1.0, 0.0, b"")])


def test_metadata_that_ends_the_process_is_not_asked_for(tmp_path):
    """Found by tests.fuzz.guided: pyarrow ends the process where it is asked for this column's metadata."""
    parquet = next(t for t in readers.targets() if t.name == "parquet a.parquet")
    change = ("flip", 0.5976792279411739, 0.050588235320311106, b"null")
    assert outcome(parquet, tmp_path, [change]) == "refused"


def _nameless():
    raise UserError("something is wrong")


def test_changes():
    data = b"0123456789"
    assert changed_bytes(data, [("cut", 0.5, 0.0, b"")]) == b"01234"
    assert changed_bytes(data, [("insert", 0.1, 0.0, b"ab")]) == b"0ab123456789"
    assert changed_bytes(data, [("remove", 0.0, 0.1, b"")]) == b"123456789"
    assert changed_bytes(data, [("overwrite", 0.0, 0.0, b"xy")]) == b"xy23456789"
    assert changed_bytes(data, [("flip", 0.0, 0.0, b"\1")]) == b"1123456789"
    value = {"a": [1, {"b": 2}]}
    assert changed_json(value, [(0.0, True, None)]) == {}
    assert changed_json(value, [(0.99, False, "x")]) == {"a": [1, {"b": "x"}]}
    assert json.loads(json.dumps(value)) == value
