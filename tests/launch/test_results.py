"""Evaluate, sample and report on a slice of the real corpora, with a RETRO of a few steps."""

import html
import importlib
import json
import math
import pathlib
import re
import shlex
import shutil
import xml.etree.ElementTree

import numpy as np
import pytest

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.splits import open_split
from data_pipelines.retriever.retriever import Retriever
from launch import compare, evaluate, report, sample
from launch.runs import trained_run
from retro_jax.evaluate import score
from retro_jax.evaluate.token_mixture import num_classes
from tests.conftest_prepared import SLICE
from tests.launch.test_tutorial import ONE_MACHINE
from tests.launch.trained import TINY, call


def test_every_condition_is_scored_with_the_documents_own_denominators(
    evaluated: dict, prepared_workdir: pathlib.Path
):
    tokenizer = Tokenizer.open(prepared_workdir / "tokenizer")
    expected: dict[str, np.ndarray] = {}
    for shard in sorted((prepared_workdir / "documents" / "test").glob("*.jsonl")):
        for line in shard.read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            text = document["text"]
            counts = [len(text.encode()), len(text.split()), text.count("\n"), 1]
            counts.append(len(tokenizer.encode(text)))
            corpus = document["corpus"]
            expected[corpus] = expected.get(corpus, np.zeros(5, int)) + np.array(counts)
    assert set(expected) == {"python", "wikipedia"}
    assert list(evaluated) == ["baseline", "off", "on"]
    for result in evaluated.values():
        assert set(result["corpora"]) == set(expected)
        for corpus, wanted in expected.items():
            figures = result["corpora"][corpus]
            names = ("bytes", "words", "lines", "documents", "tokens")
            assert [figures[name] for name in names] == wanted.tolist()
            assert figures["eos_tokens"] == figures["documents"]
            bits = figures["nats"] / math.log(2)
            assert figures["bits_per_byte"] == pytest.approx(bits / figures["bytes"])
            assert 1 < figures["bits_per_byte"] < 8
        assert result["all"]["tokens"] == sum(wanted[4] for wanted in expected.values())


def test_the_arrays_hold_what_was_summed(
    evaluated: dict, workdir: pathlib.Path, prepared_workdir: pathlib.Path
):
    database = ChunkDatabase.open(prepared_workdir / "chunks" / "test")
    tokens = database.chunks(np.arange(len(database)))
    scored = {name: np.load(workdir / "evaluation" / r["nll"]) for name, r in evaluated.items()}
    for name, nll in scored.items():
        assert nll.shape == (len(database), 64)
        assert not nll[tokens == database.pad_id].any()
        text = (tokens != database.pad_id) & (tokens != database.eos_id)
        assert nll[text].sum(dtype=np.float64) == pytest.approx(evaluated[name]["all"]["nats"])
    # Neighbours change a chunk only by way of the chunk before it.
    changed = np.abs(scored["on"] - scored["off"]).max(axis=1) > 1e-4
    owners = database.documents(np.arange(len(database)))
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    assert not changed[first].any()
    assert changed.mean() > 0.3


@pytest.mark.parametrize("condition", ["baseline", "off", "on"])
def test_scores_over_eight_devices_are_those_of_one(
    condition: str, evaluated: dict, workdir: pathlib.Path, prepared_workdir: pathlib.Path
):
    run = trained_run.open_run(workdir / ("baseline" if condition == "baseline" else "retro"))
    text = open_split(prepared_workdir, "test", neighbours=2).text(2 if condition == "on" else 0)
    losses = score.compiled_token_losses(*trained_run.load_model(run))
    alone = score.score_chunks(losses, text, score.WindowConfig(chunks=4, stride=2, batch_size=3))
    together = np.load(workdir / "evaluation" / evaluated[condition]["nll"])
    assert np.abs(alone - together).max() < 1e-4 * alone.max()


def test_the_table_is_printed_and_what_is_there_is_reused(
    evaluated: dict, trained: list[str], monkeypatch, capsys
):
    monkeypatch.setattr(trained_run, "load_model", lambda *_: pytest.fail("scored again"))
    assert call(evaluate.main, *trained) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "bits",
        "per",
        "byte",
        "baseline",
        "RETRO[OFF]",
        "RETRO[ON]",
        "ON",
        "vs",
        "OFF",
    ]
    assert [line.split()[0] for line in lines[1:4]] == ["python", "wikipedia", "all"]
    names = ("baseline", "off", "on")
    figures = [f"{evaluated[name]['all']['bits_per_byte']:.4f}" for name in names]
    assert lines[3].split()[1:4] == figures
    assert "RETRO[ON] at step 6" in lines[4]


