"""What a power cut does to temporary files of the documents stage is an error, never fewer documents."""

import os
import pathlib
import shutil

import pytest

from data_pipelines.corpora import SPLITS
from data_pipelines.documents import documents
from data_pipelines.documents.documents import prepare_documents
from retro_jax.errors import UserError
from tests.data_pipelines.small import documents_config, tree, write_texts


@pytest.fixture
def cut_off(tmp_path, monkeypatch):
    """A documents stage that ended after it had read everything; its folder and settings."""
    write_texts(tmp_path / "b", 60)
    config = documents_config(tmp_path / "b")

    def power_cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(documents, "plan_shards", power_cut)
        with pytest.raises(KeyboardInterrupt):
            prepare_documents(tmp_path / "out", config)
    return tmp_path / "out", config


def _refused(out, config, message):
    with pytest.raises(UserError, match=message):
        prepare_documents(out, config)
    assert not any((out / split).exists() for split in SPLITS)


@pytest.mark.parametrize("end", [".rows", ".lines", ".contents"])
def test_a_truncated_file_is_named(cut_off, end):
    out, config = cut_off
    run = next((out / ".spill/b").glob(f"portion-*/run-00000{end}"))
    data = run.read_bytes()
    if end == ".contents":  # this corpus keeps duplicates
        run.write_bytes(data + b"x")
    else:
        run.write_bytes(data[: len(data) // 2])
    there, were = run.stat().st_size, len(data)
    _refused(
        out, config, rf"{run} is damaged \({there} bytes where {were} were written\): expected"
    )


def test_zeros_in_place_of_lines_are_named(cut_off):
    out, config = cut_off
    run = next((out / ".spill/b").glob("portion-*/run-00000.lines"))
    run.write_bytes(bytes(run.stat().st_size))
    with pytest.raises(UserError, match=rf"{run} is damaged \(a line that ends too early\)"):
        prepare_documents(out, config)
    assert not any((out / split / "manifest.json").exists() for split in SPLITS)


@pytest.mark.parametrize("ends", [(".json",), (".lines", ".rows", ".contents", ".json")])
def test_a_missing_file_is_an_error(cut_off, ends):
    out, config = cut_off
    run = next((out / ".spill/b").glob("portion-*/run-00000.lines"))
    for end in ends:
        run.with_suffix(end).unlink()
    message = r"is damaged \(no such file\)" if len(ends) == 1 else "expected the 60 that were read"
    _refused(out, config, message)


def test_removing_what_the_message_names_is_enough(cut_off, tmp_path):
    out, config = cut_off
    run = next((out / ".spill/b").glob("portion-*/run-00000.rows"))
    run.write_bytes(b"")
    _refused(out, config, f"remove {run.parent} and run again")
    shutil.rmtree(run.parent)
    prepare_documents(out, config)
    prepare_documents(tmp_path / "whole", config)
    assert tree(out) == tree(tmp_path / "whole")


def test_files_are_on_the_disk_before_their_folder_has_its_name(tmp_path, monkeypatch):
    write_texts(tmp_path / "b", 60)
    synced, rename = set(), pathlib.Path.rename
    fsync = os.fsync

    def noted(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def checked(path, target):
        if path.is_dir():
            written = {str(file) for file in path.glob("run-*")}
            assert len(written) >= 4
            assert written | {str(path)} <= synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(pathlib.Path, "rename", checked)
    prepare_documents(tmp_path / "out", documents_config(tmp_path / "b"))
    assert str(tmp_path / "out/.spill/b") in synced


def test_counts_that_do_not_add_up_are_an_error(tmp_path):
    reading = {"b": {"documents": 200, "duplicates": 3, "beyond_limit": 0, "empty": 7}}
    assert documents.check_counts(tmp_path, reading, 197) == 200
    message = "of 200 documents that were read 100 are kept and 3 left out: expected that to be all"
    with pytest.raises(UserError, match=message):
        documents.check_counts(tmp_path, reading, 100)
