"""Manifests and stages: complete or not there, checked when opened, never destructive."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.artefacts.manifest import (
    FORMAT_VERSION,
    RECORDS_FOLDER,
    Manifest,
    Shard,
    shard_name,
)
from data_pipelines.artefacts.stage import Stage
from retro_jax.errors import UserError
from retro_jax.storage import files


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Settings as a stage would have them."""

    size: int = 3
    names: tuple[str, ...] = ("a", "b")


NAMES = [shard_name("rows", i) for i in range(3)]


def _make(directory, settings=_Settings(), parents=None):
    stage = Stage(directory, "rows", settings, parents)
    for i, name in enumerate(NAMES):
        stage.write_array(name, np.full((2, 4), i, np.uint16), facts={"rows": 2})
    total = sum(stage.shard_facts(name)["rows"] for name in NAMES)
    return stage.finish({"rows": total}, NAMES)


def _tree(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_record_that_a_killed_process_was_writing_is_no_shard(tmp_path):
    stage = Stage(tmp_path, "rows", _Settings())
    stage.write_array("a.npy", np.zeros(2))
    (tmp_path / RECORDS_FOLDER / f"{files.TEMPORARY}1-0-b.npy.json").write_text("{")
    assert [shard.name for shard in stage.finish().shards] == ["a.npy"]
    assert sorted(_tree(tmp_path)) == ["a.npy", "manifest.json"]


def test_round_trip_and_hash(tmp_path):
    written = _make(tmp_path / "a")
    opened = Manifest.open(tmp_path / "a", "rows", verify=True)
    assert opened == written
    assert opened.hash == written.hash
    assert opened.fact("rows") == 6
    assert opened.revision == 0
    assert opened.settings == {"size": 3, "names": ["a", "b"]}
    assert opened.shard_names("rows-", ".npy") == NAMES
    assert sorted(_tree(tmp_path / "a")) == ["manifest.json", *NAMES]
    np.testing.assert_array_equal(np.load(tmp_path / "a" / NAMES[2]), np.full((2, 4), 2))
    assert _make(tmp_path / "b").hash == written.hash, "a manifest must not depend on its place"
    assert _tree(tmp_path / "a") == _tree(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"settings": {}},
        {"shards": (Shard("x", 1, "0"),)},
        {"parents": {"rows": "0"}},
        {"facts": {"rows": 7}},
        {"revision": 1},
    ],
)
def test_every_field_changes_the_hash(tmp_path, change):
    manifest = _make(tmp_path)
    assert dataclasses.replace(manifest, **change).hash != manifest.hash


def test_unknown_fact_is_one_line(tmp_path):
    with pytest.raises(UserError, match="states no 'recall': expected one of rows"):
        _make(tmp_path).fact("recall")


def test_same_settings_again_do_nothing(tmp_path):
    manifest = _make(tmp_path)
    before = _tree(tmp_path)
    stage = Stage(tmp_path, "rows", {"names": ["a", "b"], "size": 3})
    assert stage.done
    assert stage.manifest() == manifest
    assert _tree(tmp_path) == before
    with pytest.raises(ValueError, match="finished"):
        stage.write_array("rows-00000.npy", np.zeros(1))


def test_partial_stage_makes_only_what_is_missing(tmp_path):
    stage = Stage(tmp_path, "rows", _Settings())
    stage.write_array(NAMES[1], np.full((2, 4), 1, np.uint16), facts={"rows": 2})
    again = Stage(tmp_path, "rows", _Settings())
    assert not again.done
    assert again.missing(NAMES) == [NAMES[0], NAMES[2]]
    with pytest.raises(UserError, match="is unfinished"):
        Manifest.open(tmp_path, "rows")
    with pytest.raises(ValueError, match="never written"):
        again.finish({}, NAMES)


