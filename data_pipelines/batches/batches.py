"""Chunk database and neighbour table in, RetroBatch out, through Grain.

How row i of step t finds its chunks, for a corpus of n = 7 chunks and sequences of l = 3:

    position         0  1  2 | 3  4  5 | 6  7  8      an epoch is S = ceil(n / l) = 3 sequences
    chunk, o = 0     0  1  2 | 3  4  5 | 6  .  .      positions past n are padding
    chunk, o = 2     2  3  4 | 5  6  0'| 1' .  .      the corpus is a ring: nothing is left out

Every chunk is in exactly one sequence of an epoch. The offset o is a permutation of 0 .. l-1 over the
epochs, so that sequence ends fall elsewhere each time. Chunks past the ring's seam (marked ') count as
another document, or a document that fills the corpus would read its own future.

The S sequences are permuted anew for each epoch, by arithmetic: any row can be made by itself. Row i
of global batch t therefore depends on (seed, t, i) alone, for any number of hosts, and a run resumes
from its step with nothing else stored.
"""

import dataclasses
import difflib
import functools
import hashlib
import re
import sys
from collections.abc import Generator, Mapping, Sequence

import grain
import numpy as np

from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.retriever.neighbour_table import NeighbourTable
from retro_jax.batch import RetroBatch
from retro_jax.config import RetroConfig, require
from retro_jax.errors import UserError

