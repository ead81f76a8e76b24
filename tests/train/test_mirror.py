"""retro_jax/train/mirror.py: what a start takes from the bucket."""

import hashlib

import pytest

from data_pipelines.artefacts.bucket_copy import Bucket
from retro_jax.storage import files
from retro_jax.train import mirror
from retro_jax.train.checkpoint import FORMAT_VERSION, SEAL, find_damage, latest_step


def _checkpoint(checkpoints, step):
    """A sealed checkpoint of one file."""
    text = f"arrays of {step}".encode()
    path = checkpoints / str(step) / "default" / "arrays"
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    sealed = {"default/arrays": [len(text), hashlib.sha256(text).hexdigest()]}
    seal = {"format_version": FORMAT_VERSION, "arrays": {}, "files": sealed}
    files.write_atomically(checkpoints / str(step) / SEAL, files.to_json(seal))
    return path


@pytest.mark.parametrize(
    ("here", "damaged", "brought"),
    [
        ([], [], 20),
        ([10], [], 20),
        ([20], [], None),
        ([30], [], None),  # newer than the bucket's
        ([10, 20], [20], 20),  # a good copy replaces the damaged newest
        ([20, 30], [30], None),  # the one before it is as new as the bucket's
        ([20, 30], [20, 30], 20),
    ],
)
def test_the_newest_undamaged_checkpoint_of_both_is_used(tmp_path, here, damaged, brought):
    run, bucket = tmp_path / "retro", tmp_path / "bucket" / "retro"
    for step in (10, 20):
        _checkpoint(bucket / "checkpoints", step)
    (bucket / "metrics.jsonl").write_text("{}\n")
    for step in here:
        path = _checkpoint(run / "checkpoints", step)
        if step in damaged:
            path.write_bytes(b"x")
    line = mirror.fetch(run, Bucket(f"file://{tmp_path}/bucket"))
    assert line == (
        f"{run}: brought step {brought} back from file://{tmp_path}/bucket" * bool(brought)
    )
    newest = latest_step(run / "checkpoints")
    assert newest == (brought or 20 if damaged else max([*here, brought or 0]))
    assert find_damage(run / "checkpoints" / str(newest)) is None
    aside = sorted(p.name for p in (run / "checkpoints").glob("*.damaged"))
    assert aside == [f"{step}.damaged" for step in damaged]
