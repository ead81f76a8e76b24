"""Corpora at hf:// URLs, from a server that speaks the hub's file API."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from data_pipelines.corpora import CorpusConfig, Reading, files_of, read_corpus
from data_pipelines.documents import inputs
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents
from data_pipelines.evaluation.texts import SliceConfig, read_texts
from data_pipelines.questions.reader import read_questions
from retro_jax.errors import UserError
from retro_jax.storage import buckets
from tests import hub_server


def _lines(name, count):
    return "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)).encode()


def _parquet(texts):
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=5)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub():
    files = {
        "README.md": b"# A data set\n",
        "data/train-00000-of-00002.jsonl": _lines("a", 20),
        "data/more/b.jsonl": _lines("b", 20),
        "data/test.jsonl": _lines("held", 3),
        "rows/train.parquet": _parquet([f"row {i}" for i in range(12)]),
        "qa/dev.jsonl": b'{"question": "q?", "answers": ["a"]}\n',
    }
    with hub_server.hub(files) as server:
        yield server


def _read(url, kind="jsonl", **fields):
    return list(read_corpus(CorpusConfig("c", kind, url, **fields), Reading()))


def test_the_documents_of_a_repository_are_those_of_its_files(hub, tmp_path):
    for name, data in hub.files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    for kind, folder in (("jsonl", "data"), ("parquet", "rows"), ("text", "")):
        fields = {"include": ["*.md"]} if kind == "text" else {}
        here = _read(str(tmp_path / "copy" / folder), kind, **fields)
        for revision in ("", "@main"):
            there = _read(f"{hub_server.URL}{revision}/{folder}", kind, **fields)
            assert sorted(d.id for d in there) == sorted(d.id for d in here)
            assert {d.text for d in there} == {d.text for d in here} and here
    (one,) = files_of(CorpusConfig("c", "jsonl", f"{hub_server.URL}/data/more/b.jsonl"))
    assert (one.name, one.size) == ("b.jsonl", len(hub.files["data/more/b.jsonl"]))
    shards = []
    for root in (str(tmp_path / "copy"), hub_server.URL):
        corpus = CorpusConfig("c", "jsonl", f"{root}/data", exclude=["*test*"])
        stage = tmp_path / f"documents-{len(shards)}"
        manifest = prepare_documents(stage, DocumentsConfig([corpus], 0.2, 0.2))["train"]
        assert 20 < manifest.fact("documents") < 40
        shards.append([(stage / "train" / shard.name).read_bytes() for shard in manifest.shards])
    assert shards[0] == shards[1]


def test_a_change_in_the_repository_is_seen(hub):
    """huggingface_hub remembers listings for as long as a process lives."""
    corpus = CorpusConfig("c", "jsonl", f"{hub_server.URL}/data")
    before, stamps = inputs.identity_of(corpus), {f.name: f.stamp for f in files_of(corpus)}
    hub.files["data/test.jsonl"] = hub.files["data/test.jsonl"].replace(b"held 0", b"HELD 0")
    hub.files["data/new.jsonl"] = _lines("n", 1)
    after = {f.name: f.stamp for f in files_of(corpus)}
    assert {name for name in after if after[name] != stamps.get(name)} == {
        "test.jsonl",
        "new.jsonl",
    }
    assert inputs.identity_of(corpus) != before


def test_evaluation_texts_and_questions_of_a_repository(hub):
    for place in ("/data", "/data/test.jsonl"):
        texts = read_texts(SliceConfig("mine", f"{hub_server.URL}{place}"), Reading())
        assert [text.text for text in texts] == ["held 0", "held 1", "held 2"]
    rows = f"{hub_server.URL}/rows/train.parquet"  # a file is scored whatever it is called
    assert len(list(read_texts(SliceConfig("mine", rows), Reading()))) == 12
    (question,) = read_questions(f"{hub_server.URL}/qa/dev.jsonl").questions
    assert question.question == "q?"
    bucket = buckets.Bucket(f"{hub_server.URL}/data")
    sizes = {name: size for name, (size, _) in bucket.details("").items()}
    assert sizes["more/b.jsonl"] == len(hub.files["data/more/b.jsonl"])
    assert bucket.read("test.jsonl") == hub.files["data/test.jsonl"]
    assert bucket.read_range("test.jsonl", 3, 5) == hub.files["data/test.jsonl"][3:8]


def test_a_busy_hub_is_asked_again(hub):
    hub.refused = 1
    assert len(_read(f"{hub_server.URL}/data/test.jsonl")) == 3
    assert hub.refused == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://datasets/someone/other", "other is missing: .* HF_TOKEN where it is private"),
        (
            f"{hub_server.URL}/nothing",
            "someone/corpus/nothing is missing: expected a file or folder",
        ),
        (f"{hub_server.URL}@v9/data", "corpus@v9/data is missing: expected a file or folder"),
        (f"{hub_server.URL}/qa/dev.json", "qa/dev.json is missing"),
        ("hf://corpus", "hf://corpus cannot be read: .*namespace/name"),
    ],
)
def test_what_can_be_wrong_is_one_line(hub, url, message):
    with pytest.raises(UserError, match=message) as caught:
        _read(url)
    assert "\n" not in str(caught.value)


def test_a_private_repository_wants_a_token(hub, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(UserError, match=r"is missing: .* HF_TOKEN where it is private") as caught:
        _read(f"{hub_server.URL}/data")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    assert len(_read(f"{hub_server.URL}/data")) == 43
