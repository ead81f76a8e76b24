"""Files as they come: line ends, compression, byte order marks, links, rows that cannot be read."""

import bz2
import contextlib
import gzip
import io
import json
import logging
import lzma
import os

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_pipelines.corpora import CorpusConfig, Reading, read_corpus
from data_pipelines.corpora.document import content_id, short_label
from retro_jax.errors import UserError

_ARTICLES = [
    f" \n = Town {i} = \n \n The town of {i} is old . \n \n = = History = = \n \n x = {i} . \n"
    for i in range(6)
]
_FORMS = {
    "as published": lambda text: text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "stripped": lambda text: "\n".join(line.strip() for line in text.split("\n")),
    "padded": lambda text: text.replace("\n", " \t\n"),
    "byte order mark": lambda text: "\ufeff" + text.removeprefix(" \n"),
}


def _read(path, kind="text", skip=False, **settings):
    reading = Reading(skip_bad=skip)
    documents = list(read_corpus(CorpusConfig("c", kind, str(path), **settings), reading))
    return documents, reading


@pytest.mark.parametrize("form", sorted(_FORMS))
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_articles_of_wikitext_in_any_form(tmp_path, form, suffix):
    data = _FORMS[form]("".join(_ARTICLES)).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"wiki.train.tokens{suffix}"
    path.write_bytes(pack(data))
    documents, _ = _read(path, "wikitext")
    assert [d.id for d in documents] == [f"{path.name}/Town {i}" for i in range(6)]
    joined = "".join(d.text for d in documents).encode()
    assert joined == data.removeprefix(b"\xef\xbb\xbf")


def _rows(text):
    """As Hugging Face publishes WikiText: a row a line, empty where the line was."""
    return ["" if not line.strip() else f"{line}\n" for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "wikitext"])
def test_articles_of_wikitext_in_rows(tmp_path, kind, caplog):
    rows = _rows("".join(_ARTICLES))
    if kind == "jsonl":
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / "train.jsonl").write_text(lines)
    else:  # the second file begins within an article
        cut = len(rows) // 2 + 1
        for i, part in enumerate([rows[:cut], rows[cut:]]):
            table = pyarrow.table({"text": part})
            parquet.write_table(table, tmp_path / f"train-{i:05d}-of-00002.parquet")
    with caplog.at_level(logging.WARNING):
        documents, _ = _read(tmp_path, kind)
    assert sorted(d.text.split(" = ")[1] for d in documents) == [f"Town {i}" for i in range(6)]
    if kind == "wikitext":
        assert sorted(d.id.split("/")[1] for d in documents) == [f"Town {i}" for i in range(6)]
    else:
        assert [d.id for d in documents] == [content_id(d.text) for d in documents]
    assert "".join(d.text for d in documents) == "".join(_ARTICLES)
    assert ("put together again" in caplog.text) == (kind != "wikitext")


def test_rows_that_only_look_a_little_like_wikitext_stay_documents(tmp_path):
    rows = [" = a = b \n", " padded \n", "plain"]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "x.parquet")
    assert [d.text for d in _read(tmp_path, "parquet")[0]] == rows


def test_a_file_without_an_article_is_said_to_have_none(tmp_path, caplog):
    (tmp_path / "wiki.train.tokens").write_text("just text\nand more\n")
    with caplog.at_level(logging.WARNING):
        documents, _ = _read(tmp_path, "wikitext")
    assert len(documents) == 1 and "no article begins" in caplog.text


@pytest.mark.parametrize(
    ("label", "short"),
    [
        ("C", "c"),
        ("C++", "c_plus_plus"),
        ("C#", "c_sharp"),
        ("F*", "f_asterisk"),
        ("中文", "中文"),
        ("日本語", "日本語"),
        ("Ελληνικά", "ελληνικά"),
        ("العربية", "العربية"),
        ("हिन्दी", "हिन्दी"),
        ("ไทยที่", "ไทยที่"),
        ("PubMed Central", "pubmed_central"),
        ("Gutenberg (PG-19)", "gutenberg"),
        ("USPTO Backgrounds", "uspto"),
        ("Java (17)", "java_17"),
        ("???", "question_mark_question_mark_question_mark"),
        ("e\u0301", "é"),
    ],
)
def test_labels_of_any_script(label, short):
    assert short_label(label) == short


