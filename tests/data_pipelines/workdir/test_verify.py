"""launch.prepare --verify: passes what is whole, and names what is not; opening refuses it too."""

import json
import shutil

import numpy as np
import pytest

from data_pipelines.artefacts.manifest import FORMAT_VERSION, Manifest
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from data_pipelines.workdir import verify as module
from data_pipelines.workdir.stages import ALL_STAGES
from retro_jax.errors import UserError
from tests.conftest_prepared import run_prepare

_ALL = [place for name, stage in ALL_STAGES.items() for place in stage.places if name != "bm25"]
_AGAIN = [f"{kind}/{split} again" for split in SPLITS for kind in ("chunks", "keys", "neighbours")]
_AGAIN.append("leakage again")


@pytest.fixture
def workdir(prepared_workdir, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(prepared_workdir, tmp_path / "W")


def verified(capsys, workdir, *flags):
    """Status, the printed checks by name, and the error."""
    status = run_prepare(workdir, None, "--verify", *flags)
    out, error = capsys.readouterr()
    assert error.count("\n") == (1 if status else 0), error
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    lines.pop("token_memory", None)  # there where another test needed it
    return status, lines, error


def rewrite(folder, **changes):
    """Changes fields of a manifest."""
    fields = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(fields | changes))


def flip(path, place=-5):
    """Flips a bit of one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 64
    path.write_bytes(data)


def test_prints_every_check_of_a_whole_workdir(prepared_workdir, capsys):
    status, lines, _ = verified(capsys, prepared_workdir, "--verify_sample=20", "--verify_seed=1")
    assert status == 0
    assert sorted(lines) == sorted([*_ALL, *_AGAIN])
    assert "made from documents/train and tokenizer" in lines["chunks/train"]
    assert "made from keys/train" in lines["index"]
    assert lines["keys/validation again"].startswith("20 chunks embedded, largest difference ")
    assert lines["neighbours/test again"].startswith("20 chunks searched, equal; recall ")
    assert not any("WRONG" in line for line in lines.values())


@pytest.mark.parametrize(
    "name",
    [
        "documents/train/documents-00000.jsonl",
        "tokenizer/tokenizer.model",
        "chunks/test/documents.jsonl",
        "chunks/train/chunks-00000.npy",
        "keys/train/keys-00000.npy",
        "index/chunk-ids.npy",
        "neighbours/validation/scores-00000.npy",
        "token_memory/order-00000.npy",
    ],
)
def test_a_flipped_byte_is_named(workdir, name):
    place = name.rpartition("/")[0]
    if place == "token_memory":
        prepare_and_open(open_database(workdir))
    module.check_files(workdir, place, module.places()[place])
    flip(workdir / name)
    with pytest.raises(UserError, match=f"{workdir / name} has SHA-256 .*: expected") as caught:
        module.check_files(workdir, place, module.places()[place])
    assert "\n" not in str(caught.value)


def test_goes_on_after_what_is_wrong_and_ends_with_a_line(workdir, capsys):
    flip(workdir / "keys" / "test" / "keys-00000.npy")
    flip(workdir / "neighbours" / "train" / "neighbours-00000.npy", -8)
    status, lines, error = verified(capsys, workdir, "--verify_sample=0")
    assert status == 1
    wrong = {name for name, line in lines.items() if line.startswith("WRONG: ")}
    assert wrong == {"keys/test", "neighbours/train"}
    assert sorted(lines) == sorted([*_ALL, *_AGAIN])
    assert error.startswith(f"error: {workdir}/keys/test/keys-00000.npy has SHA-256")
    assert error.endswith("(and 1 more)\n")


def test_a_missing_shard_is_named(workdir, capsys):
    path = workdir / "chunks" / "train" / "chunks-00001.npy"
    path.unlink()
    with pytest.raises(UserError, match=f"{path} is missing: expected a shard"):
        ChunkDatabase.open(workdir / "chunks" / "train")
    status, lines, error = verified(capsys, workdir, "--verify_sample=0")
    assert status == 1
    assert f"{path} is missing" in lines["chunks/train"]
    assert f"{path} is missing" in error


def test_a_swapped_parent_is_named(workdir, capsys):
    for kind in ("chunks", "keys"):
        shutil.rmtree(workdir / kind / "train")
        shutil.copytree(workdir / kind / "validation", workdir / kind / "train")
    with pytest.raises(UserError, match="do not belong together"):
        Retriever.open(workdir)
    status, lines, error = verified(capsys, workdir, "--verify_sample=0")
    assert status == 1
    assert "documents/train do not belong together" in lines["chunks/train"]
    assert f"{workdir}/index and {workdir}/keys/train do not belong together" in lines["index"]
    assert f"error: {workdir}/chunks/train and {workdir}/documents/train do not belong" in error


def test_a_manifest_of_a_newer_version_is_named(workdir, capsys):
    rewrite(workdir / "index", format_version=FORMAT_VERSION + 1)
    newer = f"{workdir}/index/manifest.json has format version {FORMAT_VERSION + 1}: expected"
    with pytest.raises(UserError, match=newer):
        Retriever.open(workdir)
    status, lines, error = verified(capsys, workdir, "--verify_sample=0")
    assert status == 1
    assert newer in lines["index"]
    assert newer in error


def test_what_was_not_computed_from_its_parents_is_named(workdir):
    """Files that agree with their manifests may still hold something else."""
    module.check_chunks(workdir, "train", 1000, 0)
    manifest = Manifest.read(workdir / "chunks" / "train")
    for name in manifest.shard_names("chunks-"):
        rows = np.load(workdir / "chunks" / "train" / name)
        np.save(workdir / "chunks" / "train" / name, rows[::-1])
    with pytest.raises(UserError, match="are not those of its text"):
        module.check_chunks(workdir, "train", 1000, 0)
    keys = workdir / "keys" / "test" / "keys-00000.npy"
    module.check_keys(workdir, "test", 10, 0)
    np.save(keys, -np.load(keys))
    with pytest.raises(UserError, match=r"keys/test: the key of chunk \d+ is not that of its text"):
        module.check_keys(workdir, "test", 10, 0)


def test_neighbours_that_the_index_does_not_find_are_named(workdir):
    folder = workdir / "neighbours" / "validation"
    module.check_neighbours(workdir, "validation", 20, 0)
    ids = np.load(folder / "neighbours-00000.npy")
    np.save(folder / "neighbours-00000.npy", np.roll(ids, 1, axis=0))
    with pytest.raises(UserError, match="its ids are at"):
        module.check_neighbours(workdir, "validation", 1000, 0)
    np.save(folder / "neighbours-00000.npy", ids)
    scores = np.load(folder / "scores-00000.npy")
    np.save(folder / "scores-00000.npy", scores * 1.01)
    with pytest.raises(UserError, match="searching again finds"):
        module.check_neighbours(workdir, "validation", 1000, 0)


def test_nothing_there_is_one_line(tmp_path, capsys):
    status, lines, error = verified(capsys, tmp_path)
    assert (status, lines) == (1, {})
    assert "holds no finished stage: expected what launch.prepare makes" in error
