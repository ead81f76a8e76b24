"""A corpus that changed after it was read is refused, and the message says what changed."""

import contextlib
import json
import pathlib
import shutil

import fsspec
import pytest

from data_pipelines.corpora import CorpusConfig, sources
from data_pipelines.documents import documents, inputs
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents
from retro_jax.errors import UserError
from tests import object_stores
from tests.data_pipelines.small import documents_config, tree, write_texts


@pytest.fixture
def prepared(tmp_path):
    """A folder of texts, and the documents that were made of it."""
    write_texts(tmp_path / "b", 30)
    config = documents_config(tmp_path / "b")
    prepare_documents(tmp_path / "out", config)
    return tmp_path, config


def _same_size(path: pathlib.Path) -> None:
    """Another first byte."""
    data = path.read_bytes()
    path.write_bytes(b"9" + data[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: _same_size(b / "text-004.txt"), "has other bytes in 'text-004.txt'; expected"),
        (lambda b: (b / "new.txt").write_text("more"), "also has 'new.txt' and had 30 files of"),
        (lambda b: (b / "text-004.txt").unlink(), "lacks 'text-004.txt' and had 30 files of"),
        (lambda b: (b / "text-004.txt").rename(b / "z.txt"), "lacks 'text-004.txt' and also has"),
    ],
)
def test_what_changed_is_said(prepared, change, message):
    folder, config = prepared
    before = tree(folder / "out")
    change(folder / "b")
    with pytest.raises(UserError, match=rf"out was made of other files: corpus 'b' {message}"):
        prepare_documents(folder / "out", config)
    assert tree(folder / "out") == before


def test_another_folder_of_the_same_last_name_is_refused_and_a_copy_is_not(prepared):
    folder, _ = prepared
    write_texts(folder / "else" / "b", 30, seed=1)
    with pytest.raises(UserError, match="was made of other files: corpus 'b' has other bytes in"):
        prepare_documents(folder / "out", documents_config(folder / "else" / "b"))
    shutil.copytree(folder / "b", folder / "copy" / "b")
    copy = documents_config(folder / "copy" / "b")
    assert prepare_documents(folder / "out", copy)["train"].fact("documents") > 10


def test_a_corpus_that_is_gone_is_said_and_accepted(prepared, caplog):
    folder, config = prepared
    shutil.rmtree(folder / "b")
    prepare_documents(folder / "out", config)
    assert f"not compared with {folder / 'out'}: corpus 'b': " in caplog.text


def test_documents_of_a_version_without_the_record_are_accepted(prepared):
    folder, config = prepared
    (folder / "out" / inputs.INPUTS_FILE).unlink()
    _same_size(folder / "b" / "text-004.txt")
    prepare_documents(folder / "out", config)
    assert not (folder / "out" / inputs.INPUTS_FILE).exists()


