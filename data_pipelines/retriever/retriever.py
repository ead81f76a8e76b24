"""Chunks in, nearest chunks of other documents out: offline for the tables, live while generating.

    dense        the nearest by their keys
    dense+bm25   so many nearest by their keys, the best of these by BM25
    bm25         the best by BM25; there need not be any keys

search.py has a class for each.
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
from data_pipelines.retriever.candidates import Found
from data_pipelines.retriever.embedder import PACKAGED_MODELS, BertFolder, Embedder
from data_pipelines.retriever.index import Index
from data_pipelines.retriever.keys import ChunkEncoder, Keys
from data_pipelines.retriever.prefixes import Prefixes
from data_pipelines.retriever.queries import NewChunks
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.search import ChunkSearch, Dense, Reranked
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

RETRIEVERS = ("dense", "bm25", "dense+bm25")


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
        candidates = {"candidates": self.candidates} if self.by_keys else {}
        return {"score": "bm25", "retriever": self.retriever} | candidates

    def __str__(self) -> str:
        """As an error names it."""
        of = f" of {self.candidates} candidates" if self.by_keys and self.by_terms else ""
        return f"{self.retriever!r}{of}"

    @classmethod
    def of(cls, workdir: Path) -> "Ranking":
        """That of a workdir's tables; the first one where there are none."""
        path = pathlib.Path(workdir) / "neighbours" / "train"
        if not (path / MANIFEST_FILE).is_file():
            return cls()
        settings = Manifest.read(path).settings
        return cls(**{f.name: settings.get(f.name, f.default) for f in dataclasses.fields(cls)})

    def search(self, database: Database) -> ChunkSearch:
        """What finds the nearest chunks of a database; opens the parts that it reads."""
        if not self.by_keys:
            return database.bm25
        dense = Dense(database)
        return Reranked(dense, database.bm25, self.candidates) if self.by_terms else dense


class Retriever:
    """A retrieval database that can be searched.

    Attributes:
      source: the database: chunks, keys, index.
      ranking: what is near.
      search: what finds it.
    """

    def __init__(
        self,
        source: Database,
        ranking: Ranking = Ranking(),
        *,
        tokenizer: Tokenizer | None = None,
        model: str | None = None,
    ) -> None:
        """Use `open`; without a tokeniser it can search, but not embed."""
        self.source, self.ranking = source, ranking
        self.search = ranking.search(source)
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
        source = Database.open(workdir, revision, verify=verify)
        for part in getattr(source.chunks, "parts", [source.chunks]):
            _check_tokenizer(part, tokenizer)
        ranking = Ranking.of(workdir) if ranking is None else ranking
        return cls(source, ranking, tokenizer=tokenizer, model=model)

    def __reduce__(self) -> tuple[Callable[..., "Retriever"], tuple[Any, ...]]:
        """Pickles for searching: worker processes map and load the files, but cannot embed."""
        return Retriever, (self.source, self.ranking)

    @property
    def database(self) -> ChunkDatabase:
        """The chunks; ids are its."""
        return self.source.chunks

    @property
    def keys(self) -> Keys:
        """The database's keys; a UserError where they are not compared."""
        if not self.ranking.by_keys:
            raise UserError(
                f"{self.database.directory} is searched by BM25 alone: expected the retriever 'dense'"
                " or 'dense+bm25' where keys are needed"
            )
        return self.source.keys

    @property
    def index(self) -> Index:
        """The index over the keys."""
        return self.source.index

    @functools.cached_property
    def encoder(self) -> ChunkEncoder:
        """Chunks to keys, exactly as the database's own were made.

        Raises:
          UserError: the model is not the one that made the keys.
        """
        if self._tokenizer is None:
            raise UserError(f"{self.keys.directory}: expected a tokeniser to embed with")
        return _encoder(self.keys, self._tokenizer, self._bert, self._bert.prefixes.query)

    @functools.cached_property
    def _bert(self) -> BertFolder:
        """The BERT that made the keys."""
        return _bert_of(self.keys, self._model)

    def check_model(self) -> None:
        """Finds the BERT that queries need, long before the first of them.

        Raises:
          UserError: it is not there, or is not the one that made the keys.
        """
        if self.ranking.by_keys:
            _ = self._bert

    @classmethod
    def encoder_of(cls, workdir: Path, keys: Keys, *, model: str | None = None) -> ChunkEncoder:
        """What embeds chunks as some keys of a workdir were made; errors as for `encoder`."""
        tokenizer = Tokenizer.open(pathlib.Path(workdir) / "tokenizer")
        prefix = keys.manifest.settings.get("prefix", "")
        return _encoder(keys, tokenizer, _bert_of(keys, model), prefix)

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
    ) -> Found:
        """As `retrieve`, but chunk ids and scores as `ChunkSearch.find` gives them."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != CHUNK_LENGTH:
            raise UserError(
                f"chunks have shape {tokens.shape}: expected [C, {CHUNK_LENGTH}] tokens"
            )
        chunks = NewChunks(tokens, lambda new: self.encoder.keys(new))
        return self.search.find(chunks, k, exclude_documents)


def _encoder(keys: Keys, tokenizer: Tokenizer, bert: BertFolder, prefix: str) -> ChunkEncoder:
    """The encoder that made some keys, or makes those that are compared with them."""
    return ChunkEncoder(tokenizer, Embedder.shared(bert), keys.manifest.settings["dtype"], prefix)


def _bert_of(keys: Keys, model: str | None) -> BertFolder:
    """The BERT that made some keys; a UserError if it is not there."""
    made_by = keys.manifest.settings["embedder"]
    name = model or made_by["model"]
    if keys.are_given:
        raise UserError(
            f"{keys.directory} was given as arrays ({keys.model!r}): no model is here to embed"
            " other texts, expected keys of all that is compared"
        )
    if model is None and name not in PACKAGED_MODELS:
        raise UserError(
            f"{keys.directory} was made by the BERT folder {name!r}: expected its path"
            " (--bert_folder, or model= in Python)"
        )
    folder = BertFolder.open(name, Prefixes.recorded(made_by))
    if files.plain(folder.identity) | {"model": ""} != made_by | {"model": ""}:
        raise UserError(
            f"{folder.folder} is not the BERT that made {keys.directory}: expected "
            f"model.safetensors {made_by['sha256']['model.safetensors'][:12]}, found "
            f"{folder.identity['sha256']['model.safetensors'][:12]}, or other settings"
        )
    return folder


def _check_tokenizer(database: ChunkDatabase, tokenizer: Tokenizer) -> None:
    """Raises unless the database was made with the tokeniser."""
    if database.manifest.parents.get("tokenizer") != tokenizer.manifest.hash:
        raise UserError(
            f"{database.directory} and {tokenizer.directory} do not belong together: expected the "
            "tokeniser that made the chunks"
        )