def test_figures_by_overlap_are_printed_and_written(
    evaluated: dict, trained: list[str], workdir: pathlib.Path, prepared_workdir, capsys
):
    assert call(evaluate.main, *trained) == 0
    shown = capsys.readouterr().out
    folder = workdir / "evaluation"
    found = json.loads((folder / "test-overlap.json").read_text())
    assert found["neighbours"] == 10
    by_place = {(row["corpus"], row["at_most"]): row for row in found["rows"]}
    assert len(by_place) == 3 * 8
    for name, result in evaluated.items():
        for corpus, figures in [*result["corpora"].items(), ("", result["all"])]:
            row = by_place[corpus, 1.0]
            assert row["bytes"] == figures["bytes"]
            assert row["bits_per_byte"][name]["value"] == pytest.approx(figures["bits_per_byte"])
            # Every figure has its interval, also where there is no curve; the two are one.
            sure = figures["intervals"]
            assert set(sure) == {"bits_per_byte", "bits_per_token", "word_perplexity"}
            for figure, ends in sure.items():
                assert ends["value"] == pytest.approx(figures[figure])
                assert ends["low"] < ends["value"] < ends["high"]
            assert sure["bits_per_byte"] == pytest.approx(row["bits_per_byte"][name])
    told = by_place["", 1.0]["differences"]["on-off"]
    assert evaluated["on"]["all"]["differences"]["off"] == pytest.approx(told)
    text = (folder / "test.md").read_text()
    assert f"| RETRO[ON] - RETRO[OFF] | {told['value']:+.4f} [{told['low']:+.4f}, " in text
    # Chunks under the threshold are those whose own neighbours share little with them.
    split = open_split(prepared_workdir, "test", neighbours=10)
    tokens, near = split.database.chunks(split.ids), split.neighbours(split.ids, 10)
    few = 0
    for chunk, values in zip(tokens, near, strict=True):
        runs = {tuple(v[i : i + 33]) for v in values.tolist() for i in range(96)}
        text = chunk[~np.isin(chunk, [0, 1, 2])].tolist()
        few += bool(text) and not any(
            tuple(text[i : i + 33]) in runs for i in range(len(text) - 32)
        )
    assert by_place["", 0.5]["chunks"] == few
    assert f"all, r(C) <= 50%: {few} chunks" in shown
    difference = by_place["", 0.5]["differences"]["on-baseline"]
    assert f"RETRO[ON] - baseline: {difference['value']:+.4f} [{difference['low']:+.4f}" in shown
    lines = (folder / "test-overlap.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 8
    assert "on-off_low" in lines[0].split(",")
    drawing = xml.etree.ElementTree.parse(folder / "test-overlap.svg").getroot()
    assert len(drawing.findall(".//{*}polyline")) == 3


def test_without_a_neighbour_table_there_are_no_figures_by_overlap(
    trained: list[str], prepared_workdir: pathlib.Path, tmp_path: pathlib.Path, capsys
):
    for kind in ("chunks", "tokenizer"):
        (tmp_path / kind).symlink_to(prepared_workdir / kind)
    more = [f"--data={tmp_path}", "--retrieval=off", "--split=validation"]
    assert call(evaluate.main, *trained, *more) == 0
    assert f"no figures by overlap: {tmp_path} has no neighbours" in capsys.readouterr().out


def test_a_part_of_the_documents_and_one_condition(trained: list[str], tmp_path, capsys):
    more = ["--max_documents=2", "--retrieval=on", "--split=validation", "--stride_chunks=4"]
    assert call(evaluate.main, *trained, *more, "--num_neighbours=1") == 0
    shown = capsys.readouterr().out
    assert "OFF" not in shown
    assert "(validation: 4 documents" in shown


def test_overlap_gives_context_and_so_changes_scores_but_not_what_is_counted(
    evaluated: dict, trained: list[str], workdir: pathlib.Path
):
    assert call(evaluate.main, *trained, "--overlap=0,0.75", "--retrieval=off") == 0
    finer = json.loads((workdir / "evaluation" / "test.json").read_text())["off"]
    assert finer["all"]["tokens"] == evaluated["off"]["all"]["tokens"]
    assert finer["all"]["nats"] != evaluated["off"]["all"]["nats"]
    assert finer["nll"] != evaluated["off"]["nll"]
    assert finer["settings"]["stride_chunks"] == 1
    found = json.loads((workdir / "evaluation" / "test-windows.json").read_text())
    none, most = found["rows"]
    assert (none["overlap"], most["overlap"]) == (0, 0.75)
    figures = [row["figures"]["off"] for row in found["rows"]]
    assert figures[1]["nats"] == finer["all"]["nats"] != figures[0]["nats"]
    assert figures[0]["tokens"] == finer["all"]["tokens"]
    shown = f"| 0.75 | {most['figures']['baseline']['bits_per_byte']:.4f} | "
    assert (
        shown + f"{figures[1]['bits_per_byte']:.4f} |"
        in (workdir / "evaluation/test.md").read_text()
    )
    assert call(report.main, *trained) == 0
    assert "By overlap of windows" in (workdir / "report.html").read_text(encoding="utf-8")
    assert (
        call(evaluate.main, *trained, "--retrieval=off") == 0
    )  # of half a window: not in the table
    assert call(report.main, *trained) == 0
    assert "By overlap of windows" not in (workdir / "report.html").read_text(encoding="utf-8")
    assert call(evaluate.main, *trained) == 0  # the summary again


def test_neighbours_of_a_split_are_what_the_retriever_finds(prepared_workdir: pathlib.Path):
    split = open_split(prepared_workdir, "test", neighbours=2)
    ids = split.ids[:6]
    live = Retriever.open(prepared_workdir).retrieve(split.database.chunks(ids), 2)
    table = split.neighbours(np.concatenate([ids, [-1]]), 2)
    assert (table[:-1] == live).mean() > 0.99  # keys of other batches differ in their last bits
    assert (table[-1] == split.database.pad_id).all()


@pytest.mark.parametrize(
    ("main", "arguments", "status", "message"),
    [
        (evaluate.main, ["--split=tset"], 1, "there is no"),
        (evaluate.main, ["--retrieval=maybe"], 2, "--retrieval=maybe: expected some of on, off"),
        (evaluate.main, ["--retrieval="], 2, "expected some of on, off, random, oracle"),
        (evaluate.main, ["--stride_chunks=5"], 2, "--stride_chunks=5: expected at most 4"),
        (evaluate.main, ["--overlap=0.8"], 2, "--overlap=0.8: expected a share of 4 chunks"),
        (evaluate.main, ["--overlap=0,x"], 2, "--overlap=x: expected numbers from 0 to 1"),
        (evaluate.main, ["--overlap=1"], 2, "--overlap=1: expected a share of 4 chunks"),
        (evaluate.main, ["--overlap=0.5", "--stride_chunks=2"], 2, "expected one of them"),
        (evaluate.main, ["--sweep=1,x"], 2, "--sweep=x: expected whole numbers from 1"),
        (evaluate.main, ["--sweep=1.5"], 2, "--sweep=1.5: expected whole numbers from 1"),
        (evaluate.main, ["--database_shares=2"], 2, "--database_shares=2: expected numbers from 0"),
        (
            evaluate.main,
            ["--database_shares=0.5,0.5000001"],
            2,
            "--database_shares=0.5000001: expected other digits than 0.5",
        ),
        (evaluate.main, ["--credit=nan"], 2, "--credit=nan: expected a number"),
        (sample.main, ["--prompt=x", "--top_p=nan"], 2, "--top_p=nan: expected a number"),
        (
            evaluate.main,
            ["--split=train", "--database_shares=0.1"],
            1,
            "of the training split itself: expected validation, test",
        ),
        (evaluate.main, ["--split=train", "--revisions=0"], 2, "another text at each: expected"),
        (evaluate.main, ["--slices=c4:x"], 2, "--slices=c4:x: expected a name, or pile: and a"),
        (evaluate.main, ["--slice_paths=c4=x"], 2, "--slice_paths=c4=x: expected NAME=PATH"),
        (evaluate.main, ["--num_neighbours=99"], 1, "expected 99 at least"),
        (evaluate.main, ["--data=/nowhere"], 1, "/nowhere/chunks/train"),
        (evaluate.main, ["--workdir=/nowhere"], 1, "has no checkpoint: expected a trained model"),
        (evaluate.main, ["--gin_file=x.gin"], 2, "--gin_file and --print_config are of training"),
        (sample.main, [], 2, "--prompt is missing: expected a text to continue"),
        (sample.main, ["--prompt=x", "--top_p=0"], 1, "SamplingConfig.top_p is 0.0"),
        (sample.main, ["--prompt=x", "--retrieval=on,off"], 2, "expected on or off"),
        (sample.main, ["--prompt=x", "--workdir=/nowhere"], 1, "has no checkpoint"),
        (sample.main, ["--prompt=x", "--trace=/nowhere/x.html"], 1, "in a directory that is there"),
        (sample.main, ["--prompt=x", "--json_lines=/nowhere/x"], 1, "in a directory that is there"),
        (sample.main, ["--prompts_file=/nowhere/x"], 1, "cannot be read"),
        (report.main, ["--split=train"], 1, "train.json is missing: expected the result of"),
    ],
)
def test_bad_input_is_one_line(trained: list[str], main, arguments, status, message, capsys):
    assert call(main, *trained, *arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


PROMPTS = ["--prompt=import json\n\n\ndef load(", "--prompt=" + "The river flows. " * 40]
SETTINGS = ["--max_tokens=70", "--min_tokens=70", "--temperature=0.9", "--top_k=20", "--seed=5"]


@pytest.fixture(scope="module")
def sampled(trained: list[str], workdir: pathlib.Path) -> dict:
    """What launch.sample wrote."""
    before, page = set(workdir.glob("samples/*.json")), f"--trace={workdir / 'trace.html'}"
    assert call(sample.main, *trained, *PROMPTS, *SETTINGS, page) == 0
    (path,) = set(workdir.glob("samples/*.json")) - before
    return json.loads(path.read_text(encoding="utf-8"))


def test_samples_hold_the_neighbours_of_their_own_chunks(
    sampled: dict, prepared_workdir: pathlib.Path
):
    retriever = Retriever.open(prepared_workdir)
    tokenizer = Tokenizer.open(prepared_workdir / "tokenizer")
    assert [s["prompt"] for s in sampled["samples"]] == [p.partition("=")[2] for p in PROMPTS]
    for one in sampled["samples"]:
        tokens = np.array(one["tokens"])
        assert tokens[0] == tokenizer.bos_id
        assert one["text"].startswith(one["prompt"])
        assert one["text"] == tokenizer.decode(tokens)
        used = (len(tokens) - 1) // 64
        assert used > 0
        found, distances = retriever.neighbours(tokens[: 64 * used].reshape(-1, 64), 2)
        for u, chunk in enumerate(one["chunks"]):
            views = chunk["neighbours"]
            if u >= used:
                assert views == []
                continue
            names = [retriever.database.record(retriever.database.document(i)).id for i in found[u]]
            assert [view["document"] for view in views] == names
            assert [v["distance"] for v in views] == pytest.approx(distances[u].tolist(), rel=1e-3)
            value = retriever.database.value(found[u, 0])
            for part, tokens_of_part in (("chunk", value[:64]), ("continuation", value[64:])):
                text = "".join(span["text"] for span in views[0][part])
                assert text == tokenizer.decode(tokens_of_part)


def test_the_same_request_is_read_and_shown_again(
    sampled: dict, trained: list[str], monkeypatch, capsys
):
    monkeypatch.setattr(trained_run, "load_model", lambda *_: pytest.fail("sampled again"))
    assert call(sample.main, *trained, *PROMPTS, *SETTINGS) == 0
    shown = capsys.readouterr().out
    assert "sample 2 of 2" in shown
    assert "import json" in shown
    assert "● " + sampled["samples"][0]["chunks"][0]["neighbours"][0]["document"] in shown


def test_other_weights_of_the_mixture_are_another_sample(trained, workdir, monkeypatch):
    """A sample of weights that were tuned again since would be shown as one of these."""
    before = set(workdir.glob("samples/*.json"))
    for weight in (0.0, 0.5, 0.5):
        weights = np.full(num_classes(), weight)
        monkeypatch.setattr(sample, "tuned_weights", lambda *_, weights=weights: weights)
        asked = ["--prompt=A", "--retrieval=off", "--max_tokens=2", "--token_memory"]
        assert call(sample.main, *trained, *asked) == 0
    made = set(workdir.glob("samples/*.json")) - before
    for path in made:
        path.unlink()  # the report shows the newest
    assert len(made) == 2


def test_a_page_shows_what_retrieval_changed_in_them(sampled: dict, workdir: pathlib.Path):
    """As the generator saw it, past the trained length too; each chunk beside what it read."""
    page = (workdir / "trace.html").read_text(encoding="utf-8")
    parts = re.findall(r'class="values">(.*?)</script>', page)
    articles = page.split('<article class="trace">')[1:]
    assert len(sampled["samples"][1]["tokens"]) > 4 * 64
    for one, part, article in zip(sampled["samples"], parts, articles, strict=True):
        units = json.loads(part)["units"]
        shown = {unit["token"]: unit["with"] for unit in units if "tokens" not in unit}
        given = dict(enumerate(one["log_probabilities"], one["prompt_length"]))
        both = sorted(shown.keys() & given.keys())
        assert len(both) > 30
        wanted = [given[place] for place in both]
        assert [shown[place] for place in both] == pytest.approx(wanted, abs=1e-3)
        assert any(unit["with"] != unit["without"] for unit in units)
        chunks = article.split('<section class="card chunk')[1:]
        for before, chunk in zip(one["chunks"], chunks[1:], strict=False):
            for view in before["neighbours"]:
                assert html.escape(view["document"]) in chunk


def test_samples_without_retrieval(trained: list[str], tmp_path: pathlib.Path, capsys):
    """Prompts of a file, and a line of JSON for each sample."""
    prompts, lines = tmp_path / "prompts.jsonl", tmp_path / "samples.jsonl"
    prompts.write_text('{"prompt": "B\\u2028C"}\n\n', encoding="utf-8")
    more = ["--prompt=A", "--retrieval=off", "--max_tokens=3", "--num_samples=2"]
    more += [f"--prompts_file={prompts}", f"--json_lines={lines}"]
    assert call(sample.main, *trained, *more) == 0
    assert "●" not in capsys.readouterr().out
    made = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [one["prompt"] for one in made] == ["A", "A", "B\u2028C", "B\u2028C"]
    assert all(len(one["log_probabilities"]) == 3 for one in made)
    for content, message in (("\n", "has no line"), ("5\n", "line 1: expected"), ("{", "line 1")):
        prompts.write_text(content)
        assert call(sample.main, *trained, *more) == 1
        assert message in capsys.readouterr().err


def test_the_report_shows_all_of_it(
    evaluated: dict, sampled: dict, trained: list[str], workdir: pathlib.Path
):
    assert call(report.main, *trained, "--title=<My> report") == 0
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "&lt;My&gt; report" in page
    for name in ("baseline", "off", "on"):
        assert f"{evaluated[name]['all']['bits_per_byte']:.4f}" in page
    # Training and overlap have both lines, place in the chunk and frequency of the token one; both
    # panels of the costs have one of the k sweep.
    assert page.count('class="line first"') == 6
    assert page.count('class="line second"') == 2
    assert "By place in the chunk" in page
    assert page.count('class="line third"') == 3  # the baseline by overlap, and in the costs
    assert "with r(C) at most 50%" in page
    for heading in ("Largest gain", "Largest loss", "Chosen at random"):
        assert page.count(heading) == 2  # in each of two corpora
    assert len(re.findall(r'title="[+-]\d+\.\d\d bits"', page)) > 6 * 30
    assert "import json" in page
    document = sampled["samples"][0]["chunks"][0]["neighbours"][0]["document"]
    assert document in page


def test_the_report_of_a_sample_has_its_chunks(
    evaluated: dict, trained: list[str], workdir: pathlib.Path, capsys
):
    assert call(evaluate.main, *trained, "--sample_chunks=40") == 0
    assert call(report.main, *trained) == 0
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "Largest gain" in page and "on a part of the test split" in page
    assert "no parts by chunk" not in capsys.readouterr().out
    assert call(evaluate.main, *trained) == 0  # the summary again


def test_two_models_are_compared_document_by_document(
    evaluated: dict, trained: list[str], workdir: pathlib.Path, capsys
):
    other = [*trained, f"--other={workdir}", "--other_condition=baseline"]
    assert call(compare.main, *other) == 0
    shown = capsys.readouterr().out
    (path,) = workdir.glob("evaluation/test-on-against-*-baseline.json")
    found = json.loads(path.read_text())
    figures = [evaluated[name]["all"]["bits_per_byte"] for name in ("on", "baseline")]
    assert found["bits_per_byte"] == pytest.approx(figures)
    difference = found["difference"]
    assert difference["value"] == pytest.approx(figures[0] - figures[1])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert 0 < found["p_value"] <= 1
    assert f"{difference['value']:+.4f} [" in shown
    cells = f"{difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    assert f"| {cells} | {found['p_value']:.4f} |" in path.with_suffix(".md").read_text()
    assert call(report.main, *trained) == 0
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert f"<td>{cells}</td><td>{found['p_value']:.4f}</td>" in page
    assert call(compare.main, *trained, f"--other={workdir}", "--condition=x") == 1
    assert "has no condition 'x': expected baseline, off, on" in capsys.readouterr().err
    assert call(compare.main, *trained) == 2
    assert "--other is missing" in capsys.readouterr().err


def test_results_are_compared_without_data_unless_older_than_their_sums(
    evaluated: dict, trained: list[str], workdir: pathlib.Path, tmp_path: pathlib.Path, capsys
):
    (tmp_path / "V").mkdir()
    shutil.copytree(workdir / "evaluation", tmp_path / "V" / "evaluation")
    other = [f"--workdir={tmp_path / 'V'}", f"--other={workdir}", "--other_condition=off"]
    stem = "test-on-against-W-off"
    assert call(compare.main, *other, "--data=/nowhere") == 0
    shown = capsys.readouterr().out
    found = [(tmp_path / f"V/evaluation/{stem}.{end}").read_bytes() for end in ("json", "md")]
    # As the code before left it: no file of sums.
    (tmp_path / "V/evaluation/test-documents.npz").unlink()
    assert call(compare.main, *other, trained[1]) == 0
    assert capsys.readouterr().out == shown
    again = [(tmp_path / f"V/evaluation/{stem}.{end}").read_bytes() for end in ("json", "md")]
    assert again == found
    assert call(compare.main, *other, "--data=/nowhere") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --split=test: there is no /nowhere/chunks/test")
    for made in ("retro", "baseline"):
        (tmp_path / "V" / made).symlink_to(workdir / made)
    assert call(report.main, other[0], trained[1]) == 0
    page = (tmp_path / "V" / "report.html").read_text(encoding="utf-8")
    assert f"{evaluated['on']['all']['bits_per_byte']:.4f}" in page
    assert "Compared with another model" in page


def test_a_damaged_array_is_one_line(
    evaluated: dict, trained: list[str], workdir: pathlib.Path, capsys
):
    path = workdir / "evaluation" / evaluated["on"]["nll"]
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-100])
        assert call(report.main, *trained) == 1
    finally:
        path.write_bytes(whole)
    assert capsys.readouterr().err == (
        f"error: {path} is not what {path.stem}.json was made with: move both away and run"
        " launch.evaluate again\n"
    )


def test_every_command_of_the_tutorial_runs(
    workdir: pathlib.Path,
    evaluated: dict,
    prepared_workdir: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """Word for word, in a folder whose my.gin is of the slice and of a tiny model, half way through."""
    assert evaluated
    (tmp_path / "my.gin").write_text(SLICE + TINY)
    (tmp_path / "W").mkdir()
    for artefact in filter(pathlib.Path.is_dir, prepared_workdir.iterdir()):
        (tmp_path / "W" / artefact.name).symlink_to(artefact)
    for made in ("retro", "baseline", "evaluation"):
        shutil.copytree(workdir / made, tmp_path / "W" / made)
    monkeypatch.chdir(tmp_path)
    for command in ONE_MACHINE:
        _, _, module, *arguments = shlex.split(command)
        assert call(importlib.import_module(module).main, *arguments) == 0, command
    assert "bit for bit, in all 6 lines" in capsys.readouterr().out
    assert (tmp_path / "W" / "report.html").is_file()
    for again in ("W2", "W3", "W4"):
        assert (tmp_path / again / "retro" / "checkpoints" / "6").is_dir()
