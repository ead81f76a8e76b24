"""--workdir=s3://B/W in every command of a trained run; tests/launch/test_train.py trains there."""

import json
import shutil

import fsspec
import pytest

from launch import compare, evaluate, prepare, report, sample, train, tune
from retro_jax.storage import buckets
from retro_jax.storage.buckets import Bucket
from retro_jax.train import bucket_workdir
from tests import object_stores
from tests.launch.trained import call


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """This host's disk, and its patience."""
    monkeypatch.setattr(bucket_workdir, "CACHE", tmp_path / "brought")
    monkeypatch.setattr(buckets, "_FIRST_WAIT", 0.01)


def test_evaluated_sampled_and_reported_from_the_bucket_alone(
    workdir, evaluated, prepared_workdir, tmp_path
):
    """The run was copied there, with its data."""
    with object_stores.s3() as url:
        files, _ = fsspec.core.url_to_fs(url)
        files.put(str(prepared_workdir), f"{url}/W", recursive=True)
        files.put(str(workdir / "retro"), f"{url}/W/retro", recursive=True)
        where, bucket = f"--workdir={url}/W", Bucket(f"{url}/W")
        before = set(bucket.list(""))
        assert call(evaluate.main, where, "--retrieval=on,off") == 0
        result = json.loads(bucket.read("evaluation/test.json"))
        expected = evaluated["on"]["all"]["bits_per_byte"]
        assert result["on"]["all"]["bits_per_byte"] == expected
        shutil.rmtree(tmp_path / "brought")
        assert call(compare.main, where, f"--other={url}/W", "--other_condition=off") == 0
        assert "evaluation/test-on-against-W-off.json" in bucket.list("")
        assert call(sample.main, where, "--prompt=The ", "--max_tokens=8") == 0
        assert call(report.main, where) == 0
        assert b"The " in bucket.read("report.html")
        new = {name.split("/")[0] for name in set(bucket.list("")) - before}
        assert new == {"evaluation", "samples", "report.html"}


def test_bad_places_are_one_line(workdir, prepared_workdir, capsys):
    settings = f"--gin_file={workdir.parent / 'tiny.gin'}"
    with object_stores.s3() as url:
        flags, nobody = [f"--data={prepared_workdir}", settings], f"{url}-of-nobody/W"
        assert call(train.main, f"--workdir={nobody}", *flags) == 1
        assert f"error: {nobody}/retro/config.gin cannot be written: " in capsys.readouterr().err
        assert call(report.main, f"--workdir={nobody}") == 1
        assert f"error: {nobody} is empty or not there" in capsys.readouterr().err
        assert call(train.main, f"--workdir={url}/W", f"--mirror={url}/M", *flags) == 2
        assert "--mirror: expected none with a --workdir in a bucket" in capsys.readouterr().err
        for main in (prepare.main, tune.main):
            assert call(main, f"--workdir={url}/W") == 2
            expected = f"error: --workdir={url}/W: expected a directory; train, evaluate, compare,"
            assert expected in capsys.readouterr().err