def test_labels_that_are_written_alike_are_refused(tmp_path):
    lines = [{"text": "x", "language": language} for language in ("A b", "A-b")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="'A b' and 'A-b' are both written 'a_b'"):
        _read(tmp_path, "jsonl", label_field="language")


def test_long_windows_are_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    line = json.dumps({"text": "far " * 100}).encode() + b"\n"
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "x.jsonl.zst").write_bytes(packer.compress(line * 3) + packer.flush())
    assert len(_read(tmp_path, "jsonl")[0]) == 3


_PACK = {
    "rst": bytes,
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", [".rst", ".rst.gz", ".txt.zst", ".txt.bz2", ".md.xz"])
def test_text_files_are_read_compressed_too(tmp_path, suffix):
    pack = _PACK[suffix.split(".")[-1]]
    (tmp_path / f"page{suffix}").write_bytes(pack("\ufeffGrüße\n".encode()))
    documents, _ = _read(tmp_path, include=(f"*{suffix}",))
    assert [(d.id, d.text) for d in documents] == [(f"page{suffix}", "Grüße\n")]


def test_a_byte_order_mark_changes_nothing(tmp_path):
    """At the start of a file, and of each of several that were joined."""
    line = json.dumps({"text": "x"})
    (tmp_path / "a.jsonl").write_text(f"\ufeff{line}\n\ufeff{line}\n")
    assert [d.text for d in _read(tmp_path, "jsonl")[0]] == ["x", "x"]


def test_linked_folders_are_read_once(tmp_path, caplog):
    inside, outside = tmp_path / "corpus" / "a", tmp_path / "elsewhere"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text(folder.name)
    for name, target in (("b", outside), ("c", outside), ("loop", tmp_path), ("same", inside)):
        os.symlink(target, tmp_path / "corpus" / name)
    with caplog.at_level(logging.WARNING):
        documents, _ = _read(tmp_path / "corpus")
    assert {d.id: d.text for d in documents} == {"a/x.txt": "a", "b/x.txt": "elsewhere"}
    assert [record.getMessage().count("is left out") for record in caplog.records] == [1, 1, 1]


def _parquet(folder, column):
    table = pyarrow.table({"text": column})
    parquet.write_table(table, folder / "x.parquet")


def test_rows_with_bad_utf8_are_named_and_counted(tmp_path):
    data = [b"good", b"caf\xe9", b"also good"]
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, pyarrow.array(data, pyarrow.binary()).buffers()
    )
    _parquet(tmp_path, text)
    with pytest.raises(UserError, match=r"x.parquet:2 has byte 0xe9: expected UTF-8; skip_bad"):
        _read(tmp_path, "parquet")
    documents, reading = _read(tmp_path, "parquet", skip=True)
    assert [d.text for d in documents] == ["good", "also good"] and reading.counts["bad"] == 1


def test_a_column_of_bytes_is_text(tmp_path):
    _parquet(tmp_path, pyarrow.array([b"one", b"caf\xe9"], pyarrow.binary()))
    documents, reading = _read(tmp_path, "parquet", skip=True)
    assert [d.text for d in documents] == ["one"] and reading.counts["bad"] == 1


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([1, None]),
        pyarrow.array([[1], None]),
        pyarrow.array([{"a": 1}, None]),
        pyarrow.array([2**62, None], pyarrow.timestamp("us")),
        pyarrow.array([1.5, None]),
    ],
)
def test_odd_columns_are_one_line(tmp_path, column):
    _parquet(tmp_path, column)
    with pytest.raises(UserError, match=r"x.parquet:1 (has no text|cannot be read)"):
        _read(tmp_path, "parquet")


def test_a_damaged_page_names_its_file(tmp_path):
    _parquet(tmp_path, [f"text {i} " * 50 for i in range(50)])
    path = tmp_path / "x.parquet"
    data = bytearray(path.read_bytes())
    data[60:160] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.parquet is damaged"):
        _read(tmp_path, "parquet")


