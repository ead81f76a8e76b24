"""Near-duplicate chunks: how many held-out chunks occur almost verbatim in the training split.

Whole documents of that kind are withdrawn (leakage.py); the rest is counted here: licence headers,
quotations, boilerplate. Chunks are compared by the Jaccard similarity of their sets of
13-grams of tokens; candidates come from MinHash, and are compared exactly. Chunks of fewer than 13
tokens are left out.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.artefacts import mapped_arrays
from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.leakage import minhash
from data_pipelines.leakage.near_documents import LeakageConfig
from retro_jax.storage import files

KIND = "duplicates"
_FOUND = "found"
_TABLE = f"{files.TEMPORARY}held-out"
_BLOCK = 1024  # chunks sketched at once
_PAIRS = 1024  # of chunks compared at once
_NOTHING = np.uint64((1 << 64) - 1)


def prepare_duplicates(
    directory: Path,
    chunks_directory: Path,
    held_out: Mapping[str, Path],
    config: LeakageConfig,
    *,
    runner: Runner = InProcess(),
) -> Manifest:
    """Counts the near-duplicates, or what is missing of them.

    Args:
      directory: where it goes: found-00000.npy [n, 3] int64, for a shard of training chunks the
        held-out chunks that have a near-duplicate in it: (number of the split in `held_out`, chunk,
        whether one has equal tokens).
      chunks_directory: the training split's chunks.
      held_out: name of each other split -> its chunks.
      config: with a threshold.
      runner: where shards are made; the bytes do not depend on it.

    Returns:
      The manifest. Facts: chunks, training chunks of at least 13 tokens; near, those of them that are
      a near-duplicate of a held-out chunk; equal, those of the same tokens; held_out, for each split
      chunks, near and equal.
    """
    training = ChunkDatabase.open(chunks_directory)
    others = {name: ChunkDatabase.open(path) for name, path in held_out.items()}
    parents = {"chunks": (training.manifest, training.directory)}
    parents |= {name: (other.manifest, other.directory) for name, other in others.items()}
    settings = dataclasses.asdict(config) | {"gram": minhash.GRAM, "unit": "token"}
    stage = Stage(directory, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    names = [shard_name(_FOUND, i) for i in range(len(training.shards))]
    if not mapped_arrays.there(stage.directory / _TABLE, 4):
        _write_table(stage.directory / _TABLE, list(others.values()), config.sketch)
    work = DuplicatesShard(files.absolute(directory), training, tuple(others.values()), config)
    missing = [i for i, name in enumerate(names) if stage.missing([name])]
    sizes = [len(ids) for ids in training.shards]
    run_counted(runner, work, missing, sizes, what=KIND, unit="chunk")
    return stage.finish(_facts(stage, names, others), names)


@dataclasses.dataclass(frozen=True)
class DuplicatesShard:
    """Looks for near-duplicates of held-out chunks in one shard of training chunks.

    Attributes:
      directory, config: as for `prepare_duplicates`.
      training, held_out: the databases.
    """

    directory: str
    training: ChunkDatabase
    held_out: tuple[ChunkDatabase, ...]
    config: LeakageConfig

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns how many of its chunks are near-duplicates."""
        stage = Stage.attach(self.directory)
        keys, owners, places, groups = mapped_arrays.mapped(stage.directory / _TABLE, 4)
        table = minhash.BandTable(keys, owners)
        sketch, counts = self.config.sketch, {"chunks": 0, "near": 0, "equal": 0}
        near_groups = [np.zeros(0, np.int64)]
        equal_groups = [np.zeros(0, np.int64)]
        for _, tokens in _blocks(self.training, self.training.shards[index], report):
            counts["chunks"] += len(tokens)
            rows, weights = np.unique(tokens, axis=0, return_counts=True)
            sets = _sets(rows, self.training.pad_id)
            pairs = self._similar(table.candidates(_bands(sets, sketch)), sets, places)
            counts["near"] += int(weights[np.unique(pairs[:, 0])].sum())
            same = (rows[pairs[:, 0]] == self._tokens(places[pairs[:, 1]])).all(1)
            counts["equal"] += int(weights[np.unique(pairs[same, 0])].sum())
            near_groups.append(pairs[:, 1])
            equal_groups.append(pairs[same, 1])
        near, equal = (np.unique(np.concatenate(parts)) for parts in (near_groups, equal_groups))
        firsts, lasts = (np.searchsorted(groups[:, 2], near, side) for side in ("left", "right"))
        rows = np.concatenate(
            [np.zeros(0, np.int64), *(np.arange(a, b) for a, b in zip(firsts, lasts))]
        )
        matches = np.concatenate([groups[rows, :2], np.isin(groups[rows, 2:], equal)], axis=1)
        matches = matches[np.lexsort((matches[:, 1], matches[:, 0]))]
        stage.write_array(shard_name(_FOUND, index), matches, counts)
        return counts["near"]

    def _similar(self, pairs: np.ndarray, sets: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Those pairs of (a row of `sets`, a distinct held-out chunk) that are similar enough."""
        results = [np.zeros((0, 2), np.int64)]
        pad_id = self.training.pad_id
        assert self.config.threshold is not None
        for first in range(0, len(pairs), _PAIRS):
            part = pairs[first : first + _PAIRS]
            theirs = _sets(self._tokens(places[part[:, 1]]), pad_id)
            similar = jaccard_rows(sets[part[:, 0]], theirs) >= self.config.threshold
            results.append(part[similar])
        return np.concatenate(results)

    def _tokens(self, places: np.ndarray) -> np.ndarray:
        """[n, 64] tokens of held-out chunks at places [n, 2]."""
        rows = np.zeros((len(places), CHUNK_LENGTH), np.int32)
        for number, database in enumerate(self.held_out):
            mask = places[:, 0] == number
            rows[mask] = database.chunks(places[mask, 1])
        return rows


def jaccard_rows(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n] similarity of sets [n, m] and [n, m] uint64, each without repeats; the largest is nothing."""
    there = one != _NOTHING
    common = ((one[:, :, None] == other[:, None, :]).any(2) & there).sum(1)
    either = there.sum(1) + (other != _NOTHING).sum(1) - common
    return common / np.maximum(either, 1)


def _sets(tokens: np.ndarray, pad_id: int) -> np.ndarray:
    """[n, 52] uint64: the distinct 13-grams of chunks [n, 64], ascending, then nothing."""
    hashes = minhash.gram_hashes(minhash.token_numbers(tokens))
    hashes[(tokens == pad_id)[:, minhash.GRAM - 1 :]] = _NOTHING
    hashes.sort(axis=1)
    again = np.zeros(hashes.shape, bool)
    again[:, 1:] = hashes[:, 1:] == hashes[:, :-1]
    hashes[again] = _NOTHING
    hashes.sort(axis=1)
    return hashes


def _bands(sets: np.ndarray, sketch: minhash.Sketch) -> np.ndarray:
    """[n, bands] of sets [n, 52]."""
    lengths = (sets != _NOTHING).sum(1)
    return sketch(row[:length] for row, length in zip(sets, lengths))


def _blocks(
    database: ChunkDatabase, ids: range, report: Callable[[int], object] = silent
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids [n] and tokens [n, 64] of the chunks with a 13-gram."""
    for first in range(ids.start, ids.stop, _BLOCK):
        block = np.arange(first, min(first + _BLOCK, ids.stop))
        tokens = database.chunks(block)
        long = tokens[:, minhash.GRAM - 1] != database.pad_id
        yield block[long], tokens[long]
        report(len(block))


def _write_table(
    path: pathlib.Path, databases: list[ChunkDatabase], sketch: minhash.Sketch
) -> None:
    """Writes the bands of all distinct held-out chunks, the place of each, and the set of each chunk.

    The last array is [chunks, 3] int64: database, chunk, and the number of its distinct tokens, by
    which it is sorted.
    """
    bands = [np.zeros((0, sketch.bands), np.uint64)]
    numbers: dict[bytes, int] = {}
    places: list[tuple[int, int]] = []
    groups: list[tuple[int, int, int]] = []
    for number, database in enumerate(databases):
        for ids, tokens in _blocks(database, range(len(database))):
            new = []
            for row, (chunk, chunk_tokens) in enumerate(zip(ids.tolist(), tokens)):
                key = chunk_tokens.tobytes()
                if key not in numbers:
                    numbers[key] = len(numbers)
                    places.append((number, chunk))
                    new.append(row)
                groups.append((number, chunk, numbers[key]))
            bands.append(_bands(_sets(tokens[new], database.pad_id), sketch))
    table = minhash.BandTable.of(np.concatenate(bands))
    shapes = ((places, 2), (groups, 3))
    rows = (np.array(values, np.int64).reshape(-1, width) for values, width in shapes)
    of_places, of_groups = rows
    of_groups = of_groups[np.argsort(of_groups[:, 2], kind="stable")]
    mapped_arrays.write(path, (table.keys, table.owners, of_places, of_groups))


def _facts(stage: Stage, names: list[str], others: Mapping[str, ChunkDatabase]) -> dict[str, Any]:
    """What the manifest states, from the shards' facts and what they found."""
    shards = [stage.shard_facts(name) for name in names]
    empty = np.zeros((0, 3), np.int64)
    matches = np.concatenate([empty, *(np.load(stage.directory / name) for name in names)])
    groups = mapped_arrays.mapped(stage.directory / _TABLE, 4)[3]
    held_out = {}
    for number, name in enumerate(others):
        subset = matches[matches[:, 0] == number]
        held_out[name] = {
            "chunks": int((groups[:, 0] == number).sum()),
            "near": len(np.unique(subset[:, 1])),
            "equal": len(np.unique(subset[subset[:, 2] == 1, 1])),
        }
    keys = ("chunks", "near", "equal")
    return {key: sum(shard[key] for shard in shards) for key in keys} | {"held_out": held_out}