def test_a_record_without_its_shard_counts_for_nothing(tmp_path):
    stage = Stage(tmp_path, "rows", _Settings())
    stage.write_array(NAMES[0], np.zeros(3, np.uint16))
    (tmp_path / NAMES[0]).unlink()  # as if killed between record and rename
    assert stage.missing(NAMES[:1]) == NAMES[:1]


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_naming_old_and_new(tmp_path, finished):
    parent = _make(tmp_path / "parent")
    other = _make(tmp_path / "other", _Settings(size=9))
    child = tmp_path / "child"
    parents = {"text": (parent, tmp_path / "parent")}
    if finished:
        _make(child, parents=parents)
    else:
        Stage(child, "rows", _Settings(), parents).write_array(NAMES[0], np.zeros(2))
    before = _tree(child)
    with pytest.raises(UserError, match=r"size: 3 -> 4; expected the same") as caught:
        Stage(child, "rows", _Settings(size=4), parents)
    assert str(child) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r'names: \["a", "b"\] -> absent; new: absent -> 1'):
        Stage(child, "rows", {"size": 3, "new": 1}, parents)
    with pytest.raises(
        UserError, match=f'parent text: "{parent.hash[:12]}" -> "{other.hash[:12]}"'
    ):
        Stage(child, "rows", _Settings(), {"text": (other, tmp_path / "other")})
    with pytest.raises(UserError, match='kind: "rows" -> "keys"'):
        Stage(child, "keys", _Settings(), parents)
    assert _tree(child) == before, "nothing may be deleted or changed by a mismatch"


def test_nested_settings_are_named_by_their_path(tmp_path):
    Stage(tmp_path, "rows", {"tokenizer": {"size": 1, "kind": "bpe"}})
    with pytest.raises(UserError, match=r"tokenizer.size: 1 -> 2;"):
        Stage(tmp_path, "rows", {"tokenizer": {"size": 2, "kind": "bpe"}})


def test_an_unclaimed_stage_leaves_no_trace_but_refuses(tmp_path):
    stage = Stage(tmp_path / "a", "rows", {"size": 1}, claim=False)
    assert not (tmp_path / "a").exists()
    assert not stage.done
    stage.claim()
    stage.claim()
    assert sorted(_tree(tmp_path / "a")) == ["stage.json"]
    with pytest.raises(UserError, match="size: 1 -> 2;"):
        Stage(tmp_path / "a", "rows", {"size": 2}, claim=False)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'thesis.txt' but no stage.json"):
        Stage(tmp_path, "rows", _Settings())
    assert _tree(tmp_path) == {"thesis.txt": b"mine"}


def test_open_checks_presence_version_and_kind(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest.json"):
        Manifest.open(tmp_path / "none", "rows")
    _make(tmp_path)
    with pytest.raises(UserError, match="holds 'rows': expected 'keys'"):
        Manifest.open(tmp_path, "keys")
    path = tmp_path / "manifest.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(
        UserError, match=f"format version {FORMAT_VERSION + 1}: expected {FORMAT_VERSION}"
    ):
        Manifest.open(tmp_path, "rows")
    path.write_text(json.dumps(fields | {"surprise": 1}))
    with pytest.raises(UserError, match="is no manifest of format"):
        Manifest.open(tmp_path, "rows")
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="is not valid JSON"):
        Manifest.open(tmp_path, "rows")
    path.write_text("[1]")
    with pytest.raises(UserError, match="holds a list: expected a JSON object"):
        Manifest.open(tmp_path, "rows")


