"""Questions on a database of facts: prepare, train on them, answer, edit the database, answer again."""

import json
import pathlib

import numpy as np
import pytest
from flax import nnx

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.questions.layout import prompts_of
from data_pipelines.questions.reader import read_questions
from data_pipelines.retriever.retriever import Retriever
from launch import answer, prepare, train
from launch.runs.trained_run import load_model, open_run
from retro_jax.storage import files
from tests.launch.trained import TINY, call

SETTINGS = """
facts/CorpusConfig.name = 'facts'
facts/CorpusConfig.kind = 'jsonl'
facts/CorpusConfig.path = {path!r}
facts/CorpusConfig.id_field = 'id'
facts/CorpusConfig.split = 'train'
DocumentsConfig.corpora = (@facts/CorpusConfig(),)
TokenizerConfig.vocab_size = 320
NeighboursConfig.retriever = 'bm25'
NeighboursConfig.recall_queries = 0
RetroConfig.cca_layers = (2,)
TrainConfig.steps = 4
TrainConfig.checkpoint_every = 4
BatchConfig.sequence_length = 128
BatchConfig.questions = 'some'
"""
TERMS = [f"{a}{b}{c}" for a in "bdg" for b in "aou" for c in "klm"]
ASKED = TERMS[:4]


def write(path: pathlib.Path, rows) -> pathlib.Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(gloss):
    """A document of each term."""
    return [{"id": t, "text": f"title: {t}, source: {gloss(t)}"} for t in TERMS]


@pytest.fixture(name="place", scope="module")
def _place(tmp_path_factory):
    """A folder with facts, questions, and W prepared and trained."""
    folder = tmp_path_factory.mktemp("facts")
    write(folder / "facts.jsonl", documents(lambda t: f"the sound {t[::-1]} made twice"))
    rows = [{"id": t, "question": f"what is {t}?", "answer": f"the sound {t[::-1]}"} for t in ASKED]
    write(folder / "q.jsonl", rows)
    path = str(folder / "facts.jsonl")
    (folder / "facts.gin").write_text(TINY + SETTINGS.format(path=path))
    where = f"--workdir={folder / 'W'}"
    assert call(prepare.main, f"--gin_file={folder / 'facts.gin'}", where) == 0
    assert call(prepare.main, where, f"--questions=some={folder / 'q.jsonl'}") == 0
    assert call(train.main, f"--gin_file={folder / 'facts.gin'}", where) == 0
    return folder


def asked(place, *more, path=None):
    """The answers to the questions, as launch.answer writes them."""
    flags = [f"--workdir={place / 'W'}", f"--questions=q={path or place / 'q.jsonl'}"]
    assert call(answer.main, *flags, "--answer_tokens=3", *more) == 0
    return files.read_json(place / "W" / "evaluation" / "answers-q.json")


def test_answers_are_the_models_and_follow_an_edit_of_the_database(place, capsys):
    """Greedy by uncached logits; a document that was replaced is read by the next answer."""
    run = open_run(place / "W" / "retro")
    parents = files.read_json(run.directory / "parents.json")
    manifest = files.read_json(place / "W" / "questions" / "some" / "manifest.json")
    assert manifest["facts"]["questions"] == len(ASKED) and "questions" in parents
    before = asked(place)
    assert before["conditions"].keys() == {"on", "off"}
    printed = capsys.readouterr().out
    assert "exact match" in printed and "answers-q.json" in printed
    row = before["questions"][2]
    assert row["on"]["passages"][0] == f"facts/{ASKED[2]}" and row["answers"]
    assert 0 <= before["conditions"]["on"]["f1"]["low"] <= before["conditions"]["on"]["f1"]["value"]

    tokenizer = Tokenizer.open(place / "W" / "tokenizer")
    model, retriever = nnx.merge(*load_model(run)), Retriever.open(place / "W")
    prompt = prompts_of(read_questions(str(place / "q.jsonl")), tokenizer)[2]
    tokens = np.concatenate([prompt.tokens, np.full(64, tokenizer.eos_id, np.int32)])[None]
    neighbours = np.zeros((1, 2, 2, 128), np.int32)
    neighbours[0, :1] = retriever.retrieve(prompt.query, 2)
    uncached = nnx.jit(lambda model, tokens, neighbours: model(tokens, neighbours))
    barred = [i for i in tokenizer.special_ids if i != tokenizer.eos_id]
    for end in range(64, 67):
        logits = np.array(uncached(model, tokens, neighbours))[0, end - 1]
        logits[barred] = -np.inf
        tokens[0, end] = logits.argmax()
    text = tokenizer.decode(tokens[0, 64:67]).split("\n")[0]
    assert row["on"]["answer"] == text.strip()

    names = place / "removed.txt"
    names.write_text(f"facts/{ASKED[2]}\n")
    other = documents(
        lambda t: "something else" if t == ASKED[2] else f"the sound {t[::-1]} made twice"
    )
    write(place / "facts.jsonl", other)
    assert call(prepare.main, f"--workdir={place / 'W'}", "--append", f"--remove=@{names}") == 0
    after = asked(place, "--retrieval=on")
    assert after["conditions"].keys() == {"on"} and after["database"] != before["database"]
    assert after["questions"][2]["on"]["passages"][0] == f"facts/{ASKED[2]}"
    assert "something else" in tokenizer.decode(
        Retriever.open(place / "W").retrieve(prompt.query, 1)
    )


def test_passages_of_a_file_take_the_place_of_the_database(place, tmp_path):
    rows = [json.loads(line) for line in (place / "q.jsonl").read_text().splitlines()[:3]]
    given = [row | {"ctxs": [{"title": row["id"], "text": "given"}]} for row in rows]
    path = write(tmp_path / "q.jsonl", given)
    result = asked(place, "--retrieval=on", "--num_neighbours=1", path=path)
    assert result["conditions"]["on"]["neighbours"] == 1
    assert [row["on"]["passages"] for row in result["questions"]] == [[t] for t in TERMS[:3]]


def test_a_bad_question_of_a_later_file_is_found_before_any_is_answered(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(answer.trained_run, "load_model", pytest.fail)
    row = {"question": "what is it?", "answer": "a sound", "ctxs": [{"text": "a text"}]}
    first, second = (f"--questions={name}={tmp_path / name}" for name in "ab")
    write(tmp_path / "a", [row])
    long = row | {"question": "what is it? " * 99}
    for rows, told in (
        ([long], f"{tmp_path / 'b'}:1 has a question of"),
        ([row, row | {"ctxs": [{"text": "other"}]}], "asks the same as"),
    ):
        write(tmp_path / "b", rows)
        assert call(answer.main, f"--workdir={place / 'W'}", first, second) == 1
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "status", "message"),
    [
        ("--questions=q.jsonl", 2, "--questions=q.jsonl: expected NAME=FILE"),
        ("--questions=q=none.jsonl", 1, "none.jsonl"),
        ("--questions=q=a --questions=q=b", 2, "--questions=q=b: expected another name than a's"),
        ("--retrieval=random", 2, "--retrieval=random: expected on, off or both"),
        ("--gin_file=x.gin", 2, "--gin_file and --print_config are of training"),
    ],
)
def test_a_bad_flag_is_refused(place, capsys, flag, status, message):
    flags = [] if flag.startswith("--questions") else [f"--questions=q={place / 'q.jsonl'}"]
    assert call(answer.main, f"--workdir={place / 'W'}", *flag.split(), *flags) == status
    assert message in capsys.readouterr().err
