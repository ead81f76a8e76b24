"""Questions, answers and passages as tokens, in the paper's form (section 4.2, question answering).

    bos fill fill question: who wrote Emma?\n answer: |  Jane Austen eos
    -------------- chunk 0, 64 tokens ---------------    chunk 1 ...

The prompt is filled on the left, so that the answer begins a chunk: the prompt's last token is the
first one that reads the chunk's neighbours. These are the question's passages, of 128 tokens each:

    bos title: Emma, source: Emma is a novel by Jane Austen ... eos

They are written as documents are cut into chunks, so that passages of a file look like those of a
database. The fill is a line of text, repeated: a frozen model reads padding as a text that is no text
(docs/facts.md has figures). A database is asked with the question alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.questions.reader import Passage, QuestionFile
from retro_jax.errors import UserError

FILL = "Answer the question from its passages.\n"
PROMPT = "question: {question}\n answer:"
ANSWER = " {answer}"
PASSAGE = "title: {title}, source: {text}"
NEIGHBOUR_LENGTH = 2 * CHUNK_LENGTH


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question as tokens.

    Attributes:
      chunks: [c, 64] int32. filled: how many of the first tokens are bos and fill.
      bos_id: the token that begins a document.
    """

    chunks: np.ndarray
    filled: int
    bos_id: int

    @property
    def tokens(self) -> np.ndarray:
        """[c * 64] int32, as a model reads it."""
        return self.chunks.ravel()

    @property
    def query(self) -> np.ndarray:
        """[c, 64] int32: the chunks that a database is asked with, bos in the place of fill."""
        plain = self.tokens.copy()
        plain[: self.filled] = self.bos_id
        return plain.reshape(self.chunks.shape)


def prompts_of(
    file: QuestionFile, tokenizer: Tokenizer, *, most: int | None = None
) -> list[Prompt]:
    """The questions of a file as prompts, filled on the left to whole chunks.

    Args:
      file: the questions. tokenizer: of the model. most: chunks of a prompt; None for any number.

    Raises:
      UserError: a question that is longer; names its row.
    """
    texts = [PROMPT.format(question=question.question) for question in file.questions]
    fill = tokenizer.encode(FILL * CHUNK_LENGTH)
    prompts = []
    for question, ids in zip(file.questions, tokenizer.encode_batch(texts), strict=True):
        filled = CHUNK_LENGTH - len(ids) % CHUNK_LENGTH  # bos at least
        line = fill[len(fill) - filled + 1 :]
        tokens = np.concatenate([[tokenizer.bos_id], line, ids]).astype(np.int32)
        prompts.append(Prompt(tokens.reshape(-1, CHUNK_LENGTH), filled, tokenizer.bos_id))
        chunks = len(prompts[-1].chunks)
        if most is not None and chunks > most:
            raise UserError(
                f"{question.place} has a question of {chunks} chunks of {CHUNK_LENGTH} tokens:"
                f" expected at most {most}, so that an answer fits into the trained length"
            )
    return prompts


def answer_tokens(tokenizer: Tokenizer, answers: Sequence[str]) -> list[np.ndarray]:
    """[n_i] int32: each answer, and eos."""
    texts = [ANSWER.format(answer=answer) for answer in answers]
    return [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)]


def passage_text(passage: Passage) -> str:
    """A passage as a neighbour's text, and as a document of a database of passages."""
    return PASSAGE.format(title=passage.title, text=passage.text)


def passage_tokens(tokenizer: Tokenizer, passages: Sequence[Passage]) -> np.ndarray:
    """[n, 128] int32: passages between bos and eos, cut or padded on the right."""
    rows = np.full((len(passages), NEIGHBOUR_LENGTH), tokenizer.pad_id, np.int32)
    ids = tokenizer.encode_batch([passage_text(passage) for passage in passages])
    for row, tokens in zip(rows, ids, strict=True):
        whole = [tokenizer.bos_id, *tokens, tokenizer.eos_id][:NEIGHBOUR_LENGTH]
        row[: len(whole)] = whole
    return rows
