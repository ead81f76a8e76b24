"""Large files in parts: together they are the file, whichever way it is cut."""

import dataclasses
import gzip
import json
import pickle
import random
import struct

import fsspec
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipelines.artefacts.runner import InProcess
from data_pipelines.corpora import CorpusConfig, Reading, files_of, parts_of, read_file
from data_pipelines.documents import reading
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents
from retro_jax.errors import UserError
from tests.data_pipelines.small import tree

TEXTS = [f"text {i} " + "é\u2028word " * (i % 9) for i in range(60)]


def lines():
    """Lines with a byte order mark, empty ones, and no newline at the end."""
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    data = ("\n".join(lines[:30]) + "\n\n \r\n" + "\n".join(lines[30:])).encode()
    return b"\xef\xbb\xbf" + data


def json_lines(path):
    """A plain file."""
    path.write_bytes(lines())


def frame(data, **options):
    """A Zstandard frame; by default without the size of its text."""
    packer = zstandard.ZstdCompressor(**{"write_content_size": False} | options).compressobj()
    return packer.compress(data) + packer.flush()


def frames(path):
    """Many frames, which end within lines and characters."""
    data = lines()
    path.write_bytes(b"".join(frame(data[i : i + 97]) for i in range(0, len(data), 97)))


def row_groups(path):
    """A Parquet file of several row groups."""
    parquet.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)


def documents(config, most):
    """The documents of a corpus's parts in order, and how many parts there are."""
    (file,) = files_of(config)
    parts = list(parts_of(config, file, most))
    found = Reading()
    return [d for part in parts for d in read_file(config, part, found)], len(parts)


@pytest.mark.parametrize(
    ("kind", "write", "end"),
    [
        ("jsonl", json_lines, ".jsonl"),
        ("jsonl", json_lines, ".ndjson"),
        ("jsonl", frames, ".jsonl.zst"),
        ("parquet", row_groups, ".parquet"),
    ],
)
def test_parts_together_are_the_file(tmp_path, kind, write, end):
    path = tmp_path / f"texts{end}"
    write(path)
    config = CorpusConfig("made", kind, str(path))
    whole, count = documents(config, 1 << 20)
    assert (count, [d.text for d in whole]) == (1, TEXTS)
    for most in (20, 50, 333, 2000):
        found, count = documents(config, most)
        assert count > 1 and found == whole
    (file,) = files_of(config)
    assert sum(part.size for part in parts_of(config, file, 333)) <= path.stat().st_size


PARTS = st.lists(
    st.tuples(st.integers(0, 400), st.booleans(), st.booleans(), st.sampled_from([0, 1, 9]))
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from(["", "a", "é\u2028" * 9, "long " * 60]), min_size=1, max_size=20),
    PARTS,
    st.booleans(),
    st.integers(1, 200),
)
def test_any_frames_in_any_parts_are_the_same_documents(texts, parts, ended, most):
    """Frames of any lengths, empty ones, skippable ones before them, with and without checksums."""
    text = "\n".join(json.dumps({"text": f"{t}{i}"}) if t else t for i, t in enumerate(texts))
    data, packed = (text + "\n" * ended).encode(), []
    for length, has_checksum, has_size, skipped in [*parts, (len(data), True, True, 0)]:
        if skipped:
            packed.append(struct.pack("<II", 0x184D2A50 + skipped, skipped) + b"\0" * skipped)
        piece, data = data[:length], data[length:]
        options = {"write_checksum": has_checksum, "write_content_size": has_size}
        packed.append(zstandard.ZstdCompressor(**options).compress(piece))
    system = fsspec.filesystem("memory")
    system.pipe("/parts/x.jsonl.zst", b"".join(packed))
    config = CorpusConfig("made", "jsonl", "memory://parts", id_field="text")
    expected = [f"{t}{i}" for i, t in enumerate(texts) if t]
    found, count = documents(config, most)
    assert [d.id for d in found] == expected
    assert count > 1 or len(packed) == 1 or most > min(map(len, packed[:-1]))
    # A seek table gives the same parts, and a wrong one is not believed.
    table = b"".join(struct.pack("<II", len(p), 0) for p in packed)
    head = struct.pack("<II", 0x184D2A5E, len(table) + 9)
    seekable = b"".join(packed) + head + table + struct.pack("<IBI", len(packed), 0, 0x8F92EAB1)
    system.pipe("/parts/x.jsonl.zst", seekable)
    assert [d.id for d in documents(config, most)[0]] == expected


