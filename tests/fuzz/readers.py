"""Corpora, evaluation texts and questions, mutated."""

import dataclasses
import functools
import gzip
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator

import pyarrow
import zstandard
from pyarrow import parquet

from data_pipelines.corpora import CorpusConfig, Reading, read_corpus
from data_pipelines.evaluation.texts import SliceConfig, read_texts
from data_pipelines.questions.reader import read_questions
from retro_jax.errors import UserError
from tests.fuzz.mutations import BYTE_CHANGES, changed_bytes
from tests.fuzz.target import Target

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PROSE = (_ROOT / "tests" / "data" / "prose.txt").read_text()  # found changes are of its bytes
_ARTICLES = "".join(
    f" \n = Town {i} = \n \n The town of {i} is old . \n \n = = History = = \n \n It grew . \n"
    for i in range(5)
)
_ROWS = [
    {"text": part, "id": i, "meta": {"pile_set_name": "Github" if i % 2 else "ArXiv"}}
    for i, part in enumerate(_PROSE.split("\n\n")[:12])
]
_LINES = "".join(json.dumps(row, ensure_ascii=bool(row["id"] % 3)) + "\n" for row in _ROWS)
_QUESTIONS = "".join(
    json.dumps({"question": f"q{i}?", "answers": ["a"], "ctxs": [{"title": "t", "text": "x"}]})
    + "\n"
    for i in range(3)
)
_SUMMARIES = "".join(json.dumps({"article": "a b", "summary": f"s {i}"}) + "\n" for i in range(4))


def _parquet() -> bytes:
    """A Parquet file of two row groups."""
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(_ROWS), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def _arrow() -> bytes:
    """An Arrow stream of several batches, as `datasets` writes it."""
    table, sink = pyarrow.Table.from_pylist(_ROWS), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return sink.getvalue().to_pybytes()


def _wikipedia() -> bytes:
    """As the package's file."""
    articles = {str(i): {"title": f"T{i}", "extract": f"text {i}"} for i in range(4)}
    return json.dumps(articles).encode()


def _plain(path: pathlib.Path) -> bytes | None:
    """A file decompressed by other code than the readers'; None for a damaged one."""
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            return gzip.decompress(data)
        if path.suffix == ".zst":
            return b"".join(_frames(data))
    except (EOFError, OSError, zlib.error, zstandard.ZstdError):
        return None
    return data


def _frames(data: bytes) -> Iterator[bytes]:
    """Every frame of a Zstandard file."""
    while data:
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        yield frame.decompress(data)
        if not frame.eof:
            raise EOFError
        data = frame.unused_data


def _count_text(path: pathlib.Path) -> int:
    """A text is one document."""
    return 1


def _count_lines(path: pathlib.Path) -> int | None:
    """Lines that have anything in them: none of them may be lost."""
    data, count = _plain(path), 0
    for line in (data or b"").split(b"\n"):
        line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            count += bool(line.decode().strip())
        except UnicodeDecodeError:
            count += 1
    return None if data is None else count


def _count_rows(path: pathlib.Path) -> int | None:
    """Rows as the file's own metadata counts them."""
    return parquet.ParquetFile(path).metadata.num_rows


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """Reads a corpus with and without skipping, and counts."""

    config: CorpusConfig
    count: Callable[[pathlib.Path], int | None]

    def __call__(self, folder: pathlib.Path) -> None:
        """Raises what reading raises, after the counts of reading with skip_bad are right."""
        path = folder / str(self.config.path)
        config = dataclasses.replace(self.config, path=str(path))
        reading = Reading(skip_bad=True)
        try:
            documents = list(read_corpus(config, reading))
        except UserError as error:
            if config.name not in str(error) and path.name not in str(error):
                raise AssertionError(f"which file? {error}") from error
            if "holds no documents" not in str(error):
                raise
            documents = []
        counts = reading.counts
        assert len(documents) == counts["documents"]
        for document in documents:
            document.text.encode(), document.id.encode()
        expected = self.count(path)
        if expected is not None:
            assert counts["documents"] + counts["bad"] + counts["empty"] == expected, counts
        assert bool(counts["bad"]) == bool(reading.first_bad)
        strict = list(read_corpus(config, Reading()))  # raises at the first bad one
        assert not counts["bad"] and strict == documents


