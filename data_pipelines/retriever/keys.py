"""Chunks to keys: one path from tokens to vectors, for the database's keys and for queries alike.

    tokens [n, 64] --tokeniser--> text --WordPiece--> BERT --> [n, d] --rounded to the stored dtype

A chunk's text is what its tokens decode to; where a chunk cuts a character, that is U+FFFD, which
WordPiece drops. A chunk without any word piece (a lone eos, padding, white space) has no key: a row of
NaN, which is neither indexed nor used as a query.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, ClassVar, SupportsIndex

import grain
import ml_dtypes
import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.opened_once import opened_once
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.sharded_rows import ShardedRows, write_header
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.retriever.bert import load_bert
from data_pipelines.retriever.embedder import PACKAGED_MODELS, BertFolder, Embedder, WordPieces
from data_pipelines.retriever.prefixes import NO_PREFIXES, Prefixes
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "keys"
GIVEN = "given:"  # before the name of a model that made keys elsewhere (given_keys.py)
# Chunks embedded together, sorted by length. Not a setting: the last bits of a key depend on it.
BLOCK = 1024
# The form of keys on the disk; bfloat16 as the integers of its bits, which every NumPy can map.
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
}
_COUNTS = ("keys", "positions", "truncated", "computed")


@dataclasses.dataclass(frozen=True)
class KeysConfig:
    """How keys are made.

    Attributes:
      model: a packaged BERT ("minilm") or a Hugging Face folder; "given:NAME" for keys that the caller
        computed and wrote (data_pipelines/retriever/given_keys.py).
      dtype: "float32", or "bfloat16" for half the bytes.
      query_prefix: text before each chunk that is searched for, such as "query: "; None for what a
        folder of sentence-transformers states as its prompt, "" for none.
      passage_prefix: text before each chunk of the database, such as "passage: ", in the same way.
    """

    model: str = "minilm"
    dtype: str = "float32"
    query_prefix: str | None = None
    passage_prefix: str | None = None

    def __post_init__(self) -> None:
        require(self.dtype in _STORED, self, "dtype", f"one of {tuple(_STORED)}")

    @property
    def folder(self) -> str | None:
        """The model's folder; None for a packaged one."""
        return None if self.model in PACKAGED_MODELS or self.is_given else self.model

    @property
    def is_given(self) -> bool:
        """Whether keys are not made here."""
        return self.model.startswith(GIVEN)

    def open(self) -> BertFolder:
        """The model with its prefixes; errors as for BertFolder.open, and where keys are given."""
        if self.is_given:
            raise UserError(
                f"KeysConfig.model is {self.model!r}: no model is here to embed other texts, expected"
                " keys of all that is compared"
            )
        model = BertFolder.open(self.model)
        stated = {"query": self.query_prefix, "passage": self.passage_prefix}
        given = {name: prefix for name, prefix in stated.items() if prefix is not None}
        return dataclasses.replace(model, prefixes=dataclasses.replace(model.prefixes, **given))


class ChunkEncoder:
    """The one path from a chunk's tokens to its key.

    Attributes:
      dimension: d.
    """

    def __init__(
        self, tokenizer: Tokenizer, embedder: Embedder, dtype: str, prefix: str = ""
    ) -> None:
        self._tokenizer, self._embedder, self._dtype = tokenizer, embedder, dtype
        self.dimension, self._prefix = embedder.dimension, prefix

    def pieces(self, tokens: np.ndarray) -> WordPieces:
        """The word pieces of chunks [n, 64], after those of the prefix."""
        texts = [self._tokenizer.decode(row) for row in tokens]
        return self._prefixed(texts, self._embedder.word_piece.encode)

    def _prefixed(
        self, texts: list[str], encode: Callable[[Sequence[str]], WordPieces]
    ) -> WordPieces:
        """Word pieces of texts; none of a text without any, whatever is put before it."""
        pieces = encode(texts)
        if not self._prefix:
            return pieces
        has_text = (pieces.lengths > 0).tolist()
        return encode([self._prefix + t if there else "" for t, there in zip(texts, has_text)])

    def stored(self, pieces: WordPieces) -> tuple[np.ndarray, int]:
        """Keys [n, d] as they are stored, and how many positions BERT computed for them."""
        vectors, computed = self._embedder.embed_pieces(pieces)
        if self._dtype == "bfloat16":
            return vectors.astype(ml_dtypes.bfloat16).view(np.uint16), computed
        return vectors, computed

    def keys(self, tokens: np.ndarray) -> np.ndarray:
        """Keys of chunks [n, 64] as [n, d] float32, rounded as stored ones; NaN without text.

        The same ones as `pieces` and `stored` give; a few texts need no TensorFlow.
        """
        texts = [self._tokenizer.decode(row) for row in tokens]
        return as_float32(
            self.stored(self._prefixed(texts, self._embedder.word_piece.encode_few))[0]
        )

    def counts(self, pieces: WordPieces) -> dict[str, int]:
        """Chunks with text, positions of their word pieces, and how many were too long."""
        limit = self._embedder.model.max_length
        lengths = pieces.lengths[pieces.lengths > 0] + 2
        return {
            "keys": len(lengths),
            "positions": int(np.minimum(lengths, limit).sum()),
            "truncated": int((lengths > limit).sum()),
        }


