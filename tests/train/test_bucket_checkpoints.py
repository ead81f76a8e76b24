"""Checkpoints in buckets: real S3 and GCS servers, behind networks that fail, slow down and cut."""

import dataclasses
import json
import logging
import shutil

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.storage import buckets
from retro_jax.storage.buckets import Bucket
from retro_jax.train import bucket_workdir
from retro_jax.train.bucket_checkpoints import BucketCheckpoints, fetch_seals, sealed_steps
from retro_jax.train.bucket_workdir import BucketWorkdir
from retro_jax.train.checkpoint import Checkpoints, find_damage, latest_step, restore_params
from retro_jax.train.parameter_names import named_leaves
from tests import object_stores
from tests.object_stores import Faults
from tests.train.small import Trainer

PLACE = "retro/checkpoints"


@pytest.fixture(name="trainer", scope="module")
def _trainer():
    """A trainer on 4 by 2 devices, after two steps."""
    trainer = Trainer(make_mesh(MeshConfig(data=4, fsdp=2), jax.devices()))
    trainer.run(range(2))
    return trainer


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Requests that fail are made again at once."""
    monkeypatch.setattr(buckets, "_FIRST_WAIT", 0.01)


def _at(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def _values(state):
    return {name: np.array(leaf) for name, leaf in named_leaves(state).items()}


def _assert_equal(state, expected, but=("step",)):
    for name, leaf in named_leaves(state).items():
        assert name in but or np.asarray(leaf).tobytes() == expected[name].tobytes(), name


def _open(bucket, directory, **options):
    """The checkpoints of a bucket, as a start on this host opens them."""
    fetch_seals(bucket, PLACE, directory, bucket.list(PLACE))
    return BucketCheckpoints(directory, bucket=bucket, place=PLACE, **options)


@pytest.fixture(name="other", scope="module")
def _other():
    """A trainer on two devices, both of which have all of the batch's rows."""
    return Trainer(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))


@pytest.mark.parametrize(("store", "share"), [("s3", 0.15), ("gcs", 0.1)])
def test_saved_kept_and_restored_bitwise_on_an_empty_host(trainer, other, tmp_path, store, share):
    faults = Faults(share)
    with object_stores.STORES[store](faults) as url:
        bucket = Bucket(f"{url}/runs/W")
        checkpoints = _open(bucket, tmp_path / "first", keep=2, keep_every=4)
        expected = _values(trainer.state)
        for step in range(3, 8) if store == "s3" else (4, 6, 7):
            checkpoints.save(_at(trainer.state, step))
        checkpoints.close()
        assert checkpoints.steps() == [4, 6, 7] == sealed_steps(bucket.list(PLACE))
        assert {n.split("/")[0] for n in bucket.list(PLACE)} == {"4", "6", "7"}
        assert not list((tmp_path / "first").rglob("*.bin"))  # the disk does not fill
        state = _open(bucket, tmp_path / "again").restore(other.abstract)
        assert int(state.step) == 7
        _assert_equal(state, expected)
        for name, leaf in named_leaves(state).items():
            assert leaf.sharding == named_leaves(other.abstract)[name].sharding
        step, params = restore_params(tmp_path / "again", trainer.abstract.params)
        assert step == 7
        _assert_equal({"params": params}, expected)
        # A user may copy it to a disk, and go on from there.
        fsspec.core.url_to_fs(url)[0].get(
            f"{url}/runs/W/{PLACE}/7", str(tmp_path / "disk/7"), recursive=True
        )
    assert any(faults.happened.values())
    local = Checkpoints(tmp_path / "disk")
    assert find_damage(tmp_path / "disk" / "7") is None
    _assert_equal(local.restore(other.abstract), expected)
    local.save(_at(trainer.state, 8))
    local.close()
    assert local.steps() == [7, 8]
    (largest,) = (tmp_path / "disk" / "7").rglob("*.bin")
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    assert "has other content" in find_damage(tmp_path / "disk" / "7")


