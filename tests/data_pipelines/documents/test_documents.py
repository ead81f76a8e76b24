"""The documents stage: stable splits and selections, reproducible shards, nothing lost."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys

import pytest

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.corpora import CorpusConfig
from data_pipelines.corpora.document import content_id
from data_pipelines.documents import external_sort, reading, selection
from data_pipelines.documents.documents import (
    DocumentsConfig,
    KnownDocuments,
    prepare_documents,
    read_documents,
    split_of,
    stable_hash,
)
from retro_jax.errors import UserError
from tests.data_pipelines.small import documents_config, tree, write_texts


def _all(directory):
    documents = {}
    for split in ("train", "validation", "test"):
        manifest = Manifest.open(directory / split, "documents", verify=True)
        documents[split] = list(read_documents(directory / split, manifest))
    return documents


def splits(directory):
    """The files of every split, without the record of what was read."""
    return {name: data for name, data in tree(directory).items() if "/" in name}


@pytest.fixture
def texts(tmp_path):
    write_texts(tmp_path / "b", 60)
    write_texts(tmp_path / "a", 40, seed=1)
    return tmp_path / "b", tmp_path / "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpora": []}, "corpora is .*: expected at least one"),
        (
            {"corpora": [CorpusConfig("c", "stdlib")] * 2},
            "corpora is .*: expected a name of its own for each",
        ),
        (
            {"corpora": [CorpusConfig("c", "stdlib", split="test")]},
            "corpora is .*: expected a corpus that is not put",
        ),
        ({"validation": 1.0}, "validation is 1.0: expected a share from 0 to 1"),
        ({"validation": 0.5, "test": 0.5}, r"test is 0.5: expected validation \+ test less than 1"),
        ({"shard_bytes": 0}, "shard_bytes is 0: expected a positive number"),
        ({"sort_bytes": 0}, "sort_bytes is 0: expected a positive number"),
    ],
)
def test_config_errors(settings, message):
    with pytest.raises(UserError, match=f"DocumentsConfig.{message}"):
        DocumentsConfig(**({"corpora": [CorpusConfig("c", "stdlib")]} | settings))


def test_nothing_is_lost_and_everything_is_in_order(tmp_path, texts):
    manifests = prepare_documents(tmp_path / "out", documents_config(*texts))
    documents = _all(tmp_path / "out")
    expected = {(f.name, p.name): p.read_text() for f in texts for p in f.iterdir()}
    found = {(d.corpus, d.id): d.text for docs in documents.values() for d in docs}
    assert found == expected
    assert len(expected) == 100
    for split, docs in documents.items():
        keys = [(d.corpus, stable_hash(d.id, "order")) for d in docs]
        assert keys == sorted(keys)
        assert all(split_of(d.id, validation=0.1, test=0.1) == split for d in docs)
        shards = manifests[split].fact("shards")
        assert sum(shard["documents"] for shard in shards) == len(docs)
        assert manifests[split].fact("documents") == len(docs)
    assert len(documents["train"]) > 60
    assert documents["validation"]
    assert documents["test"]
    assert len(manifests["train"].shards) > 4, "the test should see several shards"
    assert not (tmp_path / "out" / ".spill").exists()


def test_shards_hold_one_corpus_and_end_at_their_size(tmp_path, texts):
    manifest = prepare_documents(tmp_path / "out", documents_config(*texts))["train"]
    for shard, fact in zip(manifest.shards, manifest.fact("shards"), strict=True):
        lines = (tmp_path / "out" / "train" / shard.name).read_bytes().splitlines(keepends=True)
        assert {json.loads(line)["corpus"] for line in lines} == {fact["corpus"]}
        assert len(lines) == fact["documents"]
        assert sum(map(len, lines)) == fact["bytes"] == shard.size
        assert shard.size <= 8000 or len(lines) == 1


def test_reading_order_memory_and_place_do_not_show(tmp_path, texts):
    prepare_documents(tmp_path / "one", documents_config(*texts))
    lines = [json.dumps({"id": p.name, "text": p.read_text()}) for p in texts[0].iterdir()]
    wanted = None
    for seed, sort_bytes in ((0, 1000), (1, 1 << 20)):
        random.Random(seed).shuffle(lines)
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "b.jsonl").write_text("\n".join(lines))
        corpus = CorpusConfig("b", "jsonl", str(folder / "b.jsonl"), id_field="id")
        prepare_documents(folder / "out", DocumentsConfig([corpus], sort_bytes=sort_bytes))
        wanted = wanted or splits(folder / "out")
        assert splits(folder / "out") == wanted
    shutil.copytree(texts[0], tmp_path / "elsewhere" / "b")
    shutil.copytree(texts[1], tmp_path / "elsewhere" / "a")
    moved = documents_config(tmp_path / "elsewhere" / "a", tmp_path / "elsewhere" / "b")
    prepare_documents(tmp_path / "two", moved)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_splits_are_stable_for_ever():
    """These must never change: somebody's test documents would become training documents."""
    ids = ["argparse.py", "Zoroastrianism", "text-003.txt", "é", "x.jsonl:8", "b/c.txt", "a", "q"]
    shares = {"validation": 0.3, "test": 0.3}
    golden = ["validation", "train", "train", "validation", "test", "test", "train", "test"]
    assert [split_of(i, **shares) for i in ids] == golden
    assert stable_hash("argparse.py", "order").hex() == "228d23185f5925b1f367eaa57c6a7783"


