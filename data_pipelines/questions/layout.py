"""Questions, answers and passages as tokens, in the paper's form (section 4.2, question answering).

    fill fill fill question: who wrote Emma?\n answer: |  Jane Austen eos
    ---------------- chunk 0, 64 tokens --------------   chunk 1 ...

The prompt is filled on the left, so that the answer begins a chunk: the prompt's last token is the
first one that reads the chunk's neighbours. These are the question's passages, of 128 tokens each:

    bos title: Emma, source: Emma is a novel by Jane Austen ... eos

They are written as documents are cut into chunks, so that passages of a file look like those of a
database. `fill` is the token that begins a document.
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.questions.reader import Passage, QuestionFile
from retro_jax.errors import UserError

PROMPT = "question: {question}\n answer:"
ANSWER = " {answer}"
PASSAGE = "title: {title}, source: {text}"
NEIGHBOUR_LENGTH = 2 * CHUNK_LENGTH


def prompt_chunks(tokenizer: Tokenizer, questions: Sequence[str]) -> list[np.ndarray]:
    """[c_i, 64] int32: each question as a prompt, filled on the left to whole chunks."""
    texts = [PROMPT.format(question=question) for question in questions]
    prompts = []
    for ids in tokenizer.encode_batch(texts):
        chunks = -(-len(ids) // CHUNK_LENGTH)
        rows = np.full(chunks * CHUNK_LENGTH, tokenizer.bos_id, np.int32)
        rows[len(rows) - len(ids) :] = ids
        prompts.append(rows.reshape(chunks, CHUNK_LENGTH))
    return prompts


def prompts_of(file: QuestionFile, tokenizer: Tokenizer, *, most: int) -> list[np.ndarray]:
    """`prompt_chunks` of a file's questions.

    Args:
      file: the questions. tokenizer: of the model. most: chunks of a prompt.

    Raises:
      UserError: a question that is longer; names its row.
    """
    prompts = prompt_chunks(tokenizer, [question.question for question in file.questions])
    for question, prompt in zip(file.questions, prompts, strict=True):
        if len(prompt) > most:
            raise UserError(
                f"{question.place} has a question of {len(prompt)} chunks of {CHUNK_LENGTH} tokens:"
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
