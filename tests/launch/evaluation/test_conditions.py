"""Evaluate under every condition, on slices that it prepares itself, and interrupted."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.database_share import kept_chunks
from data_pipelines.evaluation.splits import open_split
from data_pipelines.retriever import index_config, publishing, revisions
from data_pipelines.retriever.datastore import search_datastore
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.retriever import Retriever
from launch import evaluate, report
from launch.evaluation.conditions import Condition
from launch.evaluation.knn import KnnScoring
from launch.evaluation.settings import KnnSettings
from launch.runs import trained_run
from retro_jax.evaluate import score, scorer
from tests.launch.trained import call


@pytest.fixture(scope="module")
def varied(evaluated: dict, trained: list[str], workdir: pathlib.Path) -> dict:
    """The test split with every kind of neighbours."""
    wanted = "--retrieval=on,off,random,oracle"
    sweep = ["--sweep=1,2,10", "--database_shares=0,0.2,0.5,1", "--ngram_limits=0,1"]
    assert call(evaluate.main, *trained, wanted, *sweep, "--overlap=0.5") == 0
    found = json.loads((workdir / "evaluation" / "test.json").read_text())
    assert call(evaluate.main, *trained) == 0  # the summary again
    return found


def test_conditions_that_are_the_same_score_the_same(
    varied: dict, evaluated: dict, workdir: pathlib.Path
):
    assert varied["on"]["nll"] == evaluated["on"]["nll"]  # half of a window is the default
    nats = {name: result["all"]["nats"] for name, result in varied.items()}
    same = [("k_2", "on"), ("database_1", "on"), ("ngrams_1", "on"), ("database_0", "off")]
    for name, other in same:
        assert nats[name] == pytest.approx(nats[other], rel=1e-6)
    law = json.loads((workdir / "evaluation" / "test-size.json").read_text())
    assert law["sizes"] == [0.2, 0.5, 1.0] and law["gain"]["low"] <= law["gain"]["high"]
    others = ("on", "off", "random", "oracle", "k_1", "k_10", "database_0.5", "ngrams_0")
    assert len({round(nats[name], 2) for name in others}) == len(others)
    assert {result["all"]["tokens"] for result in varied.values()} == {
        evaluated["on"]["all"]["tokens"]
    }


def test_a_part_of_the_database_gives_its_own_nearest_chunks(
    varied: dict, workdir: pathlib.Path, prepared_workdir: pathlib.Path
):
    split = open_split(prepared_workdir, "test", neighbours=10)
    kept = kept_chunks(split, 0.5)
    assert 0.3 < kept.mean() < 0.7
    assert not (kept_chunks(split, 0.2) & ~kept).any()
    owners = split.retrieval.documents(np.arange(len(kept)))
    assert all(len(set(kept[owners == document])) == 1 for document in set(owners))
    (path,) = (workdir / "evaluation").glob("neighbours-2-0.5-*.npy")
    found = np.load(path)
    retriever = Retriever.open(prepared_workdir)
    queries = retriever.encoder.keys(split.database.chunks(split.ids))
    keys = np.where(kept[:, None], retriever.keys.rows(np.arange(len(kept))), np.nan)
    for query, ids in zip(queries, found, strict=True):
        distances = ((keys - query) ** 2).sum(axis=1)
        if np.isnan(distances).all():
            assert (ids == -1).all()
        else:
            nearest = np.sort(distances)[:2]  # NaN comes last
            assert distances[ids] == pytest.approx(nearest, rel=1e-3, abs=1e-5)


def test_knn_lm_looks_up_the_training_text(
    evaluated: dict, trained: list[str], workdir: pathlib.Path, prepared_workdir: pathlib.Path
):
    more = ["--knn", "--knn_neighbours=8", "--knn_tokens=4000", "--retrieval=off"]
    assert call(evaluate.main, *trained, *more) == 0
    found = json.loads((workdir / "evaluation" / "test.json").read_text())
    assert call(evaluate.main, *trained) == 0  # the summary again
    by_token, baseline = found["knn"], found["baseline"]
    assert by_token["model"] == baseline["model"]
    assert 3000 < by_token["knn"]["datastore_tokens"] < 4500
    assert by_token["knn"]["recall"] == 1.0  # so few are all compared
    keys, values = (
        np.load(next(workdir.glob(f"evaluation/knn-{what}-*.npy"))) for what in ("keys", "values")
    )
    assert keys.shape == (len(values), 32)
    assert by_token["all"]["tokens"] == baseline["all"]["tokens"]
    if by_token["knn"]["weight"]:
        # A model of six steps knows next to nothing: what stands in the training text serves it.
        assert by_token["all"]["nats"] < baseline["all"]["nats"]
    else:
        assert by_token["all"]["nats"] == pytest.approx(baseline["all"]["nats"])


def test_activations_are_named_by_all_that_they_depend_on(
    trained: list[str], workdir: pathlib.Path, prepared_workdir: pathlib.Path, tmp_path
):
    run = trained_run.open_run(workdir / "retro")
    split = open_split(prepared_workdir, "validation", neighbours=2)

    def name(run=run, split=split, neighbours=2, **windows) -> str:
        cut = score.WindowConfig(**{"chunks": 4, "stride": 2, "batch_size": 8} | windows)
        condition = Condition("on+knn", run, neighbours, "knn")
        place = {"data": prepared_workdir, "folder": tmp_path}
        return KnnScoring(condition, cut, KnnSettings(), scorer.Scorer(), **place).digest(split)

    def with_part(**fields) -> str:
        parts = {n: dataclasses.replace(getattr(run, n), **{f: v}) for n, (f, v) in fields.items()}
        return name(dataclasses.replace(run, **parts))

    assert name() == name(batch_size=3)
    assert run.batches.neighbour_part == "both"
    others = [
        name(chunks=2),
        name(stride=1),
        name(neighbours=1),
        name(split=dataclasses.replace(split, ids=split.ids[:5])),
        name(split=open_split(prepared_workdir, "test", neighbours=2)),
        name(dataclasses.replace(run, averaged=True)),
        name(trained_run.open_run(workdir / "retro", ["RetroConfig.activation = 'relu'"])),
        with_part(execution=("activation_dtype", "bfloat16")),
        with_part(batches=("neighbour_part", "chunk")),
    ]
    assert len({name(), *others}) == 1 + len(others)


def test_a_datastore_of_other_windows_is_another(
    trained: list[str], workdir: pathlib.Path, tmp_path, capsys
):
    """Before, the activations of the first evaluation were searched with those of the second."""
    shutil.copytree(workdir, tmp_path / "W", ignore=shutil.ignore_patterns("evaluation"))
    where = [f"--workdir={tmp_path / 'W'}", trained[1], "--retrieval=off", "--max_documents=1"]
    where += ["--split=validation", "--knn", "--knn_neighbours=4", "--knn_tokens=640"]
    folder, alone, found = tmp_path / "W" / "evaluation", ["--window_chunks=1"], []
    for more in ([], alone):
        assert call(evaluate.main, *where, *more) == 0
        found.append(json.loads((folder / "validation.json").read_text())["knn"]["all"])
        assert len(list(folder.glob("knn-keys-*.npy"))) == len(found)
    note = "Mixtures were tuned on this very text"
    assert note in capsys.readouterr().out and note in (folder / "validation.md").read_text()
    shutil.rmtree(folder)
    assert call(evaluate.main, *where, *alone) == 0
    assert json.loads((folder / "validation.json").read_text())["knn"]["all"] == found[1]
    capsys.readouterr()
    assert call(evaluate.main, *where[:-3]) == 0  # without a mixture
    assert note not in capsys.readouterr().out


def test_knn_lm_of_an_updated_database_has_no_removed_document(
    trained: list[str], prepared_workdir: pathlib.Path, tmp_path, capsys
):
    data, work = tmp_path / "data", tmp_path / "work"
    for name in ("tokenizer", "chunks"):
        shutil.copytree(prepared_workdir / name, data / name)
    removed = [0, 3, 4]
    publishing.publish(data, 1, removed)
    shutil.copytree(trained[0].partition("=")[2], work, ignore=shutil.ignore_patterns("evaluation"))
    where = [f"--workdir={work}", f"--data={data}", "--retrieval=off"]
    more = ["--knn", "--knn_neighbours=8", "--knn_tokens=1000000", "--stride_chunks=4"]
    assert call(evaluate.main, *where, *more) == 0
    found = json.loads((work / "evaluation" / "test.json").read_text())["knn"]
    database = revisions.open_database(data)
    live = database.live_ids(np.arange(database.live_chunks))
    tokens, owners = database.chunks(live), database.documents(live)
    starts = len(set(owners.tolist()))  # the first token of a document is not predicted
    there = int((tokens != database.pad_id).sum()) - starts
    assert found["knn"]["datastore_tokens"] == there
    assert database.is_removed(np.array(removed)).all() and not np.isin(owners, removed).any()


@pytest.mark.parametrize("exact", [False, True])
def test_a_large_datastore_is_searched_by_scann_unless_every_key_is_asked_for(exact, monkeypatch):
    monkeypatch.setattr(index_config, "_HASHING_FROM", 1000)

    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2000, 32)).astype(np.float16)
    queries = rng.normal(size=(50, 32)).astype(np.float32)
    look_up, how = search_datastore(keys, 8, exact=exact)
    assert how == ("exact" if exact else "ScaNN (hashing)")
    places, distances = look_up(queries, 8)
    every = ((queries[:, None] - keys.astype(np.float32)) ** 2).sum(-1)
    assert distances == pytest.approx(np.take_along_axis(every, places, 1), rel=1e-3, abs=1e-4)
    nearest = np.argsort(every, axis=1)[:, :8]
    hits = sum(len(set(a) & set(b)) for a, b in zip(places.tolist(), nearest.tolist()))
    assert hits == 400 if exact else hits > 100  # of normal keys, the hardest for codes


def test_slices_are_prepared_scored_and_found_again(
    trained: list[str], workdir: pathlib.Path, prepared_workdir: pathlib.Path, tmp_path, capsys
):
    data = tmp_path / "data"
    shutil.copytree(prepared_workdir, data)
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (3 * i + 1) for i in range(4)]
    pile = [{"text": text, "meta": {"pile_set_name": "Github"}} for text in texts]
    passages = [{"text": "import json and then import json"}, {"text": "the river of the north"}]
    for name, lines in (("pile", pile), ("lambada", passages)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    where = [trained[0], f"--data={data}", "--slices=pile:github,lambada"]
    paths = ",".join(f"{name}={tmp_path}/{name}.jsonl" for name in ("pile", "lambada"))
    assert call(evaluate.main, *where, f"--slice_paths={paths}") == 0
    shown = capsys.readouterr().out
    folder = workdir / "evaluation"
    found = json.loads((folder / "pile-github.json").read_text())["on"]["all"]
    tokenizer = Tokenizer.open(data / "tokenizer")
    assert found["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    assert found["bytes"] == sum(map(len, texts))
    figures = json.loads((folder / "pile-github.json").read_text())
    ours = [figures[name]["all"]["bits_per_byte"] for name in ("baseline", "off", "on")]
    row = f"| github | 0.420 | 0.199 | {' | '.join(f'{value:.3f}' for value in ours)} |"
    assert row in (folder / "pile-github.md").read_text()
    last, words = json.loads((folder / "lambada.json").read_text()), 0
    for text in (passage["text"] for passage in passages):
        ends = np.cumsum([len(tokenizer.token_bytes[i]) for i in tokenizer.encode(text)])
        words += int((ends > text.rindex(" ") + 1).sum())
    assert set(last) == {"baseline", "off", "on"}
    for result in last.values():
        assert result["all"]["bytes"] == len("jsonnorth")
        assert result["all"]["tokens"] == words
        right = result["last_word_accuracy"]
        assert right["low"] <= right["value"] <= right["high"]
        assert right["value"] in (0.0, 0.5, 1.0)
    assert "preparing lambada ..." in shown
    assert NeighbourTable.open(data / "slices" / "lambada" / "neighbours").k == 40
    assert call(evaluate.main, *where) == 0
    assert "preparing" not in capsys.readouterr().out
    # Another file by the same name is refused, and one that is missing.
    for path, said in ((tmp_path / "pile.jsonl", "lambada"), ("/nowhere", "/nowhere is missing")):
        more = ["--slices=lambada", f"--slice_paths=lambada={path}"]
        assert call(evaluate.main, *where[:2], *more) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert said in error
    assert call(report.main, *where[:2], "--split=pile-github") == 0
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "Beside the paper: the Pile" in page and f"<td>{ours[2]:.3f}</td>" in page


def test_an_interrupted_pass_goes_on_with_the_segments_it_had(
    evaluated: dict, trained: list[str], workdir: pathlib.Path, monkeypatch
):
    monkeypatch.setattr(scorer, "SEGMENT", 10)
    done = []
    whole = score.score_chunks

    def interrupted(*arguments, **more):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(len(arguments[1].ids))
        return whole(*arguments, **more)

    more = ["--retrieval=off", "--split=validation", "--stride_chunks=4"]
    monkeypatch.setattr(score, "score_chunks", interrupted)
    assert call(evaluate.main, *trained, *more) == 130
    assert len(list(workdir.glob("evaluation/.partial-*/*.npy"))) == 3
    monkeypatch.setattr(
        score, "score_chunks", lambda *a, **k: done.append(len(a[1].ids)) or whole(*a, **k)
    )
    assert call(evaluate.main, *trained, *more) == 0
    result = json.loads((workdir / "evaluation" / "validation.json").read_text())["off"]
    assert sum(done) == 2 * result["all"]["chunks"]  # RETRO[OFF] and the baseline, each chunk once
    assert min(done) >= 1 and len(done) > 6
    assert not list(workdir.glob("evaluation/.partial-*"))