@dataclasses.dataclass(frozen=True)
class _Articles(_Corpus):
    """WikiText's articles, which one after the other are the file."""

    def __call__(self, folder: pathlib.Path) -> None:
        """As for any corpus; what is read is every byte of the file."""
        path = folder / str(self.config.path)
        super().__call__(folder)
        config = dataclasses.replace(self.config, path=str(path))
        texts = "".join(document.text for document in read_corpus(config, Reading()))
        data = path.read_bytes().decode().replace("\ufeff", "")
        assert "".join(texts.replace("\ufeff", "").split()) == "".join(data.split())


def _write(name: str, data: bytes, folder: pathlib.Path, changes: list) -> None:
    """The changed bytes."""
    (folder / name).write_bytes(changed_bytes(data, changes))


def _write_packed(
    name: str, data: bytes, pack: Callable[[bytes], bytes], folder: pathlib.Path, changes: list
) -> None:
    """A compressed file that is whole, of changed bytes."""
    (folder / name).write_bytes(pack(changed_bytes(data, changes)))


def _corpus(name: str, kind: str, data: bytes, count=lambda path: None, form=_Corpus, **fields):
    """A corpus of one file called `name`."""
    config = CorpusConfig("fuzzed", kind, name, **fields)
    write = functools.partial(_write, name, data)
    return Target(f"{kind} {name}", BYTE_CHANGES, write, form(config, count))


def _slice(name: str, file: str, data: bytes) -> Target:
    """An evaluation text; of JSON lines every document is read or counted."""

    def read(folder: pathlib.Path) -> None:
        config, reading = SliceConfig(name, str(folder / file)), Reading(skip_bad=True)
        texts = list(read_texts(config, reading))
        for text in texts:
            text.text.encode()
        if file.endswith(".jsonl"):
            left_out = reading.counts["bad"] + reading.counts["empty"]
            assert len(texts) + left_out == _count_lines(folder / file), reading.counts
        list(read_texts(config, Reading()))  # raises at the first bad one

    return Target(f"slice {name}", BYTE_CHANGES, functools.partial(_write, file, data), read)


def targets() -> list[Target]:
    """Every reader of texts."""
    prose, lines = _PROSE.encode(), _LINES.encode()
    packed = Target(
        "jsonl repacked.jsonl.zst",
        BYTE_CHANGES,
        functools.partial(_write_packed, "repacked.jsonl.zst", lines, zstandard.compress),
        _Corpus(CorpusConfig("fuzzed", "jsonl", "repacked.jsonl.zst", id_field="id"), _count_lines),
    )
    return [
        _corpus("a.txt", "text", prose, _count_text),
        _corpus("a.txt.gz", "text", gzip.compress(prose, mtime=0), _count_text),
        _corpus("a.txt.zst", "text", zstandard.compress(prose), _count_text),
        _corpus("a.jsonl", "jsonl", lines, _count_lines),
        _corpus("a.jsonl.gz", "jsonl", gzip.compress(lines, mtime=0), _count_lines),
        _corpus("a.jsonl.zst", "jsonl", zstandard.compress(lines), _count_lines),
        packed,
        _corpus("b.jsonl", "pile", lines, _count_lines),
        _corpus("a.parquet", "parquet", _parquet(), _count_rows, id_field="id"),
        _corpus("a.arrow", "datasets", _arrow(), id_field="id"),
        _corpus("wiki.train.tokens", "wikitext", _ARTICLES.encode(), form=_Articles),
        _corpus("summaries_en-us.json", "wikipedia", _wikipedia()),
        _slice("wikitext103", "wiki.test.tokens", _ARTICLES.encode()),
        _slice("pile", "val.jsonl", lines),
        _slice("lambada", "test.parquet", _parquet()),
        _slice("curation", "test.jsonl", _SUMMARIES.encode()),
        Target(
            "questions",
            BYTE_CHANGES,
            functools.partial(_write, "q.jsonl", _QUESTIONS.encode()),
            lambda folder: read_questions(str(folder / "q.jsonl")),
        ),
    ]
