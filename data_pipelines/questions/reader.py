"""Files of questions in the layout of DPR and FiD: JSON lines, or one JSON array; also .gz and .zst.

    {"question": "who wrote Emma?", "answers": ["Jane Austen"], "ctxs": [{"title": ..., "text": ...}]}

A question has "answers" (a list), "answer" (a text or a list) or "target" (a text); FiD has both
"target", which is trained, and "answers", all of which count as right. A file whose rows have no
"ctxs" is answered from a retrieval database.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.corpora.compression import BYTE_ORDER_MARK, read_lines, read_whole
from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.sources import SourceFile, find_files
from retro_jax.errors import UserError

_ANSWERS = ("answers", "answer", "target")


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage that a question is answered from."""

    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of a file of questions.

    Attributes:
      place: the file and the row, for messages.
      id: the row's, or its place in the file.
      question: its text.
      answers: every right answer, the one that is trained first.
      passages: best first; empty where the database is asked.
    """

    place: str
    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] = ()


@dataclasses.dataclass(frozen=True)
class QuestionFile:
    """The questions of a file, in its order.

    Attributes:
      name: the last part of its path. sha256: of its rows.
      questions: at least one.
    """

    name: str
    sha256: str
    questions: tuple[Question, ...]

    @property
    def has_passages(self) -> bool:
        """Whether the rows carry their passages."""
        return bool(self.questions[0].passages)

    def rows(self) -> list[dict[str, Any]]:
        """Id, text and right answers of each question, as results begin."""
        return [
            {"id": q.id, "question": q.question, "answers": list(q.answers)} for q in self.questions
        ]


def read_questions(path: str) -> QuestionFile:
    """Reads a file of questions.

    Args:
      path: a file of this machine or a URL that fsspec reads.

    Raises:
      UserError: no such file, no question in it, or a bad row; names the file and the row.
    """
    digest = hashlib.sha256()
    questions: list[Question] = []
    for file in find_files(path, CorpusConfig("questions", "jsonl", path)):
        for number, row in _rows(file):
            digest.update(json.dumps(row, sort_keys=True).encode())
            question = _question(row, f"{file.path}:{number}", str(number))
            if questions and bool(question.passages) != bool(questions[0].passages):
                has, had = ("", " no") if question.passages else (" no", "")
                raise UserError(
                    f"{question.place} has{has} 'ctxs' and {questions[0].place} has{had}: expected"
                    " passages in every row or in none"
                )
            questions.append(question)
    if not questions:
        raise UserError(f"{path} has no question: expected one JSON object a line")
    name = pathlib.PurePosixPath(path).name
    return QuestionFile(name, digest.hexdigest(), tuple(questions))


def _rows(file: SourceFile) -> Iterator[tuple[int, Any]]:
    """The numbers and objects of a file's rows, from 1."""
    has_rows = False
    for number, line in enumerate(read_lines(file), 1):
        text = _text(line.removeprefix(BYTE_ORDER_MARK), f"{file.path}:{number}").strip()
        if text.startswith("[") and not has_rows:
            yield from enumerate(_parse(_text(read_whole(file), file.path), file.path), 1)
            return
        if text:
            has_rows = True
            yield number, _parse(text, f"{file.path}:{number}")


def _text(data: bytes, place: str) -> str:
    """UTF-8 bytes as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} has byte 0x{data[error.start]:02x} at offset {error.start}: expected UTF-8"
        ) from error


def _parse(text: str, place: str) -> Any:
    """The JSON of a row, or of a whole file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place} is not valid JSON ({error}): expected one object a line, or an array"
        ) from error


def _question(row: Any, place: str, number: str) -> Question:
    """One row."""
    if not isinstance(row, dict):
        raise UserError(f"{place} holds a {type(row).__name__}: expected a JSON object")
    passages: tuple[Passage, ...] = ()
    if "ctxs" in row:
        passages = _passages(row["ctxs"], place)
    return Question(
        place=place,
        id=_unicode(str(row.get("id", number)), f"{place} has a bad 'id'"),
        question=_field(row, "question", place),
        answers=_answers(row, place),
        passages=passages,
    )


def _answers(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The right answers, without repetitions; "target" first where there is one."""
    names = [name for name in reversed(_ANSWERS) if name in row]
    if not names:
        raise UserError(f"{place} has no answer: expected 'answers', 'answer' or 'target'")
    answers: dict[str, None] = {}
    for name in names:
        values = row[name] if isinstance(row[name], list) else [row[name]]
        if not values:
            raise UserError(f"{place} has no answer in {name!r}: expected at least one")
        for value in values:
            answers[_checked(value, f"{place} has a bad answer in {name!r}")] = None
    return tuple(answers)


def _passages(values: Any, place: str) -> tuple[Passage, ...]:
    """The passages of a row."""
    if not isinstance(values, list) or not values:
        raise UserError(f"{place} has no passages in 'ctxs': expected at least one")
    passages = []
    for number, value in enumerate(values, 1):
        where = f"{place}: passage {number} of 'ctxs'"
        if not isinstance(value, dict):
            raise UserError(f"{where} is a {type(value).__name__}: expected title and text")
        title = value.get("title") or ""
        if not isinstance(title, str):
            raise UserError(f"{where} has a title of {type(title).__name__}: expected a string")
        _unicode(title, f"{where} has a bad 'title'")
        passages.append(Passage(title, _field(value, "text", where)))
    return tuple(passages)


def _field(row: Mapping[str, Any], name: str, place: str) -> str:
    """A text that a row cannot do without."""
    if name not in row:
        raise UserError(f"{place} has no {name!r}: expected a text")
    return _checked(row[name], f"{place} has a bad {name!r}")


def _checked(value: Any, subject: str) -> str:
    """A text that is not empty and can be written as UTF-8."""
    if not isinstance(value, str) or not value.strip():
        found = "an empty text" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{subject}, {found}: expected a text")
    return _unicode(value, subject).strip()


def _unicode(value: str, subject: str) -> str:
    """A text that can be written as UTF-8: JSON can spell half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{subject}, a lone surrogate at character {error.start}: expected valid Unicode"
        ) from error
    return value