def test_a_growing_share_takes_from_train_only():
    ids = [f"document {i}" for i in range(3000)]
    before = [split_of(i, validation=0.1, test=0.1) for i in ids]
    after = [split_of(i, validation=0.2, test=0.3) for i in ids]
    assert all(old in ("train", new) for old, new in zip(before, after, strict=True))
    assert abs(before.count("test") / 3000 - 0.1) < 0.02
    assert abs(after.count("validation") / 3000 - 0.2) < 0.02


def _selected(tmp_path, folder, **limits):
    corpus = CorpusConfig("b", "text", str(folder), **limits)
    out = tmp_path / "-".join(f"{k}{v}" for k, v in limits.items())
    prepare_documents(out, DocumentsConfig([corpus], validation=0.1, test=0.1))
    reading = Manifest.open(out / "train", "documents").fact("reading")["b"]
    return {d.id: d.text for docs in _all(out).values() for d in docs}, reading


def test_selections_are_stable_and_nested(tmp_path, texts):
    every = {p.name: p.read_text() for p in texts[0].iterdir()}
    order = sorted(every, key=lambda name: stable_hash(name, "order"))
    for count in (5, 30):
        selected, reading = _selected(tmp_path, texts[0], max_documents=count)
        assert set(selected) == set(order[:count])
        assert reading["documents"] == 60
        assert reading["beyond_limit"] == 60 - count
    sizes = [len(every[name].encode()) for name in order]
    for limit in (sum(sizes[:7]), sum(sizes[:7]) + 1, sum(sizes[:8]) - 1):
        selected, _ = _selected(tmp_path, texts[0], max_bytes=limit)
        assert set(selected) == set(order[:7])
    both, _ = _selected(tmp_path, texts[0], max_documents=100, max_bytes=10**9)
    assert both == every


def test_exact_duplicates_go_by_a_setting(tmp_path, texts):
    kept, reading = _selected(tmp_path, texts[0], drop_duplicates=True)
    assert reading["duplicates"] == 1
    assert len(kept) == 59
    first = min(["text-000.txt", "text-001.txt"], key=lambda name: stable_hash(name, "order"))
    assert {"text-000.txt", "text-001.txt"} & set(kept) == {first}
    limited, reading = _selected(tmp_path, texts[0], drop_duplicates=True, max_documents=50)
    assert len(limited) == 50
    assert reading["beyond_limit"] == 9


@pytest.mark.parametrize("settings", [{}, {"drop_duplicates": True}])
def test_without_ids_equal_texts_are_one_document_wherever_they_are(tmp_path, settings):
    texts = [f"text {i} of some words" for i in range(50)] + ["text 7 of some words"] * 3
    wanted = None
    for seed, sort_bytes in ((0, 1000), (1, 1 << 20)):
        random.Random(seed).shuffle(texts)
        folder = tmp_path / f"{seed}" / "lines"
        folder.mkdir(parents=True)
        for half in range(2):
            lines = [json.dumps({"text": text}) for text in texts[half::2]]
            (folder / f"{half}.jsonl").write_text("\n".join(lines))
        corpus = CorpusConfig("j", "jsonl", str(folder), **settings)
        config = DocumentsConfig([corpus], sort_bytes=sort_bytes)
        manifests = prepare_documents(folder.parent / "out", config)
        wanted = wanted or splits(folder.parent / "out")
        assert splits(folder.parent / "out") == wanted
        counts = manifests["train"].fact("reading")["j"]
        assert (counts["documents"], counts["duplicates"]) == (53, 3)
    documents = [d for docs in _all(tmp_path / "0" / "out").values() for d in docs]
    assert sorted(d.text for d in documents) == sorted(set(texts))
    assert all(d.id == content_id(d.text) for d in documents)
    assert manifests["train"].settings["corpora"]["j"]["ids"] == "content"


