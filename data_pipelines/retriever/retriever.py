"""Chunks in, nearest chunks of other documents out: offline for the tables, live while generating.

    dense        the nearest by their keys
    dense+bm25   so many nearest by their keys, the best of these by BM25
    bm25         the best by BM25; there need not be any keys

By keys:

    tokens --ChunkEncoder--> queries --Index--> candidates --filter--> k neighbours, nearest first

More candidates are fetched than asked for, since some are of the query's own document. A query that is
left with too few fetches 8 times as many, up to 1,024; one that still has too few (a chunk of a very
long document) is compared with every key, which also says when there are no more.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, Path
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.retriever import revisions
from data_pipelines.retriever.bm25 import KIND as BM25
from data_pipelines.retriever.bm25 import Bm25
from data_pipelines.retriever.embedder import PACKAGED_MODELS, BertFolder, Embedder
from data_pipelines.retriever.index import Index, IndexShard, merge, repeated
from data_pipelines.retriever.keys import ChunkEncoder, Keys
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

_WIDEN, _WIDEST = 8, 1024
_SPARE = 8  # candidates of an exact search beyond k: its products round where differences do not
_QUERIES = 1024  # of an exact search at once


RETRIEVERS = ("dense", "bm25", "dense+bm25")
Queries = Keys | ChunkDatabase  # chunks to search for, with keys or without
Found = tuple[np.ndarray, np.ndarray]  # ids and scores


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What is near.

    Attributes:
      retriever: one of RETRIEVERS.
      candidates: how many of the nearest by their keys "dense+bm25" chooses from.
    """

    retriever: str = "dense"
    candidates: int = 100

    def __post_init__(self) -> None:
        require(self.retriever in RETRIEVERS, self, "retriever", f"one of {RETRIEVERS}")
        require(self.candidates > 0, self, "candidates", "a positive number")

    @property
    def by_keys(self) -> bool:
        """Whether keys are compared."""
        return self.retriever != "bm25"

    @property
    def by_terms(self) -> bool:
        """Whether BM25 has the last word."""
        return self.retriever != "dense"

    @property
    def settings(self) -> dict[str, Any]:
        """What the manifest of a table says of it."""
        if not self.by_terms:
            return {"score": "squared_l2"}
        some = {"candidates": self.candidates} if self.by_keys else {}
        return {"score": "bm25", "retriever": self.retriever} | some

    def __str__(self) -> str:
        """As an error names it."""
        some = f" of {self.candidates} candidates" if self.by_keys and self.by_terms else ""
        return f"{self.retriever!r}{some}"

    @classmethod
    def of(cls, workdir: Path) -> "Ranking":
        """That of a workdir's tables; the first one where there are none."""
        place = pathlib.Path(workdir) / "neighbours" / "train"
        if not (place / MANIFEST_FILE).is_file():
            return cls()
        settings = Manifest.read(place).settings
        return cls(**{f.name: settings.get(f.name, f.default) for f in dataclasses.fields(cls)})


