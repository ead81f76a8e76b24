"""Files of a corpus wherever they are: the same documents from a folder and from a URL of fsspec's."""

import itertools
import json

import fsspec
import pytest
import zstandard

from data_pipelines.corpora import CorpusConfig, Reading, files_of, read_corpus, sources
from data_pipelines.corpora.document import content_id
from retro_jax.errors import UserError

_TEXTS = {
    "a.txt": "eins",
    "b/c.txt": "zwei",
    "b/d/e.txt": "drei",
    "b/note.md": "#",
    "f.txt": "vier",
    "tmp/g.txt": "no",
}


def _corpus(root):
    return CorpusConfig("t", "text", root, exclude=["tmp/*"])


def _write_local(folder):
    for name, text in _TEXTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def memory():
    """An empty file system of fsspec's in memory."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_a_url_gives_the_documents_of_a_folder(tmp_path, memory):
    memory.pipe({f"/bucket/texts/{name}": text.encode() for name, text in _TEXTS.items()})
    here = list(read_corpus(_corpus(str(_write_local(tmp_path))), Reading()))
    assert [d.id for d in here] == ["a.txt", "f.txt", "b/c.txt", "b/d/e.txt"]
    for root in ("memory://bucket/texts", "memory://bucket/texts/", f"file://{tmp_path}"):
        there = list(read_corpus(_corpus(root), Reading()))
        assert sorted(there, key=lambda d: d.id) == sorted(here, key=lambda d: d.id)
    (one,) = files_of(_corpus("memory://bucket/texts/b/note.md"))
    assert (one.name, one.size) == ("note.md", 1)
    assert CorpusConfig("t", "text", "gs://bucket/texts").settings["path"] == "texts"


def test_compressed_lines_from_a_url(memory):
    lines = b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(5000))
    memory.pipe("/c/x.jsonl.zst", zstandard.compress(lines))
    documents = list(read_corpus(CorpusConfig("j", "jsonl", "memory://c"), Reading()))
    assert [d.text for d in documents] == [f"text {i}" for i in range(5000)]
    assert documents[7].id == content_id("text 7")
    memory.pipe("/c/x.jsonl.zst", zstandard.compress(lines)[:-9])
    with pytest.raises(UserError, match=r"memory:///c/x.jsonl.zst is damaged .*expected a whole"):
        list(read_corpus(CorpusConfig("j", "jsonl", "memory://c"), Reading()))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("memory://nowhere", r"corpus 't': memory://nowhere is missing: expected a file or folder"),
        ("memory://empty", r"corpus 't': memory://empty holds no file: expected some of \*.txt"),
        ("zz://bucket/x", r"zz://bucket/x cannot be opened \(Protocol not known: zz\): expected"),
    ],
)
def test_what_can_be_wrong_with_a_url_is_one_line(memory, root, message):
    memory.pipe("/empty/x.md", b"")
    with pytest.raises(UserError, match=message) as caught:
        list(read_corpus(_corpus(root), Reading()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("protocol", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_protocol_without_its_package_names_the_extra(monkeypatch, protocol, extra):
    def missing(*_, **__):
        raise ImportError("Please install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    expected = rf"{protocol}://b cannot be opened \(Please install it\): expected pip install 'retro-jax\[{extra}\]'"
    with pytest.raises(UserError, match=expected):
        list(read_corpus(_corpus(f"{protocol}://b"), Reading()))


def test_errors_of_a_remote_file_system_are_one_line(memory, monkeypatch):
    memory.pipe("/bucket/a.txt", b"x")

    class DeniedError(Exception):
        pass

    def fails(*_, **__):
        raise DeniedError("403: no\nlong story")

    monkeypatch.setattr(type(memory), "open", fails)
    with pytest.raises(UserError, match=r"^memory:///bucket/a.txt cannot be read: 403: no$"):
        list(read_corpus(_corpus("memory://bucket"), Reading()))


def test_a_folder_is_listed_in_little_memory(tmp_path, monkeypatch):
    """No more entries than a bulk are taken from the system before the first file is given out."""
    _write_local(tmp_path)
    for i in range(50):
        (tmp_path / f"x{i:02d}.txt").write_text("x")
    taken = []
    scandir = sources.os.scandir

    class Counted:
        def __init__(self, folder):
            self._entries = scandir(folder)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._entries.close()

        def __iter__(self):
            return self

        def __next__(self):
            taken.append(None)
            return next(self._entries)

    monkeypatch.setattr(sources, "_ENTRIES", 7)
    monkeypatch.setattr(sources.os, "scandir", Counted)
    files = files_of(_corpus(str(tmp_path)))
    list(itertools.islice(files, 1))
    assert len(taken) < 25
    assert len(list(files)) == 50 + 4 - 1


def test_links_to_folders_are_not_followed(tmp_path):
    _write_local(tmp_path / "t")
    (tmp_path / "t" / "again").symlink_to(tmp_path / "t")
    assert len(list(files_of(_corpus(str(tmp_path / "t"))))) == 4