def test_a_change_between_two_splits_is_refused(tmp_path, monkeypatch):
    write_texts(tmp_path / "b", 30)
    config = documents_config(tmp_path / "b")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(documents, "run_counted", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_documents(tmp_path / "out", config)
    _same_size(tmp_path / "b" / "text-004.txt")
    with pytest.raises(UserError, match=r"has other bytes in 'text-004.txt'"):
        prepare_documents(tmp_path / "out", config)


def test_a_change_while_it_is_read_is_refused(tmp_path, monkeypatch):
    write_texts(tmp_path / "b", 30)
    read = documents.read_corpora

    def read_and_change(*arguments):
        done = read(*arguments)
        (tmp_path / "b" / "text-030.txt").write_text("came late")
        return done

    monkeypatch.setattr(documents, "read_corpora", read_and_change)
    with pytest.raises(
        UserError, match=r"also has 'text-030.txt' .* expected none to change while"
    ):
        prepare_documents(tmp_path / "out", documents_config(tmp_path / "b"))
    assert not (tmp_path / "out" / "train").exists()
    monkeypatch.undo()
    prepare_documents(tmp_path / "out", documents_config(tmp_path / "b"))


def test_a_sample_of_a_large_corpus_bounds_the_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_SAMPLED_FILES", 5)
    monkeypatch.setattr(inputs, "_BLOCK_BYTES", 16)
    write_texts(tmp_path / "b", 30)
    (tmp_path / "b" / "text-000.txt").write_bytes(bytes(5000))
    corpus = CorpusConfig("b", "text", str(tmp_path / "b"))
    first = inputs.identity_of(corpus)
    assert len(first["contents"]) == 5
    assert (first["files"], first["bytes"]) == (
        30,
        sum(path.stat().st_size for path in (tmp_path / "b").iterdir()),
    )
    large = CorpusConfig("b", "text", str(tmp_path / "b" / "text-000.txt"))
    before = inputs.identity_of(large)
    (tmp_path / "b" / "text-000.txt").write_bytes(bytes(4999) + b"1")
    assert inputs.identity_of(large) != before, "the end of a file is among its blocks"
    (tmp_path / "b" / "more.txt").write_text("more")
    with pytest.raises(UserError, match=r"corpus 'b' (?!lacks).*had 30 files .* has 31 files"):
        inputs.refuse_changes(tmp_path, {"b": first}, {"b": inputs.identity_of(corpus)}, "no")


def test_a_file_in_a_bucket_is_known_by_the_hash_that_is_stated_there(tmp_path):
    with object_stores.s3() as bucket:
        system = fsspec.filesystem("s3", use_listings_cache=False)
        for i in range(30):
            system.pipe_file(f"{bucket}/b/text-{i:03d}.txt", f"text number {i} of all".encode())
        config = DocumentsConfig((CorpusConfig("b", "text", f"{bucket}/b"),))
        prepare_documents(tmp_path / "out", config)
        system.copy(
            f"{bucket}/b/text-004.txt", f"{bucket}/b/text-004.txt", MetadataDirective="REPLACE"
        )
        prepare_documents(tmp_path / "out", config)
        system.pipe_file(f"{bucket}/b/text-004.txt", b"text NUMBER 4 of all")
        with pytest.raises(UserError, match=r"corpus 'b' has other bytes in 'text-004\.txt'; exp"):
            prepare_documents(tmp_path / "out", config)
        # A record of an earlier version has sizes alone, and only these are compared.
        path = tmp_path / "out" / inputs.INPUTS_FILE
        record = json.loads(path.read_text())
        contents = record["corpora"]["b"]["contents"]
        for name, content in contents.items():
            contents[name] = content.split(":")[0]
        path.write_text(json.dumps(record))
        prepare_documents(tmp_path / "out", config)
        system.pipe_file(f"{bucket}/b/text-004.txt", b"longer")
        with pytest.raises(
            UserError, match=r"corpus 'b' has other bytes in 'text-004\.txt' and had"
        ):
            prepare_documents(tmp_path / "out", config)


@pytest.mark.parametrize(
    ("stated", "content"),
    [
        ({"md5Hash": "kAFQmDzST7DWlj99KOF/cg=="}, "md5:900150983cd24fb0d6963f7d28e17f72"),
        ({"ETag": '"900150983cd24fb0d6963f7d28e17f72"'}, "md5:900150983cd24fb0d6963f7d28e17f72"),
        ({"ETag": '"900150983cd24fb0d6963f7d28e17f72-2"'}, ""),  # of parts: their sizes change it
        ({"etag": "0x8DB", "LastModified": "today"}, ""),
        ({"blob_id": "a" * 40, "mtime": 3.0}, f"git:{'a' * 40}"),
        ({"created": "today"}, ""),
    ],
)
def test_only_hashes_of_bytes_are_taken(stated, content):
    assert sources.content_hash(stated) == content


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("5:md5:aa", "5:md5:aa", True),
        ("5:md5:aa", "5:md5:bb", False),
        ("5:md5:aa", "5:git:bb", True),  # copied to another store: sizes are compared
        ("5:md5:aa", "5", True),  # sent again in several parts
        ("5", "6:md5:aa", False),
        ("5:aa", "5:bb", False),  # files of this machine
        ("5:aa", "5:md5:bb", False),
    ],
)
def test_hashes_of_two_stores_are_not_compared(before, now, same):
    sizes = {"files": 1, "bytes": 5, "names": "0"}
    identities = [{"b": sizes | {"contents": {"x.txt": content}}} for content in (before, now)]
    with contextlib.nullcontext() if same else pytest.raises(UserError, match=r"bytes in 'x\.txt'"):
        inputs.refuse_changes(pathlib.Path("W"), *identities, "it")