def test_open_checks_every_shard(tmp_path):
    _make(tmp_path)
    path = tmp_path / NAMES[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(
        UserError, match=rf"{NAMES[1]} has {len(whole) - 3} bytes: expected {len(whole)}"
    ):
        Manifest.open(tmp_path, "rows")
    path.write_bytes(b"?" + whole[1:])
    with pytest.raises(UserError, match=f"{NAMES[1]} has a bad .npy header"):
        Manifest.open(tmp_path, "rows")
    path.write_bytes(whole.replace(b"(2, 4)", b"(2, 5)"))
    with pytest.raises(
        UserError, match=r"expected 148, a C-ordered uint16 array of shape \(2, 5\)"
    ):
        Manifest.open(tmp_path, "rows")
    path.write_bytes(whole[:-1] + b"?")
    Manifest.open(tmp_path, "rows")
    with pytest.raises(UserError, match=f"{NAMES[1]} has SHA-256"):
        Manifest.open(tmp_path, "rows", verify=True)
    path.unlink()
    with pytest.raises(UserError, match=f"{NAMES[1]} is missing"):
        Manifest.open(tmp_path, "rows")


def test_open_refuses_parents_that_do_not_belong(tmp_path):
    parent, other = _make(tmp_path / "p"), _make(tmp_path / "q", _Settings(size=4))
    _make(tmp_path / "c", parents={"text": (parent, tmp_path / "p")})
    assert Manifest.open(tmp_path / "c", "rows", {"text": (parent, tmp_path / "p")})
    with pytest.raises(UserError, match="do not belong together") as caught:
        Manifest.open(tmp_path / "c", "rows", {"text": (other, tmp_path / "q")})
    assert str(tmp_path / "c") in str(caught.value)
    assert str(tmp_path / "q") in str(caught.value)
    with pytest.raises(UserError, match="was not made from any 'keys'"):
        Manifest.open(tmp_path / "c", "rows", {"keys": (parent, tmp_path / "p")})


def test_shards_written_by_other_processes_are_gathered(tmp_path):
    Stage(tmp_path / "a", "rows", _Settings())
    code = (
        "import sys, numpy as np; from data_pipelines.artefacts.stage import Stage;"
        "Stage.attach(sys.argv[1]).write_array(sys.argv[2],"
        " np.full((2, 4), int(sys.argv[3]), np.uint16), facts={'rows': 2})"
    )
    for i in (2, 0, 1):
        subprocess.run([sys.executable, "-c", code, tmp_path / "a", NAMES[i], str(i)], check=True)
    manifest = Stage(tmp_path / "a", "rows", _Settings()).finish({"rows": 6})
    assert manifest == _make(tmp_path / "b")
    with pytest.raises(UserError, match=r"stage.json is missing"):
        Stage.attach(tmp_path / "a")


def test_several_files_are_adopted_together(tmp_path):
    stage = Stage(tmp_path, "index", {})

    def write(folder):
        (folder / "tree.bin").write_bytes(b"leaves")
        np.save(folder / "codes.npy", np.arange(3))

    assert [shard.name for shard in stage.write_files(write)] == ["codes.npy", "tree.bin"]
    stage.finish()
    assert sorted(_tree(tmp_path)) == ["codes.npy", "manifest.json", "tree.bin"]
    assert Manifest.open(tmp_path, "index", verify=True).shards[1].size == 6


def begin(tmp_path):
    """A stage whose files are only right together."""
    return Stage(tmp_path / "index", "index", {"a": 1})


def test_an_artefact_is_published_whole(tmp_path):
    stage, seen = begin(tmp_path), []

    def write(folder):
        assert list(folder.iterdir()) == []
        for name in ("b.bin", "a.bin", "first.bin"):
            (folder / name).write_bytes(name.encode())
            seen.append({path.name for path in (tmp_path / "index").iterdir()})
        return ["first.bin"]

    manifest = stage.publish(write, {"rows": 3})
    assert seen == [{"stage.json"}] * 3, "nothing is in its place before all is there"
    assert [shard.name for shard in manifest.shards] == ["first.bin", "a.bin", "b.bin"]
    assert Manifest.open(tmp_path / "index", "index", verify=True) == manifest
    assert {path.name for path in tmp_path.iterdir()} == {"index"}
    assert (tmp_path / "index").stat().st_mode & 0o777 == 0o777 & ~current_umask()
    assert begin(tmp_path).publish(None, {}) == manifest


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_of_two_builders_one_build_counts(tmp_path):
    """The second one begins and ends while the first one writes."""

    def build(value, between=lambda: None):
        def write(folder):
            (folder / "codes.bin").write_bytes(value)
            between()
            (folder / "tree.bin").write_bytes(value)
            return []

        return begin(tmp_path).publish(write, {"builder": value.decode()})

    inner = []
    outer = build(b"first", lambda: inner.append(build(b"second")))
    assert outer == inner[0]
    counted = outer.facts["builder"].encode()
    for name in ("codes.bin", "tree.bin"):
        assert (tmp_path / "index" / name).read_bytes() == counted
    assert Manifest.open(tmp_path / "index", "index", verify=True) == outer
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


def test_parts_that_an_older_builder_left_are_not_taken(tmp_path):
    begin(tmp_path).write_file("codes.bin", lambda file: file.write(b"old"))
    left = tmp_path / ".tmp-index-1-ab"
    left.mkdir()

    def write(folder):
        (folder / "tree.bin").write_bytes(b"new")
        return []

    manifest = begin(tmp_path).publish(write, {})
    assert [shard.name for shard in manifest.shards] == ["tree.bin"]
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"tree.bin", "manifest.json"}
    assert not left.exists()