def as_float32(stored: np.ndarray) -> np.ndarray:
    """Stored keys as float32."""
    if stored.dtype == np.uint16:
        return stored.view(ml_dtypes.bfloat16).astype(np.float32)
    return np.asarray(stored, np.float32)


def prepare_keys(
    directory: Path,
    chunks_directory: Path,
    tokenizer_directory: Path,
    config: KeysConfig,
    *,
    role: str = "passage",
    runner: Runner = InProcess(),
) -> Manifest:
    """Embeds every chunk of a database, or what is missing.

    An interrupted run resumes at its last block of 1,024 chunks.

    Args:
      directory: where the keys go, one shard for each chunk shard.
      chunks_directory: the chunk database.
      tokenizer_directory: the tokeniser it was made with.
      config: the model and the stored precision.
      role: "passage" for a database's keys, "query" for those of chunks that it is searched for.
      runner: where shards are made; the bytes do not depend on it.

    Returns:
      The manifest. Facts: chunks; keys (chunks with text); positions of word pieces; padding, the
      share of computed positions beyond those; truncated, texts longer than the model reads.

    Raises:
      UserError: no such model, parents that do not belong together, or a directory made with other
        settings.
    """
    database = ChunkDatabase.open(chunks_directory)
    tokenizer = Tokenizer.open(tokenizer_directory)
    parents = {"tokenizer": (tokenizer.manifest, tokenizer_directory)}
    Manifest.open(chunks_directory, "chunks", parents)
    model = config.open()
    settings = {"embedder": model.identity, "dtype": config.dtype}
    if model.prefixes.settings:
        settings["prefix"] = getattr(model.prefixes, role)
    parents = {"chunks": (database.manifest, chunks_directory)}
    stage = Stage(directory, KIND, settings, parents, claim=False)
    if stage.done:
        return stage.manifest()
    load_bert(model.folder)  # a model that cannot be read is refused before its name is on the disk
    stage.claim()
    names = [shard_name(KIND, i) for i in range(len(database.shards))]
    missing = [i for i, name in enumerate(names) if stage.missing([name])]
    work = KeyShard(
        files.absolute(directory),
        files.absolute(chunks_directory),
        files.absolute(tokenizer_directory),
        files.absolute(model.folder),
        model.name,
        model.prefixes,
    )
    sizes = [len(ids) for ids in database.shards]
    run_counted(runner, work, missing, sizes, what="keys", unit="chunk")
    sums = _sums([stage.shard_facts(name) for name in names])
    computed = sums.pop("computed")
    padding = 1 - sums["positions"] / computed if computed else 0.0
    shape = {"chunks": len(database), "dimension": model.config.hidden_size}
    return stage.finish(shape | sums | {"padding": padding}, names)


