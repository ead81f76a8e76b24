"""Questions as batches: where the answer begins, what has a loss, which passages are beside it."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.batches.batches import BatchConfig
from data_pipelines.batches.training_data import copy_training_data, open_training_data
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.questions.layout import FILL, prompts_of
from data_pipelines.questions.passages import GivenPassages
from data_pipelines.questions.prepared import QuestionBatches, prepare_questions
from data_pipelines.questions.reader import Passage, Question, QuestionFile
from retro_jax.errors import UserError
from tests.data_pipelines.small import documents_config, prepare, write_texts

CONFIG = BatchConfig(sequence_length=192, batch_size=4, neighbours=2, prefetch=0, questions="asked")


def question(number: int, text: str, *passages: str) -> Question:
    """A question with an answer of its own."""
    given = tuple(Passage(f"t{i}", passage) for i, passage in enumerate(passages))
    return Question(f"q:{number}", str(number), text, (f"answer {number}",), given)


FILE = QuestionFile(
    "q.jsonl",
    "00",
    tuple(
        question(i, "what is it? " * (6 if i == 3 else 1) + str(i), "one", "two" * i, "three")
        for i in range(6)
    ),
)


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
    """W with a tokeniser, chunks and questions of two passages each."""
    folder = tmp_path_factory.mktemp("questions")
    write_texts(folder / "letters", 20)
    prepare(folder / "W", documents_config(folder / "letters"))
    prepare_questions(folder / "W", "asked", FILE, 2)
    return folder / "W"


def test_a_row_is_a_filled_question_and_its_answer(workdir):
    """The answer begins a chunk and alone has losses; its passages are read from the token before."""
    tokenizer, batches = (
        Tokenizer.open(workdir / "tokenizer"),
        QuestionBatches.read(workdir, CONFIG),
    )
    assert batches.sequences == {"asked": 6} and batches.corpora == ["asked"]
    rows = [batches.rows(step) for step in range(3)]
    order = np.concatenate([batch.documents[:, 0] for batch in rows])
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert list(order[:6]) != list(order[6:])
    batch, numbers = rows[0], order[:4]
    for row, number in enumerate(numbers):
        asked = FILE.questions[number]
        chunks = 2 if number == 3 else 1
        prompt, rest = np.split(batch.tokens[row], [64 * chunks])
        text = f"question: {asked.question}\n answer:"
        fill, question = np.split(prompt, [len(prompt) - len(tokenizer.encode(text))])
        assert tokenizer.decode(question) == text
        assert fill[0] == tokenizer.bos_id and (FILL * 9).endswith(tokenizer.decode(fill[1:]))
        (query,) = prompts_of(dataclasses.replace(FILE, questions=(asked,)), tokenizer)
        np.testing.assert_array_equal(query.tokens, prompt)
        expected = np.append(np.full(len(fill), tokenizer.bos_id), question)
        np.testing.assert_array_equal(query.query.ravel(), expected)
        answer = np.append(tokenizer.encode(f" {asked.answers[0]}"), tokenizer.eos_id)
        np.testing.assert_array_equal(rest[: len(answer)], answer)
        assert (rest[len(answer) :] == tokenizer.pad_id).all()
        targets = np.full(192, tokenizer.pad_id)
        targets[len(prompt) - 1 : len(prompt) + len(answer) - 1] = answer
        np.testing.assert_array_equal(batch.targets[row], targets)
        assert (batch.documents[row] == [number, number, number if chunks == 2 else -1]).all()
        read = batch.neighbours[row, chunks - 1]
        for slot, passage in zip(read, asked.passages, strict=False):
            title = f"title: {passage.title}, source: {passage.text}"
            assert tokenizer.decode(slot) == title
            assert slot[0] == tokenizer.bos_id and tokenizer.eos_id in slot
        others = np.delete(batch.neighbours[row], chunks - 1, axis=0)
        assert (others == tokenizer.pad_id).all()
    assert batches.document_ids(0)[0] == f"question {numbers[0] + 1} of q.jsonl"
    one = dataclasses.replace(CONFIG, neighbours=1, neighbour_part="continuation")
    chosen = QuestionBatches.read(workdir, one).rows(0, [1]).neighbours
    assert chosen.shape == (1, 3, 1, 128) and (chosen[..., :64] == tokenizer.pad_id).all()
    # Passages begin with their title: of these the first tokens are read.
    short = dataclasses.replace(CONFIG, neighbours=1, neighbour_part="last_96")
    first = QuestionBatches.read(workdir, short).rows(0, [1]).neighbours
    whole = dataclasses.replace(CONFIG, neighbours=1)
    expected = QuestionBatches.read(workdir, whole).rows(0, [1]).neighbours[..., :96]
    np.testing.assert_array_equal(first, expected)


def test_a_long_answer_is_cut_at_the_sequence(workdir, tmp_path):
    asked = dataclasses.replace(FILE.questions[0], answers=("word " * 100,))
    prepare_questions(workdir, "long", dataclasses.replace(FILE, questions=(asked,)), 2)
    config = dataclasses.replace(CONFIG, sequence_length=128, questions="long", batch_size=1)
    batch = QuestionBatches.read(workdir, config).rows(0)
    assert (batch.targets[0, 63:] != 0).all() and (batch.targets[0, :63] == 0).all()


def test_a_run_records_the_questions_and_refuses_others(workdir):
    data = open_training_data(workdir, CONFIG)
    assert data.parents.keys() == {"chunks/train", "questions"} and data.pad_id == 0
    with pytest.raises(UserError, match=r"expected 0, and launch.answer afterwards"):
        data.held_out()
    with pytest.raises(UserError, match="file"):
        prepare_questions(workdir, "asked", dataclasses.replace(FILE, sha256="01"), 2)
    for change, message in (
        ({"questions": "none"}, "none has no manifest.json"),
        ({"questions": "a/b"}, "questions 'a/b': expected a name without slashes"),
        ({"questions": ".."}, "questions '..': expected .* that does not begin with a dot"),
        ({"questions": ".tmp"}, "questions '.tmp': expected .* that does not begin with a dot"),
        ({"neighbours": 3}, "neighbours is 3: expected at most 2"),
        ({"sequence_length": 128}, "sequence_length is 128: expected at least 192"),
    ):
        with pytest.raises(UserError, match=message):
            open_training_data(workdir, dataclasses.replace(CONFIG, **change))
    with pytest.raises(UserError, match="expected '' with data in a bucket"):
        copy_training_data("memory://b/W", CONFIG, workdir, held_out=False, parents=None)
    with pytest.raises(
        ValueError, match=r"mixture is .*: expected None where BatchConfig.questions"
    ):
        dataclasses.replace(CONFIG, mixture={"asked": 1.0})


def test_passages_of_a_file_are_those_of_the_prompts_last_chunk(workdir):
    tokenizer = Tokenizer.open(workdir / "tokenizer")
    prompts = prompts_of(FILE, tokenizer, most=2)
    given = GivenPassages(tokenizer, FILE.questions, prompts, 3)
    batch = QuestionBatches.read(workdir, CONFIG).rows(0)
    for row, number in enumerate(batch.documents[:, 0]):
        found = given(prompts[number].chunks)
        np.testing.assert_array_equal(found[:, :2], batch.neighbours[row, : len(found)])
        assert given.names(prompts[number].chunks[-1]) == ["t0", "t1", "t2"]
    assert (given(np.zeros((1, 64), int)) == tokenizer.pad_id).all()
    twice = (FILE.questions[0], dataclasses.replace(FILE.questions[1], question="what is it? 0"))
    prompts = prompts_of(dataclasses.replace(FILE, questions=twice), tokenizer, most=1)
    with pytest.raises(UserError, match="q:1 asks the same as q:0 with other passages"):
        GivenPassages(tokenizer, twice, prompts, 2)
    long = [question(i, f"{i} {'what is it? ' * 20}", f"passage {i}") for i in range(2)]
    prompts = prompts_of(dataclasses.replace(FILE, questions=tuple(long)), tokenizer)
    with pytest.raises(UserError, match="q:1 ends with the same 64 tokens as q:0 with other"):
        GivenPassages(tokenizer, long, prompts, 2)
    with pytest.raises(UserError, match=r"q:3 has a question of 2 chunks of 64 .* at most 1"):
        prompts_of(FILE, tokenizer, most=1)