PARTS = ("both", "chunk", "continuation")
_LAST = re.compile(r"last_([1-9][0-9]{0,2})")
_SEAM = 2**30  # added to the document numbers past the ring's seam
_SHORT = 4096  # sequences below which an epoch's order is kept in memory


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Which sequences a run sees, and in which order.

    Attributes:
      sequence_length: N, tokens per sequence; a multiple of the chunk length.
      batch_size: rows of a global batch, over all hosts.
      neighbours: K, neighbours per chunk; 0 for none (the baseline, RETRO[OFF]).
      neighbour_part: "both" the retrieved chunk and its continuation, or only the "chunk", or only
        the "continuation"; the rest is padding. "last_96" is the last 96 of both's 128 tokens, and no
        padding, so that the model reads less; of passages and other texts it is the first 96. The
        model is then always used this way.
      neighbour_noise: part of the chunks that get the neighbours of another chunk, drawn at random from
        the split, so that the model learns to leave unrelated ones alone.
      further_neighbours: part of the chunks that get neighbours K + 1 to 2K instead of the nearest K, so
        that a model also reads what is related and no near-copy; the table needs 2K.
      seed: seed of the order of sequences.
      mixture: weight of each corpus by name, with any positive sum; corpora not named are left out.
        Weights are exact to half a percent of themselves. None takes every sequence exactly once an
        epoch.
      prefetch: batches made ahead of the current one.
      questions: NAME of questions in W/questions that are trained instead of the training split; ""
        for none. launch.prepare --questions makes them.
    """

    sequence_length: int = 2048
    batch_size: int = 256
    neighbours: int = 2
    neighbour_part: str = "both"
    neighbour_noise: float = 0.0
    further_neighbours: float = 0.0
    seed: int = 0
    mixture: Mapping[str, float] | None = None
    prefetch: int = 4
    questions: str = ""

    def __post_init__(self) -> None:
        length = self.sequence_length
        rule = f"a positive multiple of the chunk length {CHUNK_LENGTH}"
        valid = isinstance(length, int) and length > 0 and length % CHUNK_LENGTH == 0
        require(valid, self, "sequence_length", rule)
        require(self.batch_size > 0, self, "batch_size", "a positive number of rows")
        require(self.neighbours >= 0, self, "neighbours", "a number of neighbours, or 0 for none")
        rule = f"one of {PARTS}, or last_N with N from 1 to {2 * CHUNK_LENGTH - 1}"
        known = self.neighbour_part in PARTS or _last(self.neighbour_part) > 0
        require(known, self, "neighbour_part", rule)
        for field in ("neighbour_noise", "further_neighbours"):
            require(0 <= getattr(self, field) <= 1, self, field, "a number from 0 to 1")
        require(0 <= self.seed < 2**32, self, "seed", "an integer from 0 to 2**32 - 1")
        require(self.prefetch >= 0, self, "prefetch", "a number of batches, or 0 for none")
        weights = [1.0] if self.mixture is None else list(self.mixture.values())
        valid = bool(weights) and all(isinstance(w, int | float) and w > 0 for w in weights)
        require(valid, self, "mixture", "positive weights by corpus")
        alone = not self.questions or self.mixture is None
        require(alone, self, "mixture", "None where BatchConfig.questions is given")
        alone = not self.questions or not self.further_neighbours
        require(alone, self, "further_neighbours", "0 where BatchConfig.questions is given")

    @property
    def noise(self) -> bool:
        """Whether batches of a chunk database have RetroBatch.noise."""
        return self.neighbours > 0 and self.neighbour_noise > 0 and not self.questions


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """The ring of a corpus's chunks: position -> chunk id."""

    starts: np.ndarray  # [ranges] first chunk id of each range
    bounds: np.ndarray  # [ranges + 1] positions at which the ranges begin, and the corpus ends
    chunks: int  # l, chunks per sequence
    seed: int

    @classmethod
    def of(cls, ranges: Sequence[range], chunks: int, seed: int) -> "_Corpus":
        """A corpus from the database's ranges of chunk ids."""
        starts = np.array([ids.start for ids in ranges], np.int64)
        lengths = np.array([len(ids) for ids in ranges], np.int64)
        return cls(starts, np.concatenate([[0], np.cumsum(lengths)]), chunks, seed)

    @property
    def sequences(self) -> int:
        """S, sequences an epoch."""
        return -(-int(self.bounds[-1]) // self.chunks)

    def offset(self, epoch: int) -> int:
        """How many chunks the sequences of an epoch are shifted by."""
        if self.sequences == 1:  # a shift would only cut documents that fit as they are
            return 0
        return int(permutation(self.chunks, self.seed, 0)[epoch % self.chunks])

    def chunk_ids(self, tickets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chunks of the sequences epoch * S + s.

        Args:
          tickets: [n] int64.

        Returns:
          ids [n, l] int64, -1 for padding; and [n, l] bool, whether a chunk is past the seam.
        """
        epochs, sequences = np.divmod(tickets, self.sequences)
        distinct, inverse = np.unique(epochs, return_inverse=True)
        offsets = np.array([self.offset(int(epoch)) for epoch in distinct], np.int64)[inverse]
        total = self.bounds[-1]
        positions = sequences[:, None] * self.chunks + np.arange(self.chunks)
        shifted = positions + offsets[:, None]
        ring = shifted % total
        which = np.searchsorted(self.bounds, ring, side="right") - 1
        ids = self.starts[which] + ring - self.bounds[which]
        return np.where(positions < total, ids, -1), shifted >= total


class Batches:
    """Random access to the global batches of a run, and an iterator with prefetch.

    Attributes:
      corpora: names of the corpora, in the order that RetroBatch.corpus counts them.
      sequences: sequences an epoch of each corpus.
      noise: whether batches have RetroBatch.noise; written batches have not.
    """

    noise = False

    def __init__(
        self,
        config: BatchConfig,
        database: ChunkDatabase,
        table: NeighbourTable | None = None,
        retrieval: ChunkDatabase | None = None,
    ) -> None:
        """Binds the artefacts; reads nothing yet.

        Args:
          config: lengths, seed and mixture.
          database: the chunks to make sequences of.
          table: neighbours of the database's chunks; not needed when config.neighbours is 0.
          retrieval: the database that the table's ids point into.

        Raises:
          UserError: a corpus that is not in the database, more neighbours than the table has,
            or artefacts that do not belong together.
        """
        self.config = config
        self._database, self._table, self._retrieval = database, table, retrieval
        self.noise = config.noise
        if config.neighbours:
            _check_table(config, database, table, retrieval)
        self.corpora = _corpus_names(config.mixture, database)
        chunks = config.sequence_length // CHUNK_LENGTH
        self._rings = [
            _Corpus.of(database.corpora[name], chunks, _seed(config.seed, name))
            for name in self.corpora
        ]
        self.sequences = {name: ring.sequences for name, ring in zip(self.corpora, self._rings)}
        self._order = _order(config, self.corpora, self._rings)
        self._order[0]  # Grain's statistics are set up at first use, which is not thread-safe

    def rows(self, step: int, rows: Sequence[int] | None = None) -> RetroBatch:
        """Makes rows of a global batch.

        Args:
          step: t, which global batch.
          rows: which of its rows, each in [0, batch_size); None for all.

        Returns:
          A RetroBatch of NumPy arrays with B = len(rows).
        """
        size = self.config.batch_size
        rows = range(size) if rows is None else rows
        tickets = np.array([self._order[step * size + int(row)] for row in rows], np.int64)
        tickets = tickets.reshape(-1, 2)
        corpus, ids = tickets[:, 0], np.empty((len(tickets), self._chunks), np.int64)
        past_seam = np.zeros(ids.shape, bool)
        for c in np.unique(corpus):
            ids[corpus == c], past_seam[corpus == c] = self._rings[c].chunk_ids(
                tickets[corpus == c, 1]
            )
        noise, queries = self._queries(ids, tickets)
        neighbours = self._neighbours(queries, tickets)
        batch = self._assemble(ids, past_seam, corpus)
        return dataclasses.replace(batch, neighbours=neighbours, noise=noise)

    def document_ids(self, step: int) -> list[str]:
        """The ids of the documents that a global batch has chunks of, in their order in it.

        Args:
          step: t, which global batch.
        """
        return [self._document_id(number) for number in self._document_numbers(step)]

    def _document_numbers(self, step: int) -> list[int]:
        """The distinct numbers of a global batch's documents in their chunk database."""
        numbers = self.rows(step).documents.ravel()
        return list(dict.fromkeys((numbers[numbers >= 0] % _SEAM).tolist()))

    def _document_id(self, number: int) -> str:
        """The id of a document of the chunk database."""
        return self._database.record(number).id

    def iterate(
        self, start_step: int = 0, rows: Sequence[int] | None = None
    ) -> Generator[RetroBatch, None, None]:
        """Yields rows(start_step), rows(start_step + 1), ... for ever, made ahead by a thread.

        Close it to end the thread.
        """
        steps = grain.MapDataset.range(start_step, sys.maxsize)
        threads = 1 if self.config.prefetch else 0
        options = grain.ReadOptions(threads, self.config.prefetch)
        batches = steps.map(lambda step: self.rows(step, rows)).to_iter_dataset(options)
        iterator = iter(batches)
        try:
            yield from iterator
        finally:
            iterator.close()

    @property
    def _chunks(self) -> int:
        """C, chunks per sequence."""
        return self.config.sequence_length // CHUNK_LENGTH

    def _queries(
        self, ids: np.ndarray, tickets: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """RetroBatch.noise; and [B, C] the chunks whose neighbours chunks `ids` get, others for the noise."""
        if not self.noise:
            return None, ids
        drawn, other = self._drawn("noise", tickets)
        others = (other % np.uint64(len(self._database))).astype(np.int64)
        queries = np.where(
            (drawn / 2.0**64 < self.config.neighbour_noise) & (ids >= 0), others, ids
        )
        return queries != ids, queries

    def _drawn(self, purpose: str, tickets: np.ndarray) -> np.ndarray:
        """[2, B, C] uint64, random: a function of the seed, the purpose and the tickets [B, 2]."""
        seed = _seed(self.config.seed, purpose)
        keys = [
            np.array([seed, corpus << 48 | ticket], np.uint64)
            for corpus, ticket in tickets.tolist()
        ]
        drawn = [np.random.Philox(key=key).random_raw((2, self._chunks)) for key in keys]
        return np.stack(drawn, axis=1) if drawn else np.zeros((2, 0, self._chunks), np.uint64)

    def _assemble(self, ids: np.ndarray, past_seam: np.ndarray, corpus: np.ndarray) -> RetroBatch:
        """Gathers the tokens of chunk ids [B, C]."""
        # A chunk's value is itself and its continuation, so the next token is one place further on.
        values = self._database.values(ids)
        documents = self._database.documents(ids)
        documents = np.where(ids >= 0, documents % _SEAM + past_seam * _SEAM, -1)
        return RetroBatch(
            tokens=values[..., :CHUNK_LENGTH].reshape(len(ids), -1),
            targets=values[..., 1 : CHUNK_LENGTH + 1].reshape(len(ids), -1),
            documents=documents.astype(np.int32),
            corpus=corpus.astype(np.int32),
        )

    def _neighbours(self, ids: np.ndarray, tickets: np.ndarray) -> np.ndarray | None:
        """Neighbour tokens [B, C, K, R] of chunk ids [B, C]: the nearest, or further ones."""
        k, rate = self.config.neighbours, self.config.further_neighbours
        if not k or self._table is None or self._retrieval is None:
            return None
        deep = 2 * k if rate else k
        slots = self._table.ids(np.maximum(ids, 0).ravel(), deep).reshape(*ids.shape, deep)
        if rate:
            further = self._drawn("further", tickets)[0] / 2.0**64 < rate
            slots = np.where(further[..., None], slots[..., k:], slots[..., :k])
        values = self._retrieval.values(np.where(ids[..., None] >= 0, slots, -1))
        return keep_part(values, self.config.neighbour_part, self._retrieval.pad_id)


def neighbour_length(part: str) -> int:
    """R, the tokens of a neighbour of which a part is read (BatchConfig.neighbour_part)."""
    return _last(part) or 2 * CHUNK_LENGTH


def check_neighbour_length(batches: BatchConfig, retro: RetroConfig) -> None:
    """Refuses a model that reads more or less of a neighbour than its batches have, or compares what they lack.

    Raises:
      UserError: names both settings.
    """
    part, length = batches.neighbour_part, neighbour_length(batches.neighbour_part)
    if retro.neighbour_length != length:
        raise UserError(
            f"RetroConfig.neighbour_length is {retro.neighbour_length}: expected {length}, as"
            f" BatchConfig.neighbour_part is {part!r}"
        )
    if retro.min_shared_tokens and part == "continuation":
        raise UserError(
            f"RetroConfig.min_shared_tokens is {retro.min_shared_tokens}: expected 0, as"
            f" BatchConfig.neighbour_part is {part!r}, without the chunk"
        )


def keep_part(values: np.ndarray, part: str, pad_id: int) -> np.ndarray:
    """Neighbours [..., 128] of which only a part is left: [..., R], or the other part padding."""
    if part == "both":
        return values
    if last := _last(part):
        return values[..., -last:]
    mask = np.arange(values.shape[-1]) < CHUNK_LENGTH
    return np.where(mask == (part == "chunk"), values, pad_id)


def keep_part_of_text(values: np.ndarray, part: str, pad_id: int) -> np.ndarray:
    """As `keep_part`, for texts that are no chunks: what a model reads of them are the first R tokens."""
    length = neighbour_length(part)
    return values[..., :length] if _last(part) else keep_part(values, part, pad_id)


def _last(part: str) -> int:
    """N of "last_N"; 0 for any other part."""
    match = _LAST.fullmatch(str(part))
    number = int(match[1]) if match else 0
    return number if number < 2 * CHUNK_LENGTH else 0


def _seed(seed: int, name: str) -> int:
    """A corpus's own 32-bit seed, which other corpora do not change."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")


@functools.lru_cache(maxsize=256)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(length), from bits that no NumPy version changes."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(length)
    return np.argsort(bits, kind="stable")


class _ShortShuffle(grain.MapDataset):
    """Grain's shuffle, for few elements.

    Grain walks a cycle through 2**16 numbers or more until it meets one that is small enough: 14 ms
    an element when there are 2 of them, 2.5 ms when 16, 0.02 ms when 10,000.
    """

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._parent_length, self._seed = len(parent), seed

    def __len__(self) -> int:
        return self._parent_length

    def __getitem__(self, index: int):
        epoch, position = divmod(index, self._parent_length)
        order = permutation(self._parent_length, self._seed, epoch)
        return self._parent[epoch * self._parent_length + int(order[position])]


def _shuffled(elements: grain.MapDataset, seed: int) -> grain.MapDataset:
    """All elements in another order each epoch, for ever."""
    short = len(elements) < _SHORT
    return (_ShortShuffle(elements, seed) if short else elements.shuffle(seed)).repeat()


def _order(
    config: BatchConfig, corpora: Sequence[str], rings: Sequence[_Corpus]
) -> grain.MapDataset:
    """Global row -> (corpus, epoch * sequences + sequence), infinite and random access."""

    def tickets(c: int) -> grain.MapDataset:
        count = grain.MapDataset.range(rings[c].sequences)
        return count.map_with_index(lambda index, _: (c, index))

    every = [tickets(c) for c in range(len(rings))]
    if config.mixture is None:
        return _shuffled(grain.MapDataset.concatenate(every), _seed(config.seed, ""))
    shuffled = [_shuffled(one, ring.seed) for one, ring in zip(every, rings)]
    weights = [config.mixture[name] for name in corpora]
    # Grain scales the smallest weight to 100 and cuts the others to integers: round them instead.
    return grain.MapDataset.mix(shuffled, [round(100 * w / min(weights)) for w in weights])


def _corpus_names(mixture: Mapping[str, float] | None, database: ChunkDatabase) -> list[str]:
    """The mixture's corpora, or all that have chunks, in alphabetical order."""
    corpora = sorted(name for name, ranges in database.corpora.items() if any(map(len, ranges)))
    for name in mixture or ():
        if name not in corpora:
            suggestions = difflib.get_close_matches(name, corpora, n=3, cutoff=0.5) or corpora
            raise UserError(
                f"BatchConfig.mixture names the corpus {name!r}, which the database "
                f"{database.directory} does not hold: expected one of {', '.join(suggestions)}"
            )
    if not corpora:
        raise UserError(f"{database.directory}: no chunks to make batches of")
    return corpora if mixture is None else sorted(mixture)


def _check_table(
    config: BatchConfig,
    database: ChunkDatabase,
    table: NeighbourTable | None,
    retrieval: ChunkDatabase | None,
) -> None:
    """Raises unless the table belongs to these databases and has enough neighbours."""
    k = config.neighbours
    if table is None or retrieval is None:
        raise UserError(f"BatchConfig.neighbours is {k}: expected a neighbour table, or 0")
    if k > table.k:
        raise UserError(
            f"BatchConfig.neighbours is {k}: expected at most {table.k}, which {table.directory} holds"
        )
    if config.further_neighbours and 2 * k > table.k:
        raise UserError(
            f"BatchConfig.further_neighbours is {config.further_neighbours}: expected 0, or a table of"
            f" {2 * k} neighbours, twice BatchConfig.neighbours; {table.directory} has {table.k}"
        )
    for role, parent in (("chunks", database), ("database", retrieval)):
        if table.manifest.parents.get(role) != parent.manifest.hash:
            raise UserError(
                f"{table.directory} and {parent.directory} do not belong together: expected the "
                f"{role} that the neighbour table was made of"
            )