def test_duplicates_are_dropped_across_labels_too(tmp_path):
    lines = [json.dumps({"text": f"text {i % 9}", "kind": f"k{i % 2}"}) for i in range(36)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    place = str(tmp_path / "x.jsonl")
    for drop, count in ((None, 18), (True, 9)):
        corpus = CorpusConfig("j", "jsonl", place, label_field="kind", drop_duplicates=drop)
        out = tmp_path / str(count)
        manifests = prepare_documents(out, DocumentsConfig([corpus], validation=0, test=0))
        documents = [d for docs in _all(out).values() for d in docs]
        assert len(documents) == len({(d.corpus, d.text) for d in documents}) == count
        assert len({d.text for d in documents}) == 9
        assert manifests["train"].fact("reading")["j"]["duplicates"] == 36 - count


def test_code_drops_duplicates_and_a_corpus_can_be_put_into_one_split(tmp_path, texts):
    write_texts(tmp_path / "code", 30)
    corpora = [
        CorpusConfig("code", "stdlib", str(tmp_path / "code"), include=["*"]),
        CorpusConfig("b", "text", str(texts[0]), split="validation"),
    ]
    prepare_documents(tmp_path / "out", DocumentsConfig(corpora))
    documents = _all(tmp_path / "out")
    assert sum(d.corpus == "b" for d in documents["validation"]) == 60
    assert sum(d.corpus == "code" for docs in documents.values() for d in docs) == 29


def test_two_documents_of_one_id_are_an_error_until_they_are_corrected(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"id": i % 9, "text": f"text {i}"}) for i in range(10)]
    path.write_text("\n".join(lines))
    config = DocumentsConfig([CorpusConfig("j", "jsonl", str(path), id_field="id")])
    with pytest.raises(
        UserError, match="corpus 'j' has two documents '0': expected an id of its own"
    ):
        prepare_documents(tmp_path / "out", config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".spill"]
    path.write_text("\n".join(lines[:9]))
    prepare_documents(tmp_path / "out", config)
    assert sum(map(len, _all(tmp_path / "out").values())) == 9