class Retriever:
    """A retrieval database that can be searched: chunks, their keys, and the index over these.

    Attributes:
      database: the chunks; ids are its.
      ranking: what is near.
    """

    def __init__(
        self,
        database: ChunkDatabase,
        keys: Keys | None,
        *,
        index: Index | None,
        tokenizer: Tokenizer | None = None,
        model: str | None = None,
        ranking: Ranking = Ranking(),
        bm25: Bm25 | None = None,
    ) -> None:
        """Use `open`; without a tokeniser it can search, but not embed."""
        self.database, self.ranking = database, ranking
        self._keys, self._index, self._bm25 = keys, index, bm25
        self._tokenizer, self._model = tokenizer, model

    @classmethod
    def open(
        cls,
        workdir: Path,
        *,
        model: str | None = None,
        revision: int | None = None,
        ranking: Ranking | None = None,
        verify: bool = False,
    ) -> "Retriever":
        """Opens the retrieval database of a workdir: tokenizer/, chunks/train/, keys/train/ and index/.

        BERT and ScaNN are loaded when they are first needed.

        Args:
          workdir: where `prepare` put them.
          model: the folder of the BERT that made the keys, where it is not a packaged one.
          revision: of the database; None for the newest.
          ranking: what is near; None for what the workdir's tables were made by.
          verify: hash every file again.

        Raises:
          UserError: something is missing, damaged, or does not belong to the rest.
        """
        tokenizer = Tokenizer.open(pathlib.Path(workdir) / "tokenizer", verify=verify)
        database = revisions.open_database(workdir, revision, verify=verify)
        for part in getattr(database, "parts", [database]):
            _check_tokenizer(part, tokenizer)
        ranking = Ranking.of(workdir) if ranking is None else ranking
        keys = index = bm25 = None
        if ranking.by_keys:
            keys = revisions.open_keys(database, workdir, verify=verify)
            index = revisions.open_index(keys, workdir, verify=verify)
        if ranking.by_terms:
            place = revisions.folder_of(workdir, database.manifest.revision) / BM25
            bm25 = Bm25.open(place, database, verify=verify)
        parts: dict[str, Any] = {"index": index, "ranking": ranking, "bm25": bm25}
        return cls(database, keys, tokenizer=tokenizer, model=model, **parts)

    def __reduce__(self) -> tuple[Callable[..., "Retriever"], tuple[Any, ...]]:
        """Pickles for searching: worker processes map and load the files, but cannot embed."""
        return _searching, (self.database, self._keys, self._index, self.ranking, self._bm25)

    @property
    def keys(self) -> Keys:
        """The database's keys; a UserError where it has none."""
        if self._keys is None:
            raise UserError(
                f"{self.database.directory} is searched by BM25 alone: expected the retriever 'dense'"
                " or 'dense+bm25' where keys are needed"
            )
        return self._keys

    @property
    def index(self) -> Index:
        """The index over the keys."""
        assert self.keys is not None and self._index is not None
        return self._index

    @property
    def bm25(self) -> Bm25:
        """The scores of terms; only where the ranking has them."""
        assert self._bm25 is not None
        return self._bm25

    @property
    def parts(self) -> list[IndexShard | None]:
        """What `candidates` searches, one after the other; None for BM25."""
        return list(self.index.shards) if self.ranking.by_keys else [None]

    @functools.cached_property
    def encoder(self) -> ChunkEncoder:
        """Chunks to keys, exactly as the database's own were made.

        Raises:
          UserError: the model is not the one that made the keys.
        """
        if self._tokenizer is None:
            raise UserError(f"{self.keys.directory}: expected a tokeniser to embed with")
        return _encoder(self.keys, self._tokenizer, self._model)

    @classmethod
    def encoder_of(cls, workdir: Path, keys: Keys, *, model: str | None = None) -> ChunkEncoder:
        """What embeds chunks as some keys of a workdir were made; errors as for `encoder`."""
        return _encoder(keys, Tokenizer.open(pathlib.Path(workdir) / "tokenizer"), model)

    def retrieve(
        self, tokens: np.ndarray, k: int, exclude_documents: np.ndarray | None = None
    ) -> np.ndarray:
        """The neighbours' tokens of any chunks.

        Args:
          tokens: [C, 64] token ids.
          k: neighbours a chunk.
          exclude_documents: [C] numbers of the database's documents to leave out; -1 for none.

        Returns:
          [C, k, 128] int32: neighbour and continuation, nearest first; pad_id where there is none.
        """
        ids, _ = self.neighbours(tokens, k, exclude_documents)
        return self.database.values(ids)

    def neighbours(
        self, tokens: np.ndarray, k: int, exclude_documents: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `retrieve`, but chunk ids and scores as `search` gives them."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != CHUNK_LENGTH:
            raise UserError(
                f"chunks have shape {tokens.shape}: expected [C, {CHUNK_LENGTH}] tokens"
            )
        if not self.ranking.by_keys:
            return self.bm25.search(tokens, k, exclude_documents)
        found = self.search(self.encoder.keys(tokens), self.fetched(k), exclude_documents)
        return self.ranked(found, tokens, k)

    def fetched(self, k: int) -> int:
        """How many candidates a search for k neighbours begins with."""
        return max(k, self.ranking.candidates) if self.ranking.retriever == "dense+bm25" else k

    def ranked(self, found: Found, tokens: np.ndarray, k: int) -> Found:
        """The first k [n, k] of `fetched` candidates for chunks [n, 64], and their scores."""
        if self.ranking.retriever == "dense+bm25":
            return self.bm25.ranked(tokens, found[0], k)
        return found[0][:, :k], found[1][:, :k]

    def candidates(
        self,
        part: IndexShard | None,
        queries: Queries,
        ids: np.ndarray,
        k: int,
        exclude: np.ndarray | None,
    ) -> Found:
        """What one of `parts` finds for chunks `ids` [n]: candidates [n, fetched(k)], and scores."""
        if part is None:
            return self.bm25.search(chunks_of(queries).chunks(ids), k, exclude)
        return self.search_shard(part, _vectors(queries, ids), self.fetched(k), exclude)

    def find(
        self, queries: Queries, ids: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `neighbours`, of chunks `ids` [n] whose keys, if any are needed, are known."""
        tokens = chunks_of(queries).chunks(ids)
        if not self.ranking.by_keys:
            return self.bm25.search(tokens, k, exclude)
        found = self.search(_vectors(queries, ids), self.fetched(k), exclude)
        return self.ranked(found, tokens, k)

    def truth(
        self, queries: Queries, ids: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `find`, by comparing every key."""
        if not self.ranking.by_keys:
            return self.find(queries, ids, k, exclude)
        found = self.exact(_vectors(queries, ids), self.fetched(k), exclude)
        return self.ranked(found, chunks_of(queries).chunks(ids), k)

    def scores_of(self, queries: Queries, ids: np.ndarray, found: np.ndarray) -> np.ndarray:
        """[n, k] float32: the scores of given neighbours [n, k] of chunks `ids` [n]."""
        if self.ranking.by_terms:
            return self.bm25.score(chunks_of(queries).chunks(ids), found)
        keys = self.keys.rows(np.maximum(found, 0).ravel()).reshape(*found.shape, -1)
        distances = ((keys - _vectors(queries, ids)[:, None]) ** 2).sum(-1)
        return np.where(found >= 0, distances, np.inf)

    def has_text(self, queries: Queries, ids: np.ndarray) -> np.ndarray:
        """[n] bool: which of the chunks `ids` can be searched for."""
        if self.ranking.by_keys:
            return ~np.isnan(_vectors(queries, ids)[:, 0])
        return self.bm25.has_terms(chunks_of(queries).chunks(ids))

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k nearest chunks.

        Args:
          queries: [n, d] float32 keys; a row of NaN (no text) finds nothing.
          k: how many.
          exclude_documents: [n] numbers of the database's documents to leave out; -1 for none.

        Returns:
          Chunk ids [n, k] int64, unique in each row, and squared L2 distances [n, k] float32,
          ascending (equal ones by id); -1 and infinity where there are no more.
        """
        if k < 1:
            raise UserError(f"k is {k}: expected at least one neighbour")
        found = [
            self.search_shard(shard, queries, k, exclude_documents) for shard in self.index.shards
        ]
        return merge(found, k)

    def search_shard(
        self,
        shard: IndexShard,
        queries: np.ndarray,
        k: int,
        exclude_documents: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, among the chunks of one of the index's shards."""
        ids = np.full((len(queries), k), -1, np.int64)
        pending = np.flatnonzero(~np.isnan(queries[:, 0]))
        filtered = exclude_documents is not None or len(self.database.removed)
        count, widen = (2 * k + 16 if filtered else k), 1
        while len(pending) and count <= max(_WIDEST, k):
            found, _ = shard.search(queries[pending], count, widen=widen)
            chosen = self._select(found, k, _at(exclude_documents, pending))
            enough = chosen[:, -1] >= 0
            if shard.is_exact and count >= len(shard):
                enough[:] = True
            ids[pending[enough]] = chosen[enough]
            pending = pending[~enough]
            count, widen = count * _WIDEN, widen * _WIDEN
        for start in range(0, len(pending), _QUERIES):
            rows = pending[start : start + _QUERIES]
            ids[rows] = self._exact_ids(queries[rows], k, _at(exclude_documents, rows), shard.ids)
        return self._scored(queries, ids)

    def exact(
        self, queries: np.ndarray, k: int, exclude_documents: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, by comparing every key: the reference that recall is measured against."""
        ids = np.full((len(queries), k), -1, np.int64)
        valid = np.flatnonzero(~np.isnan(queries[:, 0]))
        for start in range(0, len(valid), _QUERIES):
            rows = valid[start : start + _QUERIES]
            ids[rows] = self._exact_ids(queries[rows], k, _at(exclude_documents, rows))
        return self._scored(queries, ids)

    def _select(self, ids: np.ndarray, k: int, exclude: np.ndarray | None) -> np.ndarray:
        """The first k of candidates [n, m] that are there, not excluded and not repeated: [n, k]."""
        wanted = (ids >= 0) & ~repeated(ids)
        documents = self.database.documents(ids)
        wanted &= ~self.database.is_removed(documents)
        if exclude is not None:
            wanted &= documents != exclude[:, None]
        order = np.argsort(~wanted, axis=1, kind="stable")[:, :k]
        chosen = np.where(wanted, ids, -1)
        chosen = np.take_along_axis(chosen, order, axis=1)
        return np.pad(chosen, ((0, 0), (0, k - chosen.shape[1])), constant_values=-1)

    def _exact_ids(
        self,
        queries: np.ndarray,
        k: int,
        exclude: np.ndarray | None,
        within: range | None = None,
    ) -> np.ndarray:
        """[n, k] ids of the nearest keys by comparing all, not excluded; -1 where there are no more."""
        best_ids = np.full((len(queries), k + _SPARE), -1, np.int64)
        best = np.full(best_ids.shape, np.inf, np.float32)
        for ids, keys in self.keys.blocks(within=within):
            # |q|^2 is the same for all keys of a query, and so left out of the comparison.
            distances = (keys * keys).sum(1)[None, :] - 2 * (queries @ keys.T)
            documents = self.database.documents(ids)
            distances[:, self.database.is_removed(documents)] = np.inf
            if exclude is not None:
                distances[documents[None, :] == exclude[:, None]] = np.inf
            best_ids, best = _keep_nearest((best_ids, best), ids, distances)
        best_ids[np.isinf(best)] = -1
        return self._scored(queries, best_ids)[0][:, :k]

    def _scored(self, queries: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids [n, k] in the order of their exact distances, and these; equal ones by id."""
        scores = np.full(ids.shape, np.inf, np.float32)
        for slot in range(ids.shape[1]):
            rows = np.flatnonzero(ids[:, slot] >= 0)
            difference = self.keys.rows(ids[rows, slot]) - queries[rows]
            scores[rows, slot] = np.einsum("nd,nd->n", difference, difference)
        order = np.lexsort((ids, scores), axis=-1)
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _keep_nearest(best: Found, ids: np.ndarray, distances: np.ndarray) -> Found:
    """The nearest of what each row [n, m] has and a block's chunks `ids` [s] at `distances` [n, s].

    Few chunks of a block are nearer than what a row has, and only these are sorted into it; of equal
    distances the earlier one stays in front.
    """
    nearest = best[1]
    nearer = distances < nearest[:, -1:]
    counts = nearer.sum(1)
    if not counts.any():
        return best
    rows, columns = np.nonzero(nearer)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    new_ids = np.full((len(nearer), counts.max()), -1, np.int64)
    new = np.full(new_ids.shape, np.inf, np.float32)
    new_ids[rows, places], new[rows, places] = ids[columns], distances[rows, columns]
    return merge([best, (new_ids, new)], nearest.shape[1])


def _encoder(keys: Keys, tokenizer: Tokenizer, model: str | None) -> ChunkEncoder:
    """The encoder that made some keys; a UserError if it is not there."""
    settings = keys.manifest.settings
    made_by = settings["embedder"]
    name = model or made_by["model"]
    if model is None and name not in PACKAGED_MODELS:
        raise UserError(
            f"{keys.directory} was made by the BERT folder {name!r}: expected model= its path"
        )
    folder = BertFolder.open(name)
    if files.plain(folder.identity) | {"model": ""} != made_by | {"model": ""}:
        raise UserError(
            f"{folder.folder} is not the BERT that made {keys.directory}: expected "
            f"model.safetensors {made_by['sha256']['model.safetensors'][:12]}, found "
            f"{folder.identity['sha256']['model.safetensors'][:12]}, or other settings"
        )
    return ChunkEncoder(tokenizer, Embedder.shared(folder), settings["dtype"])


class OwnDocuments:
    """The retrieval database's number of each chunk's own document."""

    def __init__(self, queries: ChunkDatabase, database: ChunkDatabase) -> None:
        """Finds the documents of the queries in the database, by corpus and id."""
        self._queries = queries
        self._numbers: np.ndarray | None = None
        if queries.manifest.hash != database.manifest.hash:
            self._numbers = _same_documents(queries, database)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """[n] int64 numbers for chunks [n] of the queries; -1 where the database lacks the document."""
        documents = self._queries.documents(ids)
        return documents if self._numbers is None else self._numbers[documents]


def chunks_of(queries: Queries) -> ChunkDatabase:
    """The chunks that are searched for."""
    return queries.database if isinstance(queries, Keys) else queries


def _same_documents(queries: ChunkDatabase, database: ChunkDatabase) -> np.ndarray:
    """[documents of queries] int64: the number of the same document in the database, or -1."""
    wanted = {(r.corpus, r.id): i for i, r in enumerate(queries.records())}
    numbers = np.full(len(wanted), -1, np.int64)
    for number, record in enumerate(database.records()):
        i = wanted.get((record.corpus, record.id))
        if i is not None:
            numbers[i] = number
    return numbers


def _vectors(queries: Queries, ids: np.ndarray) -> np.ndarray:
    """[n, d] keys of chunks that are searched for."""
    assert isinstance(queries, Keys)
    return queries.rows(ids)


def _searching(
    database: ChunkDatabase,
    keys: Keys | None,
    index: Index | None,
    ranking: Ranking,
    bm25: Bm25 | None,
) -> Retriever:
    """A retriever that can search, but not embed."""
    return Retriever(database, keys, index=index, ranking=ranking, bm25=bm25)


def _at(exclude: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    """The excluded documents of some queries."""
    return None if exclude is None else np.asarray(exclude)[rows]


def _check_tokenizer(database: ChunkDatabase, tokenizer: Tokenizer) -> None:
    """Raises unless the database was made with the tokeniser."""
    if database.manifest.parents.get("tokenizer") != tokenizer.manifest.hash:
        raise UserError(
            f"{database.directory} and {tokenizer.directory} do not belong together: expected the "
            "tokeniser that made the chunks"
        )
