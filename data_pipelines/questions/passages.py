"""The neighbours of prompts: a file's own passages, or what a database has for a chunk."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from data_pipelines.artefacts.manifest import Path
from data_pipelines.batches.batches import keep_part_of_text, neighbour_length
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.live.database import LiveDatabase
from data_pipelines.questions.layout import Prompt, passage_tokens, prompts_of
from data_pipelines.questions.reader import Question, QuestionFile
from retro_jax.errors import UserError


class Passages(Protocol):
    """What a generator retrieves for the chunks of prompts and answers."""

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """The neighbours [n, K, 128] of chunks [n, 64]."""

    def names(self, chunk: np.ndarray) -> list[str]:
        """What the passages of a prompt's last chunk are called, best first."""


class FoundPassages:
    """What a database has for a chunk, as a RETRO retrieves for any text."""

    def __init__(self, live: LiveDatabase, prompts: Sequence[Prompt], k: int):
        """Asks nothing yet.

        Args:
          live: the database. prompts: asked for without their fill. k: K.
        """
        self._live, self._k = live, k
        self.database = live.chunks
        self._found: dict[bytes, np.ndarray] = {}
        pairs = [pair for p in prompts for pair in zip(p.chunks, p.query, strict=True)]
        self._queries = {_key(chunk): query for chunk, query in pairs}

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """As `Passages`."""
        queries = np.reshape([self._query(chunk) for chunk in chunks], (-1, CHUNK_LENGTH))
        ids, _ = self._live.find(queries, self._k)
        self._found.update(zip(map(_key, queries), ids, strict=True))
        return self._live.values(ids)

    def names(self, chunk: np.ndarray) -> list[str]:
        """CORPUS/ID of the documents that were found."""
        ids = self._found.get(_key(self._query(chunk)), np.zeros(0, np.int64))
        records = [self.database.record(self.database.document(i)) for i in ids[ids >= 0].tolist()]
        return [f"{record.corpus}/{record.id}" for record in records]

    def _query(self, chunk: np.ndarray) -> np.ndarray:
        """What the database is asked with."""
        return self._queries.get(_key(chunk), chunk)


class GivenPassages:
    """The passages of questions as the neighbours of the last chunk of each prompt.

    Other chunks, those of a long question's beginning and of an answer, have none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        questions: Sequence[Question],
        prompts: Sequence[Prompt],
        k: int,
        part: str = "both",
    ):
        """Tokenises the passages.

        Args:
          tokenizer: of the model. questions: with passages. prompts: of each.
          k: K, the first so many passages of each question. part: BatchConfig.neighbour_part.

        Raises:
          UserError: two rows with other passages ask the same, or end alike: a chunk is all that a
            model retrieves by.
        """
        self._none = np.full((k, neighbour_length(part)), tokenizer.pad_id, np.int32)
        self._found: dict[bytes, tuple[Question, Prompt, np.ndarray]] = {}
        passages = [passage for q in questions for passage in q.passages[:k]]
        tokens = keep_part_of_text(passage_tokens(tokenizer, passages), part, tokenizer.pad_id)
        first = 0
        for question, prompt in zip(questions, prompts, strict=True):
            count = len(question.passages[:k])
            rows = self._none.copy()
            rows[:count] = tokens[first : first + count]
            first += count
            mine = question, prompt, rows
            asked, other, found = self._found.setdefault(_key(prompt.chunks[-1]), mine)
            if not np.array_equal(found, rows):
                same = np.array_equal(other.tokens, prompt.tokens)
                how = "asks the same" if same else f"ends with the same {CHUNK_LENGTH} tokens"
                each = "question" if same else f"ending of {CHUNK_LENGTH} tokens"
                raise UserError(
                    f"{question.place} {how} as {asked.place} with other passages: expected one row"
                    f" for each {each}"
                )

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """As `Passages`; padding for chunks that end no prompt."""
        found = [self._found.get(_key(chunk)) for chunk in chunks]
        rows = [self._none if each is None else each[-1] for each in found]
        return np.stack(rows) if rows else np.zeros((0, *self._none.shape), np.int32)

    def names(self, chunk: np.ndarray) -> list[str]:
        """The titles of a prompt's passages."""
        question, *_ = self._found[_key(chunk)]
        return [passage.title for passage in question.passages[: len(self._none)]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A file of questions as a model is asked them.

    Attributes:
      file: the questions. prompts: of each.
      passages: the neighbours of prompts; None without retrieval.
    """

    file: QuestionFile
    prompts: list[Prompt]
    passages: Passages | None


def open_questions(
    workdir: Path, asked: Mapping[str, QuestionFile], *, most: int, k: int, part: str = "both"
) -> dict[str, Asked]:
    """Makes the prompts of files of questions, and opens their passages: the files' own, or W's.

    Args:
      workdir: W. asked: the files by name. most: chunks of a prompt.
      k: K, neighbours of a chunk; 0 for no passages. part: BatchConfig.neighbour_part.

    Raises:
      UserError: a question is too long, rows contradict each other, or W lacks a database that is
        needed.
    """
    tokenizer = Tokenizer.open(pathlib.Path(workdir) / "tokenizer")
    opened: dict[str, Asked] = {}
    live: LiveDatabase | None = None
    for name, file in asked.items():
        prompts = prompts_of(file, tokenizer, most=most)
        passages: Passages | None = None
        if k and file.has_passages:
            passages = GivenPassages(tokenizer, file.questions, prompts, k, part)
        elif k:
            live = live or LiveDatabase.open(workdir, part=part)
            passages = FoundPassages(live, prompts, k)
        opened[name] = Asked(file, prompts, passages)
    return opened


def _key(chunk: np.ndarray) -> bytes:
    """A chunk as a dictionary's key."""
    assert chunk.shape == (CHUNK_LENGTH,)
    return np.ascontiguousarray(chunk, np.int32).tobytes()
