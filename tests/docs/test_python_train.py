"""docs/python.md, section "Train": its code runs, and trains what it says."""

import contextlib
import html
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import httpx2
import numpy as np
import pytest

from data_pipelines.chunk_database.tokenizer import Tokenizer
from launch import evaluate, serve
from launch.runs import trained_run
from retro_jax.batch import text_mask
from retro_jax.errors import UserError
from retro_jax.train.checkpoint import latest_step
from retro_jax.train.curves import read_curve
from retro_jax.train.record import recorded_parents
from tests.launch.trained import call
from tests.ports import free_port

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "python.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^## Train\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


@pytest.fixture(name="names", scope="module")
def _names(prepared_workdir, tmp_path_factory):
    """The names that the section's code defines, run on a copy of a prepared W."""
    folder = tmp_path_factory.mktemp("python")
    shutil.copytree(prepared_workdir, folder / "W")
    names: dict = {}
    (section,) = _SECTION.findall(PAGE.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in _BLOCK.findall(section):
            exec(compile(block, str(PAGE), "exec"), names)
        yield names, folder / "W"


def test_the_page_trains_a_run_that_the_commands_open(names):
    values, workdir = names
    lines = read_curve(workdir / "retro" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]
    run = trained_run.open_run(workdir / "retro")
    assert (run.step, run.model) == (20, values["settings"].retro)
    assert run.batches == values["data"].batches.config
    trained_run.check_data(run, workdir)
    assert recorded_parents(workdir / "retro") == values["data"].parents


def test_a_hook_stops_a_run_and_the_model_is_used(names):
    values, workdir = names
    assert values["reached"] == latest_step(workdir / "second" / "checkpoints") == 10
    assert list(values["norms"]) == [5, 10]
    assert values["logits"].shape == (8, 128, values["data"].vocab_size)
    assert np.isfinite(values["logits"]).all()


def test_the_generator_is_opened_and_used(names):
    values, _ = names
    result, generator = values["result"], values["generator"]
    assert result.ended == "length" and len(result.tokens) == 70
    assert values["piece"].result.text == result.text
    assert len(result.neighbours) == 1 and len(result.neighbours[0]) == 2
    assert len(values["found"]) == 2 and values["found"][0].score <= values["found"][1].score
    with pytest.raises(UserError, match="retrieval is 3 neighbours: expected 0 to 2"):
        generator.generate(["a"], retrieval=3)
    with pytest.raises(UserError, match=r"revisions/00007/database has no manifest.json"):
        type(generator).open("W", revision=7)
    with pytest.raises(UserError, match=r"has no config.gin: expected a trained model"):
        type(generator).open("W", run="none")


def test_scores_of_texts_are_those_of_the_command(names):
    """The test split's documents as texts, in the order of the split."""
    values, workdir = names
    assert call(evaluate.main, f"--workdir={workdir}", "--retrieval=on,off") == 0
    results = json.loads((workdir / "evaluation" / "test.json").read_text())
    database, generator = values["split"].database, values["generator"]
    records, texts = list(database.records()), []
    for record in records:
        chunks = database.chunks(np.arange(record.first_chunk, record.first_chunk + record.chunks))
        texts.append(generator.codec.decode(chunks[chunks != database.pad_id]))
    for name, retrieval in (("on", True), ("off", False)):
        nll = np.load(workdir / "evaluation" / results[name]["nll"])
        for record, scored in zip(
            records, generator.score(texts, retrieval=retrieval), strict=True
        ):
            own = nll[record.first_chunk : record.first_chunk + record.chunks].reshape(-1)
            values_ = [*scored.log_probabilities, scored.end_log_probability]
            np.testing.assert_allclose(values_, -own[1 : 1 + len(values_)], atol=1e-4)


def nats_by_the_command(workdir: pathlib.Path, name: str, database: Any) -> tuple[str, float]:
    """The longest text that any window sees whole, and its nats as launch.evaluate has them."""
    results = json.loads((workdir / "evaluation" / "test.json").read_text())
    settings = results[name]["settings"]
    most = settings["window_chunks"] - settings["stride_chunks"] + 1
    record = max((r for r in database.records() if r.chunks <= most), key=lambda r: r.chunks)
    ids = np.arange(record.first_chunk, record.first_chunk + record.chunks)
    tokens, nll = database.chunks(ids), np.load(workdir / "evaluation" / results[name]["nll"])[ids]
    inside = text_mask(tokens, np.zeros(len(ids)), eos_id=database.eos_id, pad_id=database.pad_id)
    return Tokenizer.open(workdir / "tokenizer").decode(tokens[inside]), float(nll[inside].sum())


def nats_by_the_server(url: str, text: str, *, retrieval: bool) -> float:
    """The nats of a text as lm-eval asks for them."""
    body = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "retrieval": retrieval}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=240).json()
    return -sum(answer["choices"][0]["logprobs"]["token_logprobs"][:-1])


@contextlib.contextmanager
def served(workdir: pathlib.Path, port: int):
    """The command as a process of its own, which answers; killed if it is still there at the end."""
    words = [f"--workdir={workdir}", f"--port={port}", "--nowarm_up", "--documents"]
    command = [sys.executable, "-m", "launch.serve", *words]
    root = pathlib.Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root) as server:
        try:
            while server.poll() is None:
                with contextlib.suppress(httpx2.TransportError):
                    if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                time.sleep(0.05)
            yield server
        finally:
            server.kill()


def test_the_command_serves_until_it_is_asked_to_stop(names, capfd):
    """Scores as launch.evaluate's; SIGTERM while a stream runs: it is whole, and the status is 0."""
    values, workdir = names
    database, port, lines = values["split"].database, free_port(), []
    url = f"http://127.0.0.1:{port}"
    asked = {"prompt": "The history of the city", "max_tokens": 70, "temperature": 0}
    with served(workdir, port) as server:
        assert server.poll() is None  # what it says is shown with the failure
        for name, retrieval in (("on", True), ("off", False)):
            text, nats = nats_by_the_command(workdir, name, database)
            assert nats_by_the_server(url, text, retrieval=retrieval) == pytest.approx(
                nats, abs=1e-3
            )
        trace = httpx2.post(f"{url}/trace", json=asked, timeout=240).json()
        body = asked | {"stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=240) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 1:
                    server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=120) == 0
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line[6:7] == "{"]
    assert "".join(pieces) == values["result"].text
    neighbour = values["result"].neighbours[0][0]
    assert f"<b>{html.escape(neighbour.document)}</b>" in trace["html"]
    assert trace["retrieval"]["revision"] == neighbour.revision
    assert call(serve.main, f"--workdir={workdir}", "--host=0.0.0.0") == 2
    assert "--host=0.0.0.0: expected --api_key" in capfd.readouterr().err


def test_the_scores_are_those_of_the_command(names):
    values, workdir = names
    assert call(evaluate.main, f"--workdir={workdir}", "--retrieval=on") == 0
    results = json.loads((workdir / "evaluation" / "test.json").read_text())["on"]["corpora"]
    assert values["scores"].keys() == results.keys()
    for corpus, score in values["scores"].items():
        expected = results[corpus]["bits_per_byte"]
        assert score.bits_per_byte == pytest.approx(expected, rel=1e-5)