def test_a_build_that_fails_leaves_the_stage_as_it_was(tmp_path):
    def fails(folder):
        (folder / "tree.bin").write_bytes(b"new")
        raise ValueError("of the library")

    with pytest.raises(ValueError, match="of the library"):
        begin(tmp_path).publish(fails, {})
    assert [path.name for path in tmp_path.rglob("*")] == ["index", "stage.json"]
    with pytest.raises(UserError, match="index was made with other settings: a: 1 -> 2"):
        Stage(tmp_path / "index", "index", {"a": 2})


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    stage = Stage(tmp_path, "rows", {})

    def write(file):
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        stage.write_file("text.jsonl", write)
    with pytest.raises(RuntimeError):
        stage.write_files(lambda folder: write((folder / "x").open("wb")))
    assert sorted(_tree(tmp_path)) == ["stage.json"]


def test_an_error_of_reading_inside_a_writer_keeps_its_own_name(tmp_path):
    stage = Stage(tmp_path, "rows", {})
    with pytest.raises(FileNotFoundError, match=r"input.txt"):
        stage.write_file("x.bin", lambda file: file.write((tmp_path / "input.txt").read_bytes()))


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    stage = Stage(tmp_path, "rows", {})
    stage.write_array(NAMES[0], np.zeros(10))
    code = f"""
import resource, sys, numpy as np
from data_pipelines.artefacts.stage import Stage
from retro_jax.errors import UserError
stage = Stage.attach(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    stage.write_array({NAMES[1]!r}, np.zeros(10_000_000))
except UserError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{tmp_path / NAMES[1]} cannot be written: File too large\n"
    assert sorted(_tree(tmp_path)) == [f"{NAMES[0]}", f"{NAMES[0]}.json", "stage.json"]
    assert stage.missing(NAMES[:2]) == [NAMES[1]]


def test_a_limit_of_open_files_is_named(tmp_path):
    stage = Stage(tmp_path, "rows", {})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 1, hard))
    try:
        with pytest.raises(UserError, match=r"open files, expected a higher limit \(ulimit -n\)"):
            stage.write_array(NAMES[0], np.zeros(10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(opened[0])
    stage.write_array(NAMES[0], np.zeros(10))


def test_leftovers_of_killed_writers_go_when_the_stage_finishes(tmp_path):
    Stage(tmp_path, "rows", _Settings())
    (tmp_path / ".tmp-123-rows-00000.npy").write_bytes(b"half")
    (tmp_path / ".tmp-folder").mkdir()
    _make(tmp_path)
    assert sorted(_tree(tmp_path)) == ["manifest.json", *NAMES]
    assert not (tmp_path / ".tmp-folder").exists()


@pytest.mark.parametrize("name", ["../x.npy", ".x.npy", "a/b.npy", ""])
def test_names_stay_inside_the_directory(tmp_path, name):
    with pytest.raises(ValueError, match="is no name for a shard"):
        Stage(tmp_path, "rows", {}).write_file(name, lambda file: None)


def test_empty_arrays_can_be_mapped(tmp_path):
    stage = Stage(tmp_path, "rows", {})
    stage.write_array(NAMES[0], np.zeros((0, 64), np.uint16))
    stage.finish()
    Manifest.open(tmp_path, "rows", verify=True)
    assert np.load(tmp_path / NAMES[0], mmap_mode="r").shape == (0, 64)


@pytest.mark.parametrize(
    "change",
    [{"parents": {"chunks": 1}}, {"facts": []}, {"settings": None}, {"kind": 7}, {"revision": "0"}]
    + [{"shards": [{"name": name, "size": 1, "sha256": "a"}]} for name in (None, 3)]
    + [{"shards": [{"name": "a", "size": "1", "sha256": "a"}]}],
)
def test_values_of_other_types_are_no_manifest(tmp_path, change):
    stored = json.loads(_make(tmp_path).to_json()) | change
    with pytest.raises(UserError, match=r"place is no manifest of format 1: .* (is|are) "):
        Manifest.parse(json.dumps(stored).encode(), "place")
