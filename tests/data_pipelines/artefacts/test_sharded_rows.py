"""Rows of many shards: the same as of one array, with no file open, within a bound of maps."""

import gc
import os
import pathlib

import numpy as np
import pytest

from data_pipelines.artefacts import mapped_files
from data_pipelines.artefacts.sharded_rows import ShardedRows, header_of
from retro_jax.errors import UserError

SIZES = [3, 0, 7, 90, 1]


def written(folder, dtype, inner, sizes=SIZES, seed=0):
    """Shards of random rows: their paths, and all rows."""
    rng, paths, parts = np.random.default_rng(seed), [], []
    for i, size in enumerate(sizes):
        parts.append((1000 * rng.random((size, *inner))).astype(dtype))
        paths.append(folder / f"{np.dtype(dtype).name}-{seed}-{i}.npy")
        np.save(paths[-1], parts[-1])
    return paths, np.concatenate(parts)


@pytest.mark.parametrize(
    ("dtype", "inner"), [("<u2", (64,)), ("<i4", ()), ("<f4", (12,)), ("<i8", (4,))]
)
def test_rows_are_those_of_one_array(tmp_path, dtype, inner):
    paths, whole = written(tmp_path, dtype, inner)
    shards = ShardedRows(paths)
    assert len(shards) == len(whole) == 101
    assert shards.bounds.tolist() == [0, 3, 3, 10, 100, 101]
    assert shards.shapes == [(size, *inner) for size in SIZES]
    ids = np.random.default_rng(1).integers(-1, len(whole), 300)
    rows = np.full((300, *inner), 7, np.int64)
    expected = rows.copy()
    expected[ids >= 0] = whole[ids[ids >= 0]]
    shards.gather(ids, rows)
    np.testing.assert_array_equal(rows, expected)
    if inner:
        few = np.zeros((300, 3), whole.dtype)
        shards.gather(ids, few)
        np.testing.assert_array_equal(few[ids >= 0], whole[ids[ids >= 0]][:, :3])


def test_parts_of_other_widths_are_joined(tmp_path):
    (one, narrow), (two, wide) = (
        written(tmp_path, t, (), seed=i) for i, t in enumerate(("i4", "i8"))
    )
    both = ShardedRows.joined([ShardedRows(one), ShardedRows(two)])
    ids = np.random.default_rng(1).permutation(202)
    rows = np.empty(202, np.int64)
    both.gather(ids, rows)
    np.testing.assert_array_equal(rows, np.concatenate([narrow, wide])[ids])
    both.gather(np.full(202, -1), rows)  # nothing to fill
    assert len(ShardedRows([])) == 0


def open_files() -> int:
    """Files that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def test_no_file_stays_open_and_nothing_is_mapped_before_the_need(tmp_path):
    paths, whole = written(tmp_path, "u2", (64,), [2] * 300)
    gc.collect()
    files, maps = open_files(), len(mapped_files.mapped())
    shards = ShardedRows(paths)
    assert len(mapped_files.mapped()) == maps
    rows = np.empty((600, 64), np.int32)
    shards.gather(np.arange(600), rows)
    np.testing.assert_array_equal(rows, whole)
    assert open_files() <= files
    assert len(mapped_files.mapped()) == maps + 300
    del shards
    gc.collect()
    assert len(mapped_files.mapped()) == maps


def test_beyond_the_bound_the_first_ones_are_unmapped(tmp_path, monkeypatch, caplog):
    paths, whole = written(tmp_path, "i8", (4,), [5] * 40)
    gc.collect()
    bound = len(mapped_files.mapped()) + 6
    monkeypatch.setattr(mapped_files, "most_maps", lambda: bound)
    monkeypatch.setattr(mapped_files, "_warned", [])
    shards, ids = ShardedRows(paths), np.random.default_rng(0).permutation(200)
    for first in range(0, 200, 4):
        part = ids[first : first + 4]
        rows = np.empty((4, 4), np.int64)
        shards.gather(part, rows)
        np.testing.assert_array_equal(rows, whole[part])
        assert len(mapped_files.mapped()) <= bound
    assert caplog.text.count("three quarters of vm.max_map_count") == 1


def test_files_that_are_not_what_they_were_are_one_line(tmp_path):
    paths, _ = written(tmp_path, "u2", (64,))
    shards, rows = ShardedRows(paths), np.empty((1, 64), np.uint16)
    pathlib.Path(paths[3]).write_bytes(b"short")
    with pytest.raises(UserError, match=r"uint16-0-3.npy has 5 bytes: expected \d+$"):
        shards.gather(np.array([50]), rows)
    paths[3].unlink()
    with pytest.raises(UserError, match=r"uint16-0-3.npy cannot be mapped \(No such file"):
        shards.gather(np.array([50]), rows)
    with pytest.raises(UserError, match=r"uint16-0-3.npy cannot be read .*: expected a shard"):
        ShardedRows(paths)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.ones((2, 3))))
    with pytest.raises(ValueError, match="expected a C-ordered array, found float64"):
        header_of(tmp_path / "fortran.npy")