@pytest.mark.parametrize("checksums", [False, True])
def test_rows_from_a_damaged_page_on_are_counted(tmp_path, checksums):
    """Of three row groups the second is damaged at its end: its first rows and the others are read."""
    rows = [f"text {i} " * 20 for i in range(90)]
    sink, path = pyarrow.BufferOutputStream(), tmp_path / "x.parquet"
    settings = {"compression": "none" if checksums else "zstd", "use_dictionary": False}
    parquet.write_table(
        *(pyarrow.table({"text": rows}), sink),
        row_group_size=30,
        data_page_size=1 if checksums else 1 << 20,
        write_batch_size=10,
        write_page_checksum=checksums,
        **settings,
    )
    data = bytearray(sink.getvalue().to_pybytes())
    column = parquet.ParquetFile(pyarrow.BufferReader(data)).metadata.row_group(1).column(0)
    end = column.data_page_offset + column.total_compressed_size
    data[end - 5] ^= 255  # within a text: without a checksum and uncompressed it would go unseen
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.parquet is damaged from row 31 to 60 .*; skip_bad"):
        _read(tmp_path, "parquet")
    documents, reading = _read(tmp_path, "parquet", skip=True)
    assert [d.text for d in documents] == rows[:30] + rows[60:]
    assert reading.counts == {"documents": 60, "bad": 30}


def test_bytes_that_cannot_be_fetched_are_no_damaged_page(tmp_path, monkeypatch):
    """Else a network that fails for a moment would cost documents."""
    _parquet(tmp_path, [f"text {i}" for i in range(9)])

    class Cut(io.BytesIO):
        def read(self, size=-1):
            if self.tell() < 40:
                raise OSError("connection reset")
            return super().read(size)

    @contextlib.contextmanager
    def opened(file):
        yield Cut((tmp_path / "x.parquet").read_bytes())

    monkeypatch.setattr("data_pipelines.corpora.parquet.open_file", opened)
    with pytest.raises(UserError, match=r"x.parquet cannot be read: connection reset"):
        _read(tmp_path, "parquet", skip=True)


def test_what_a_folder_has_instead_is_said(tmp_path):
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    expected = r"expected some of .*; it has c4-train.00000.json.gz, which CorpusConfig.include"
    with pytest.raises(UserError, match=expected):
        _read(tmp_path, "jsonl")
    assert len(_read(tmp_path, "jsonl", include=("*.json.gz",))[0]) == 1


@pytest.mark.parametrize("what", ["id", "text", "label"])
def test_half_a_surrogate_pair_is_one_line(tmp_path, what):
    fields = {"id": "1", "text": "x", "label": "l"} | {what: "half \ud83d"}
    (tmp_path / "x.jsonl").write_text(json.dumps(fields) + "\n")
    settings = {"id_field": "id", "label_field": "label"}
    with pytest.raises(UserError, match=f"the {what} of document .* has a lone surrogate"):
        _read(tmp_path, "jsonl", **settings)


def test_deep_nesting_is_one_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ' + "[" * 200_000 + "\n")
    with pytest.raises(UserError, match="is not valid JSON"):
        _read(tmp_path, "jsonl")


@pytest.mark.parametrize("mark", [".prepare.lock", "config.gin checkpoints"])
def test_what_was_made_of_a_corpus_is_no_part_of_it(tmp_path, mark, caplog):
    for folder in (tmp_path / "corpus", tmp_path / "corpus" / "W" / "deep"):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text("text")
    for name in mark.split():
        (tmp_path / "corpus" / "W" / name).touch()
    assert [d.id for d in _read(tmp_path / "corpus")[0]] == ["x.txt"]
    assert "the workdir" in caplog.text and "is left out" in caplog.text
    with pytest.raises(UserError, match="W is a workdir: expected a folder of documents"):
        _read(tmp_path / "corpus" / "W")
    assert [d.id for d in _read(tmp_path / "corpus" / "W" / "deep")[0]] == ["x.txt"]


def test_one_bad_introduction_is_counted(tmp_path):
    articles = {"1": {"title": "A", "extract": "a"}, "2": {"title": "B"}, "3": None}
    articles["4"] = {"title": "D", "extract": "\ud800"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(articles))
    documents, reading = _read(path, "wikipedia", skip=True)
    assert [d.id for d in documents] == ["A"] and reading.counts["bad"] == 3
    path.write_text("[]")
    with pytest.raises(UserError, match=r"x.json holds a list: expected a summaries_en-us.json"):
        _read(path, "wikipedia")