def test_blocks_of_every_kind_are_followed(tmp_path):
    """Frames of several blocks: what cannot be compressed, one byte many times, and text."""
    noise = random.Random(0).randbytes(300_000).hex()
    texts = [
        "x" * 400_000,
        noise,
        "word " * 100_000,
        random.Random(1).randbytes(90_000).decode("latin-1"),
    ]
    rows = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    raw = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, 0x38])  # by hand: a window, and blocks as they are
    pieces = [rows[0][i : i + 100_000] for i in range(0, len(rows[0]), 100_000)]
    for number, piece in enumerate(pieces):
        raw += (len(piece) << 3 | (number == len(pieces) - 1)).to_bytes(3, "little") + piece
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(raw + b"".join(map(frame, rows[1:])))
    config = CorpusConfig("made", "jsonl", str(path))
    found, count = documents(config, 1)
    assert (count, [d.text for d in found]) == (4, texts)


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_frames_that_end_too_early_or_go_wrong_are_one_line(tmp_path, cut):
    path = tmp_path / "x.jsonl.zst"
    frames(path)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    config = CorpusConfig("made", "jsonl", str(path), id_field="text")
    (file,) = files_of(config)
    with pytest.raises(UserError, match=r"x.jsonl.zst is damaged .*: expected a whole .zst file"):
        documents(config, 100)
    (part,) = parts_of(config, file, 100)
    wrong = dataclasses.replace(part, start=0, stop=50)
    with pytest.raises(UserError, match=r"x.jsonl.zst is damaged \(the last frame ends too early"):
        list(read_file(config, wrong, Reading()))


@pytest.mark.parametrize(("write", "end"), [(json_lines, ".jsonl"), (frames, ".jsonl.zst")])
def test_documents_do_not_depend_on_parts(tmp_path, monkeypatch, write, end):
    class Elsewhere(InProcess):
        """Sends work as to other processes, and says which."""

        in_process = False

        def run(self, work, shards):
            works.append(type(work))
            return super().run(pickle.loads(pickle.dumps(work)), shards)

    works: list[type] = []
    (tmp_path / "texts").mkdir()
    for name in "ab":  # two files, of which the workers find the parts
        write(tmp_path / "texts" / f"{name}{end}")
    config = DocumentsConfig([CorpusConfig("made", "jsonl", str(tmp_path / "texts"))])
    prepare_documents(tmp_path / "whole", config)
    monkeypatch.setattr(reading, "_PART_BYTES", 500)
    monkeypatch.setattr(reading, "_PORTION_BYTES", 1500)
    prepare_documents(tmp_path / "cut", config, runner=Elsewhere())
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert works[0] == reading.Parts


def test_what_cannot_be_cut_is_one_part(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99))
    rows = [" = Heading = \n", "", *(" text of the article \n",) * 30, " = Other = \n", " more \n"]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "b.jsonl").write_text(lines)
    for file in files_of(CorpusConfig("c", "jsonl", str(tmp_path))):
        assert len(list(parts_of(CorpusConfig("c", "jsonl", str(tmp_path)), file, 10))) == 1
    (tmp_path / "c.parquet").write_bytes(b"no Parquet " * 9)
    config = CorpusConfig("c", "parquet", str(tmp_path / "c.parquet"), id_field="id")
    with pytest.raises(UserError, match=r"c.parquet is damaged .*: expected a whole Parquet file"):
        documents(config, 10)


def test_a_bad_line_of_a_part_is_named_by_its_byte(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' * 50 + "{bad\n" + '{"text": "a"}\n' * 50)
    config = CorpusConfig("c", "jsonl", str(path))
    with pytest.raises(UserError, match=r"bad.jsonl:51 is not valid JSON"):
        documents(config, 1 << 20)
    with pytest.raises(UserError, match=r"bad.jsonl at byte 700 is not valid JSON"):
        documents(config, 100)
    packed = tmp_path / "bad.jsonl.zst"
    data = path.read_bytes()
    packed.write_bytes(frame(data[:690]) + frame(data[690:]))
    offset = len(frame(data[:690]))
    where = rf"bad.jsonl.zst \(the text from byte {offset} on\) at byte 10 is not valid JSON"
    with pytest.raises(UserError, match=where):
        documents(dataclasses.replace(config, path=str(packed)), 10)