class Keys:
    """The keys of a chunk database, read from memory maps; row i is chunk i's.

    Attributes:
      directory, manifest: where they are from.
      database: the chunks.
      dimension: d.
    """

    def __init__(self, directory: Path, manifest: Manifest, database: ChunkDatabase) -> None:
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.database = database
        self.dimension: int = manifest.fact("dimension")
        names = manifest.shard_names(f"{KIND}-", ".npy")
        self._shards = ShardedRows([self.directory / name for name in names])
        dtype = _STORED[manifest.settings["dtype"]]
        shapes = self._shards.shapes
        for name, shape in zip(names, shapes, strict=True):
            if self._shards.dtype != dtype or shape[1:] != (self.dimension,):
                raise UserError(
                    f"{self.directory / name} holds {self._shards.dtype} of shape {shape}: expected "
                    f"{dtype} of [n, {self.dimension}]"
                )
        if [shape[0] for shape in shapes] != [len(ids) for ids in database.shards]:
            raise UserError(
                f"{self.directory} holds keys of {len(self)} chunks: expected one "
                f"for each of the {len(database)} of {database.directory}"
            )

    @classmethod
    def open(cls, directory: Path, database: ChunkDatabase, *, verify: bool = False) -> "Keys":
        """Opens the keys of a database.

        Raises:
          UserError: none there, damaged, or those of another database.
        """
        parents = {"chunks": (database.manifest, database.directory)}
        return cls(directory, Manifest.open(directory, KIND, parents, verify), database)

    def __reduce__(self) -> tuple[Callable[..., "Keys"], tuple[str, Manifest, ChunkDatabase]]:
        """Pickles by its place, so that worker processes map the files themselves."""
        return Keys, (files.absolute(self.directory), self.manifest, self.database)

    @property
    def model(self) -> str:
        """What made them: a model's name, or given:NAME."""
        return str(self.manifest.settings["embedder"]["model"])

    @property
    def are_given(self) -> bool:
        """Whether the caller computed them, by a model that is not here."""
        return self.model.startswith(GIVEN)

    def __len__(self) -> int:
        """Chunks, with text or without."""
        return len(self._shards)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """[n, d] float32 keys of chunks `ids` [n]; NaN for a chunk without text."""
        return as_float32(self.stored(ids))

    def stored(self, ids: np.ndarray) -> np.ndarray:
        """[n, d] keys of chunks `ids` [n] as they are on the disk: bfloat16 as the integers of its bits."""
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"chunk {ids.min()} or {ids.max()} of {len(self)} in {self.directory}")
        rows = np.empty((len(ids), self.dimension), _STORED[self.manifest.settings["dtype"]])
        self._shards.gather(ids, rows)
        return rows

    def blocks(
        self, size: int = BLOCK, within: range | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids [n] and keys [n, d] float32 of all chunks with text, or of those within a range."""
        every = range(len(self)) if within is None else within
        for start in range(every.start, every.stop, size):
            ids = np.arange(start, min(start + size, every.stop))
            rows = self.rows(ids)
            has_text = ~np.isnan(rows[:, 0])
            yield ids[has_text], rows[has_text]


class KeysOf:
    """The keys of some chunks as the exact search reads them (`exact.KeyRows`)."""

    def __init__(self, keys: Keys, ids: range | np.ndarray) -> None:
        """Takes keys and the ids of chunks, ascending."""
        self._keys, self._ids = keys, ids

    def __len__(self) -> int:
        """Chunks, with text or without."""
        return len(self._ids)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """[n, d] float32; NaN for a chunk without text."""
        return self._keys.rows(self.ids(places))

    def documents(self, places: np.ndarray) -> np.ndarray:
        """[n] document numbers; -1 for a removed one."""
        return self._keys.database.live_documents(self.ids(places))

    def ids(self, places: np.ndarray) -> np.ndarray:
        """[...] int64 chunk ids at places [...]; -1 for -1."""
        ids = self._ids
        at = np.maximum(places, 0)
        numbers = ids.start + at if isinstance(ids, range) else ids[at]
        return np.where(places < 0, -1, numbers)


class BlockSource(grain.sources.RandomAccessDataSource):
    """Grain's view of a range of chunk ids: element i is the i-th block of them, [n] int64."""

    def __init__(self, ids: range, size: int = BLOCK) -> None:
        self._ids, self._size = ids, size

    def __len__(self) -> int:
        """Blocks."""
        return -(-len(self._ids) // self._size)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        """The ids of one block."""
        start = int(index) * self._size
        ids = self._ids[start : start + self._size]
        return np.arange(ids.start, ids.stop)


def iterate(blocks: grain.MapDataset) -> Iterator[Any]:
    """The blocks of a Grain pipeline in order, one made ahead by a thread.

    One is enough: decoding and WordPiece take a fiftieth of BERT's time.
    """
    iterator = iter(blocks.to_iter_dataset(grain.ReadOptions(1, 1)))
    try:
        yield from iterator
    finally:
        iterator.close()


@dataclasses.dataclass(frozen=True)
class KeyShard:
    """Makes one shard of keys of one chunk shard, block by block.

    Attributes:
      directory, chunks_directory, tokenizer_directory: as for `prepare_keys`.
      model_folder, model_name, prefixes: of the BERT.
    """

    directory: str
    chunks_directory: str
    tokenizer_directory: str
    model_folder: str
    model_name: str
    prefixes: Prefixes = NO_PREFIXES

    wants_accelerator: ClassVar[bool] = True

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`, each block to the disk before the next; returns its number of rows."""
        stage, name = Stage.attach(self.directory), shard_name(KIND, index)
        try:
            return self._make(stage, index, report)
        except (UserError, OSError):
            # A worker that was taken for dead may finish a shard, and clear up, while another is at it.
            if stage.missing([name]):
                raise
            return len(np.load(stage.directory / name, mmap_mode="r"))

    def _make(self, stage: Stage, index: int, report: Callable[[int], object]) -> int:
        """Makes what is missing of a shard."""
        database = opened_once(ChunkDatabase.open, self.chunks_directory)
        name = shard_name(KIND, index)
        parts = _Parts(stage.directory / f"{files.TEMPORARY}{name}")
        report(min(parts.count() * BLOCK, len(database.shards[index])))
        tokenizer = opened_once(Tokenizer.open, self.tokenizer_directory)
        dtype = stage.settings["dtype"]
        prefix = stage.settings.get("prefix", "")
        encoder = ChunkEncoder(tokenizer, Embedder.shared(self._model()), dtype, prefix)
        first = parts.count()
        blocks = grain.MapDataset.source(BlockSource(database.shards[index]))
        missing = blocks[first:].map(lambda ids: encoder.pieces(database.chunks(ids)))
        for number, pieces in enumerate(iterate(missing), first):
            stored, computed = encoder.stored(pieces)
            parts.add(number, stored, encoder.counts(pieces) | {"computed": computed})
            report(len(stored))
        shape = (len(database.shards[index]), encoder.dimension)
        facts = _sums([counts for _, counts in parts.all()])

        def write(file: BinaryIO) -> None:
            write_header(file, shape, _STORED[dtype])
            for stored, _ in parts.all():
                file.write(np.ascontiguousarray(stored).data)

        stage.write_file(name, write, facts=facts)
        parts.remove()
        return shape[0]

    def _model(self) -> BertFolder:
        """The BERT, under the name that its identity has."""
        folder = BertFolder.open(self.model_folder, self.prefixes)
        return dataclasses.replace(folder, name=self.model_name)


class _Parts:
    """The finished blocks of an unfinished shard, in a temporary folder of the stage."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def count(self) -> int:
        """How many blocks are there; they are made in order."""
        return len(list(self._folder.glob("[0-9]*.npy")))

    def all(self) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
        """Stored keys and counts of every block, in order, one at a time."""
        for i in range(self.count()):
            counts, stored = files.read_arrays(self._path(i), 2)
            yield stored, dict(zip(_COUNTS, counts.tolist(), strict=True))

    def add(self, index: int, stored: np.ndarray, counts: dict[str, int]) -> None:
        """Writes a block: its counts, then its keys. Two workers may write the same one."""
        numbers = np.array([counts[name] for name in _COUNTS])
        files.write_arrays(self._path(index), (numbers, stored))

    def remove(self) -> None:
        """Removes all of them, when the shard is in place."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, index: int) -> pathlib.Path:
        """Where a block is."""
        return self._folder / f"{index:05d}.npy"


def _sums(counts: list[dict[str, int]]) -> dict[str, int]:
    """The counts of blocks or shards, added up."""
    return {name: sum(part[name] for part in counts) for name in _COUNTS}