def _repeating(tmp_path, **settings):
    """Two files of 40 documents, in which every fifth id of the first is there again."""
    folder = tmp_path / "repeating"
    folder.mkdir()
    first = [{"id": f"d{i}", "text": f"first text {i}"} for i in range(20)]
    second = [{"id": f"d{i}", "text": f"other text {i}"} for i in range(0, 100, 5)]
    for name, lines in (("a.jsonl", first), ("b.jsonl", second)):
        (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return CorpusConfig("j", "jsonl", str(folder), id_field="id", **settings)


@pytest.mark.parametrize("sort_bytes", [1000, 1 << 20])
def test_the_first_of_a_repeated_id_is_kept_and_the_rest_counted(tmp_path, monkeypatch, sort_bytes):
    corpus = _repeating(tmp_path, repeated_ids="keep_first")
    monkeypatch.setattr(reading, "_PORTION_FILES", 1)
    manifests = prepare_documents(
        tmp_path / "out", DocumentsConfig([corpus], sort_bytes=sort_bytes)
    )
    found = {d.id: d.text for docs in _all(tmp_path / "out").values() for d in docs}
    assert len(found) == sum(m.fact("documents") for m in manifests.values()) == 36
    assert {found[f"d{i}"] for i in range(20)} == {f"first text {i}" for i in range(20)}
    assert found["d95"] == "other text 95"
    counts = manifests["train"].fact("reading")["j"]
    assert (counts["documents"], counts["repeated_ids"], counts["duplicates"]) == (40, 4, 0)
    assert manifests["train"].settings["corpora"]["j"]["repeated_ids"] == "keep_first"


def test_a_repeated_id_is_named_with_its_lines_and_kept_without_reading_again(
    tmp_path, monkeypatch
):
    corpus = _repeating(tmp_path)
    with pytest.raises(UserError, match=r"has two documents 'd\d+': expected .*own") as error:
        prepare_documents(tmp_path / "out", DocumentsConfig([corpus]))
    number = int(str(error.value).split("'d")[1].split("'")[0])
    folder = tmp_path / "repeating"
    places = f"{folder}/a.jsonl:{number + 1} and {folder}/b.jsonl:{number // 5 + 1}"
    assert f"(see {places}); CorpusConfig.repeated_ids = 'keep_first' takes" in str(error.value)
    monkeypatch.setattr(reading, "read_file", None)
    kept = dataclasses.replace(corpus, repeated_ids="keep_first")
    prepare_documents(tmp_path / "out", DocumentsConfig([kept]))
    assert sum(map(len, _all(tmp_path / "out").values())) == 36


def test_a_repeated_id_of_one_label_is_named(tmp_path):
    lines = [{"id": i % 3, "text": f"text {i}", "kind": "ab"[i % 2]} for i in range(5)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [*lines, lines[1] | {"text": "y"}]))
    corpus = CorpusConfig("j", "jsonl", str(path), id_field="id", label_field="kind")
    with pytest.raises(UserError, match=rf"corpus 'j-b' has .* '1': .*see {path}:2 and {path}:6"):
        prepare_documents(tmp_path / "out", DocumentsConfig([corpus]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeated_ids": "skip"}, r"repeated_ids is 'skip': expected one of \('refuse', 'keep_"),
        (
            {"repeated_ids": "keep_first", "drop_duplicates": True},
            "repeated_ids is 'keep_first': expected 'refuse' where duplicates are dropped",
        ),
    ],
)
def test_settings_of_repeated_ids_are_checked(settings, message):
    with pytest.raises(UserError, match=f"CorpusConfig.{message}"):
        CorpusConfig("c", "jsonl", "x", **settings)


def test_a_wrong_path_is_told_before_anything_is_read(tmp_path, texts):
    typo = CorpusConfig("z", "text", str(tmp_path / "typo"))
    config = documents_config(*texts)
    config = dataclasses.replace(config, corpora=(*config.corpora, typo))
    with pytest.raises(UserError, match="typo is missing"):
        prepare_documents(tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    prepare_documents(tmp_path / "out", documents_config(*texts))
    prepare_documents(tmp_path / "whole", documents_config(*texts))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def interrupted(tmp_path, config, monkeypatch, *, at):
    """Stops in the portion that is read `at`-th, of seven files each."""
    monkeypatch.setattr(reading, "_PORTION_FILES", 7)
    whole, calls = reading.read_file, []

    def stops(corpus, file, counts):
        calls.append(file.name)
        if len(calls) == 7 * at:
            raise KeyboardInterrupt
        return whole(corpus, file, counts)

    with monkeypatch.context() as patched:
        patched.setattr(reading, "read_file", stops)
        with pytest.raises(KeyboardInterrupt):
            prepare_documents(tmp_path, config)
    monkeypatch.setattr(
        reading, "read_file", lambda *some: calls.append(some[1].name) or whole(*some)
    )
    return calls


def test_reading_goes_on_at_the_portion_it_was_in(tmp_path, texts, monkeypatch):
    config = documents_config(*texts)
    prepare_documents(tmp_path / "whole", config)
    calls = interrupted(tmp_path / "out", config, monkeypatch, at=4)
    prepare_documents(tmp_path / "out", config)
    assert len(calls) == 4 * 7 + 100 - 3 * 7, "three portions were not read again"
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("change", ["file", "settings"])
def test_reading_begins_again_where_it_would_be_another(tmp_path, texts, monkeypatch, change):
    config = documents_config(*texts)
    calls = interrupted(tmp_path / "out", config, monkeypatch, at=2)
    if change == "file":
        (texts[1] / "text-003.txt").write_text("corrected since, and of another length")
    else:
        config = dataclasses.replace(config, validation=0.2)
    prepare_documents(tmp_path / "out", config)
    assert len(calls) == 2 * 7 + 100
    prepare_documents(tmp_path / "whole", config)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_full_disk_while_reading_is_one_line(tmp_path, texts):
    code = """
import pathlib, resource, sys
from data_pipelines.documents.documents import prepare_documents
from retro_jax.errors import UserError
from tests.data_pipelines.small import documents_config
folder = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
try:
    prepare_documents(folder / "out", documents_config(folder / "b"))
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    place = tmp_path / "out" / ".spill" / "b"
    assert run.stdout == f"{place} cannot be written: File too large\n"
    assert not list(place.glob("portion-*"))


def test_no_training_document_is_an_error(tmp_path):
    (tmp_path / "t").mkdir()
    name = next(
        f"{i}.txt" for i in range(100) if split_of(f"{i}.txt", validation=0, test=0.5) == "test"
    )
    (tmp_path / "t" / name).write_text("alone")
    with pytest.raises(UserError, match="no document of t is in the training split"):
        prepare_documents(
            tmp_path / "out", documents_config(tmp_path / "t", validation=0, test=0.5)
        )


def test_bad_documents_are_counted_in_the_facts(tmp_path, texts):
    (texts[0] / "bad.txt").write_bytes(b"\xff\xfe")
    (texts[0] / "blank.txt").write_bytes(b"\n\n")
    with pytest.raises(UserError, match=r"bad.txt has byte 0xff at offset 0"):
        prepare_documents(tmp_path / "out", documents_config(*texts))
    manifest = prepare_documents(
        tmp_path / "out", documents_config(*texts, skip_bad_documents=True)
    )["test"]
    counts = manifest.fact("reading")["b"]
    assert counts["bad"] == 1
    assert counts["empty"] == 1
    assert counts["documents"] == 60
    assert str(tmp_path) not in manifest.to_json().decode()


def test_again_does_nothing_and_other_settings_are_refused(tmp_path, texts):
    config = documents_config(*texts)
    first = prepare_documents(tmp_path / "out", config)
    before = tree(tmp_path / "out")
    shutil.rmtree(texts[0])  # a finished stage does not even read its corpora
    assert prepare_documents(tmp_path / "out", config) == first
    other = dataclasses.replace(config, test=0.2)
    with pytest.raises(
        UserError, match=r"test: 0.1 -> 0.2; expected the same, or another directory"
    ):
        prepare_documents(tmp_path / "out", other)
    fewer = dataclasses.replace(config.corpora[0], max_documents=3)
    with pytest.raises(UserError, match=r"corpora.b.max_documents: null -> 3;"):
        prepare_documents(
            tmp_path / "out", dataclasses.replace(config, corpora=(fewer, config.corpora[1]))
        )
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("half", ["hash", "the same for all"])
def test_known_documents_are_recognised_by_their_names(tmp_path, texts, monkeypatch, half):
    """Also where hashes of all ids collide: equal hashes are only a reason to look."""
    if half != "hash":
        monkeypatch.setattr(selection, "_half", lambda name: 0)
        plain = external_sort._halves
        monkeypatch.setattr(external_sort, "_halves", lambda data: (0, sum(plain(data)) % 2**64))
    config = documents_config(*texts)
    names = [("a", f"text-{i:03d}.txt") for i in range(30)] + [("c", "text-050.txt")]
    numbered = ((number, name) for number, (_, name) in enumerate(names))
    known = KnownDocuments(numbered, names.__getitem__, {})
    manifests = prepare_documents(tmp_path / "out", config, known=known)
    found = {(d.corpus, d.id) for docs in _all(tmp_path / "out").values() for d in docs}
    everything = {(f.name, p.name) for f in texts for p in f.iterdir()}
    assert found == everything - set(names)
    reading = manifests["train"].fact("reading")
    assert (reading["a"]["known"], reading["b"]["known"]) == (30, 0)


def test_shards_are_larger_where_there_would_be_too_many(tmp_path, monkeypatch):
    """By what is kept of a corpus, not by what was read of it."""
    write_texts(tmp_path / "a", 60)
    whole = prepare_documents(tmp_path / "many", documents_config(tmp_path / "a", shard_bytes=100))
    monkeypatch.setattr(selection, "MOST_SHARDS", 8)
    few = prepare_documents(tmp_path / "few", documents_config(tmp_path / "a", shard_bytes=100))
    assert len(few["train"].shards) < 12 < len(whole["train"].shards)
    corpus = dataclasses.replace(documents_config(tmp_path / "a").corpora[0], max_bytes=900)
    config = dataclasses.replace(
        documents_config(tmp_path / "a", shard_bytes=100), corpora=(corpus,)
    )
    limited = prepare_documents(tmp_path / "limited", config)
    assert len(limited["train"].shards) > 2