def test_no_seal_no_checkpoint_and_damage_is_found_as_it_is_read(trainer, tmp_path, caplog):
    with object_stores.s3() as url:
        bucket = Bucket(f"{url}/W")
        checkpoints = _open(bucket, tmp_path / "a")
        for step in (10, 20, 30, 40):
            checkpoints.save(_at(trainer.state, step))
        checkpoints.wait()
        names = bucket.list(PLACE)
        assert sealed_steps(names) == [20, 30, 40]
        assert not any(name.startswith("10/") for name in names)
        # 40 was being written when the run was killed; of 30 one bit is another; of 20 a part is lost.
        bucket.remove(f"{PLACE}/40/sealed.json")
        (name,) = (n for n in names if n.startswith("30/") and n.endswith(".bin"))
        data = bytearray(bucket.read(f"{PLACE}/{name}"))
        data[len(data) // 2] ^= 1
        bucket.write(f"{PLACE}/{name}", bytes(data))
        again = _open(bucket, tmp_path / "b")
        with caplog.at_level(logging.WARNING):
            step, _ = restore_params(tmp_path / "b", trainer.abstract.params, all_of_it=False)
            assert step in (20, 30)  # reading renames nothing; the parameters may be whole
            assert int(again.restore(trainer.abstract).step) == 20
        assert "30 is damaged (" in caplog.text
        assert "has other content than was written" in caplog.text
        assert again.steps() == [20]
        assert bucket.read(f"{PLACE}/30.damaged/sealed.json")
        (name,) = (n for n in names if n.startswith("20/") and n.endswith(".bin"))
        bucket.remove(f"{PLACE}/{name}")
        assert "is missing" in find_damage(tmp_path / "b" / "20")
        assert _open(bucket, tmp_path / "c").restore(trainer.abstract) is None
        # The next checkpoint takes away what is left of the earlier ones.
        again.save(_at(trainer.state, 50))
        again.wait()
        assert {n.split("/")[0] for n in bucket.list(PLACE)} == {"20.damaged", "30.damaged", "50"}


def test_a_part_that_did_not_come_is_not_sealed(trainer, tmp_path, monkeypatch):
    with object_stores.s3() as url:
        bucket = Bucket(f"{url}/W")
        checkpoints = _open(bucket, tmp_path / "a")
        put = Bucket.put

        def lose(self, path, name):
            if not name.endswith(".json"):
                put(self, path, name)

        monkeypatch.setattr(Bucket, "put", lose)
        checkpoints.save(_at(trainer.state, 5))
        with pytest.raises(
            UserError, match=r"retro/checkpoints/5 lacks the part of process 0; step"
        ):
            checkpoints.wait()
        assert bucket.list(PLACE) and not checkpoints.steps()


def test_a_bucket_that_vanishes_loses_nothing(trainer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(buckets, "_TRIES", 2)
    faults = Faults(0.0, kinds=("refused",))
    with object_stores.s3(faults) as url:
        bucket = Bucket(f"{url}/W")
        checkpoints = _open(bucket, tmp_path / "a")
        checkpoints.save(_at(trainer.state, 5))
        checkpoints.wait()
        faults.share = 1.0
        for step in (6, 7):
            checkpoints.save(_at(trainer.state, step))
        expected = _values(trainer.state)
        with pytest.raises(UserError) as error:
            checkpoints.wait()
        faults.share = 0.0
        kept = tmp_path / "a" / "7.unpublished"
        assert f"step 7 is kept in {kept}: the same command on the same hosts" in str(error.value)
        assert f"{url}/W/{PLACE}/7/parts/" in str(error.value) and "\n" not in str(error.value)
        assert "6.unpublished, and training goes on" in caplog.text
        assert checkpoints.steps() == [5] and not (tmp_path / "a" / "6.unpublished").exists()
        # The same host goes on from 7; another one from 5.
        assert int(_open(bucket, tmp_path / "b").restore(trainer.abstract).step) == 5
        again = _open(bucket, tmp_path / "a")
        state = again.restore(trainer.abstract)
        assert int(state.step) == 7 and again.steps() == [5, 7] and not kept.exists()
        _assert_equal(state, expected)


def test_places_that_cannot_be_written_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_workdir, "CACHE", tmp_path)
    for store in object_stores.STORES.values():
        with store() as url:
            remote = BucketWorkdir(f"{url}-of-nobody/W", "train")
            (remote.bring() / "retro").mkdir()
            (remote.folder / "retro" / "config.gin").write_text("")
            expected = rf"{url}-of-nobody/W/retro/config.gin cannot be written: "
            with pytest.raises(UserError, match=expected), remote.following():
                raise AssertionError("not reached")
            with pytest.raises(UserError, match=rf"{url}/W is empty or not there: expected a work"):
                BucketWorkdir(f"{url}/W").bring(must_exist=True)


@pytest.mark.parametrize("store", object_stores.STORES)
def test_a_bucket_without_permission_is_named_at_once(store, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_workdir, "CACHE", tmp_path)
    monkeypatch.setattr(buckets, "_FIRST_WAIT", 60.0)  # asking again would take minutes
    with object_stores.STORES[store](Faults(1.0, kinds=(object_stores.DENIED,))) as url:
        actions = {
            "W/ cannot be read: ": lambda: BucketWorkdir(f"{url}/W").bring(),
            "W/a.json cannot be read: ": lambda: Bucket(f"{url}/W").read("a.json"),
            "W/a.json cannot be written: ": lambda: Bucket(f"{url}/W").write("a.json", b"{}"),
        }
        for message, action in actions.items():
            with pytest.raises(UserError) as error:
                action()
            assert str(error.value).startswith(f"{url}/{message}"), error.value
            assert "\n" not in str(error.value)
            assert "orbidden" in str(error.value) or "enied" in str(error.value)


def test_what_is_brought_and_what_goes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_workdir, "CACHE", tmp_path / "cache")
    with object_stores.s3() as url:
        bucket = Bucket(f"{url}/W")
        files = {
            "retro/config.gin": b"a",
            "retro/metrics.jsonl": b"{}\n",
            "retro/events.out": b"long",
            "evaluation/test.json": b"{}",
            "chunks/train/manifest.json": b"{}",
        }
        for name, data in files.items():
            bucket.write(name, data)
        remote = BucketWorkdir(f"{url}/W/")
        folder = remote.bring(must_exist=True)
        here = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert here - {".versions.json"} == {
            *("retro/config.gin", "retro/metrics.jsonl", "evaluation/test.json")
        }
        (folder / "samples").mkdir()
        (folder / "samples" / "a.json").write_text("sample")
        (folder / "report.html").write_text("page")
        remote.update()
        assert bucket.read("samples/a.json") == b"sample"
        assert bucket.read("report.html") == b"page"
        # Elsewhere the curve grew, and a result went away.
        bucket.write("retro/metrics.jsonl", b'{"step": 1}\n')
        again = BucketWorkdir(f"{url}/W")
        assert again.bring() == folder
        assert json.loads((folder / "retro/metrics.jsonl").read_text()) == {"step": 1}
        shutil.rmtree(folder)
        assert (again.bring() / "samples" / "a.json").read_text() == "sample"
        assert latest_step(folder / "retro" / "checkpoints") is None
