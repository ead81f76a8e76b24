"""Folders as `datasets` 4 writes them; the layout was compared with one that it made."""

import json
import struct

import pyarrow
import pytest
from pyarrow import feather

from data_pipelines.corpora import CorpusConfig, Reading, TextCorpus, read_corpus
from retro_jax.errors import UserError

_ROWS = [{"text": f"text {i}", "id": f"d{i}", "lang": "C" if i % 2 else "C++"} for i in range(10)]


def _save(folder, rows=_ROWS, shards=2):
    """What Dataset.save_to_disk writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        table = pyarrow.Table.from_pylist(rows[i::shards])
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    return folder


def _read(path, skip=False, **fields):
    reading = Reading(skip_bad=skip)
    config = CorpusConfig("c", "datasets", str(path), **fields)
    return list(read_corpus(config, reading)), reading


def test_a_saved_dataset(tmp_path):
    folder = _save(tmp_path / "mine")
    (folder / "cache-0123.arrow").write_bytes(b"of map(), no part of the data")
    documents, reading = _read(folder, id_field="id", label_field="lang")
    assert {(d.id, d.text) for d in documents} == {(r["id"], r["text"]) for r in _ROWS}
    assert {d.corpus for d in documents} == {"c-c", "c-c_plus_plus"}
    assert reading.counts["documents"] == 10
    feather.write_feather(pyarrow.Table.from_pylist(_ROWS), str(tmp_path / "x.feather"))
    assert {d.text for d in _read(tmp_path / "x.feather")[0]} == {r["text"] for r in _ROWS}


def test_splits_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        _save(tmp_path / "both" / split)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"has the splits \['train', 'test'\]: expected one corpus"):
        _read(tmp_path / "both")
    assert len(_read(tmp_path / "both" / "test")[0]) == 10


def test_a_folder_that_lacks_something(tmp_path):
    folder = _save(tmp_path / "mine")
    second = folder / "data-00001-of-00002.arrow"
    whole = second.read_bytes()
    for cut in (8, len(whole) // 2):  # between batches, and within one
        second.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match=r"data-00001-of-00002.arrow is (cut off|damaged)"):
            _read(folder)
    second.unlink()
    with pytest.raises(UserError, match=r"state.json lists 'data-00001-of-00002.arrow': expected"):
        _read(folder)
    with pytest.raises(UserError, match="has no column 'content': expected one of text, id, lang"):
        _read(_save(tmp_path / "other"), text_field="content")
    rows = [{"text": "a"}, {"text": None}]
    documents, reading = _read(_save(tmp_path / "none", rows, 1), skip=True)
    assert len(documents) == 1 and reading.counts["bad"] == 1
    assert "data-00000-of-00001.arrow:2 has no text in 'text'" in reading.first_bad


def test_rows_of_a_damaged_batch_are_counted(tmp_path):
    """An offset of the second batch of two rows leads outside of its bytes."""
    (path,) = _save(tmp_path / "mine", shards=1).glob("*.arrow")
    data = path.read_bytes()
    offsets = struct.pack("<3i", 0, 6, 12)  # of "text 2" and "text 3", as of every other batch
    first = data.index(offsets)
    second = data.index(offsets, first + 12)
    path.write_bytes(data[:second] + struct.pack("<3i", 0, 600, 12) + data[second + 12 :])
    with pytest.raises(UserError, match=r"arrow is damaged from row 3 to 4 .*; skip_bad_documents"):
        _read(tmp_path / "mine")
    documents, reading = _read(tmp_path / "mine", skip=True)
    assert [d.text for d in documents] == [f"text {i}" for i in range(10) if i not in (2, 3)]
    assert reading.counts == {"documents": 8, "bad": 2}


class _Frame:
    """What of a pandas table is used; the real one was tried by hand (pandas 3)."""

    columns = ("text", "name", "n")

    def __getitem__(self, column):
        values = {"text": ["a", "b"], "name": ["x", "y"], "n": [1, 2]}[column]
        return type("Column", (), {"tolist": lambda self: values})()

    def itertuples(self):
        raise AssertionError("slow")


def test_tables_and_iterables_in_memory():
    table = pyarrow.table({"text": ["a", "b"], "name": ["x", "y"], "n": [1, 2]})
    rows = table.to_pylist()
    for source in (table, _Frame(), rows, iter(rows)):
        assert TextCorpus.of("c", source, id="name").documents == (("x", "a"), ("y", "b"))
    assert TextCorpus.of("c", table, id="n", split="test").documents == (("1", "a"), ("2", "b"))
    assert TextCorpus.of("c", (text for text in "ab")) == TextCorpus("c", ["a", "b"])
    with pytest.raises(
        UserError, match=r"table of 'c' has no column 'body': expected one of \['te"
    ):
        TextCorpus.of("c", table, text="body")
    with pytest.raises(UserError, match="row 1 of 'c' has None in 'text': expected a string"):
        TextCorpus.of("c", [{"text": "a"}, {}])
    with pytest.raises(UserError, match=r"row 0 of 'c' has nan in 'text'"):
        TextCorpus.of("c", pyarrow.table({"text": [float("nan")]}))
    with pytest.raises(UserError, match="the rows of 'c' are a str: expected a table"):
        TextCorpus.of("c", "text")