def test_columns_of_odd_types(tmp_path):
    """A text in a struct, a list of structs, two columns of one name, bytes as ids and labels."""
    nested = [{"b": {"c": "deep"}, "l": [{"b": "x"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(nested), tmp_path / "n.parquet")
    assert [d.text for d in _read(tmp_path / "n.parquet", "parquet", text_field="b.c")[0]] == [
        "deep"
    ]
    with pytest.raises(UserError, match=r"n.parquet has no column 'l.b': expected one of b, l"):
        _read(tmp_path / "n.parquet", "parquet", text_field="l.b")
    twice = pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet has 2 columns 'text': expected one"):
        _read(tmp_path / "t.parquet", "parquet")
    columns = {"text": [b"\xef\xbb\xbfx", b"y"], "id": [b"i", b"\xff"], "l": [b"C", b"C"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    fields = {"id_field": "id", "label_field": "l"}
    documents, reading = _read(tmp_path / "b.parquet", "parquet", skip=True, **fields)
    assert [(d.id, d.text, d.corpus) for d in documents] == [("i", "x", "c-c")]
    assert reading.first_bad.endswith("b.parquet:2 has byte 0xff at offset 0: expected UTF-8")
    with pytest.raises(UserError, match=r"holds no documents: .* 1 are bad: .*:1 has no text in"):
        _read_one_number(tmp_path / "f.parquet")


def _read_one_number(path):
    parquet.write_table(pyarrow.table({"text": [1.5]}), path)
    return _read(path, "parquet", skip=True)


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
def test_compressed_files_that_are_not_whole(tmp_path, suffix, caplog):
    path, line = tmp_path / f"x.jsonl.{suffix}", b'{"text": "a"}\n' * 9
    whole = _PACK[suffix](line)
    for data in (b"", whole[: len(whole) // 2], b"plain text", whole[:-3]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"x.jsonl.{suffix} is damaged"):
            _read(path, "jsonl")
    path.write_bytes(whole)
    assert len(_read(path, "jsonl", id_field=None)[0]) == 9
    (tmp_path / "y.jsonl").write_bytes(whole)  # under a name that does not say so
    with pytest.raises(UserError, match=rf"y.jsonl is compressed: .* ends in .{suffix}"):
        _read(tmp_path / "y.jsonl", "jsonl")


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
def test_files_of_several_streams_are_read_whole_or_not_at_all(tmp_path, suffix):
    """As parallel packers write them."""
    path, line = tmp_path / f"x.jsonl.{suffix}", b'{"text": "a"}\n' * 9
    first = _PACK[suffix](line)
    damaged = bytes([first[0] ^ 1]) + first[1:]
    path.write_bytes(first * 3)
    assert len(_read(path, "jsonl", id_field=None)[0]) == 27
    for rest in (damaged, first[:-3], first[:3], b"plain text", *([b"\0plain"] * (suffix == "xz"))):
        path.write_bytes(first + rest)
        with pytest.raises(UserError, match=rf"x.jsonl.{suffix} is damaged"):
            _read(path, "jsonl", id_field=None)
    if suffix == "xz":  # which may have zeros between streams and at the end
        path.write_bytes(first + bytes(4) + first + bytes(8))
        assert len(_read(path, "jsonl", id_field=None)[0]) == 18


@pytest.mark.parametrize("suffix", ["bz2", "xz"])
def test_a_stream_is_unpacked_some_at_a_time(tmp_path, suffix):
    path, text = tmp_path / f"x.jsonl.{suffix}", "a" * 3_000_000
    path.write_bytes(_PACK[suffix](json.dumps({"text": text}).encode() + b"\n") * 2)
    assert [d.text == text for d in _read(path, "jsonl", id_field=None)[0]] == [True] * 2


def test_compressed_files_beside_plain_ones_are_not_forgotten(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"b"))
    (tmp_path / "c.png").write_bytes(b"c")
    assert [d.id for d in _read(tmp_path)[0]] == ["a.txt"]
    assert "1 compressed files, such as b.txt.gz, are left out" in caplog.text
    caplog.clear()
    assert len(_read(tmp_path, include=("*.txt", "*.txt.gz"))[0]) == 2 and not caplog.text


def test_links_to_nothing_and_pipes_are_named(tmp_path):
    """A pipe would be waited for for ever."""
    (tmp_path / "a.txt").write_text("a")
    os.symlink(tmp_path / "none", tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"b.txt leads to nothing: expected a file"):
        _read(tmp_path)
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "c.txt")
    with pytest.raises(UserError, match=r"c.txt is no plain file: expected a file"):
        _read(tmp_path)
    assert len(_read(tmp_path, exclude=("c.txt",))[0]) == 1
