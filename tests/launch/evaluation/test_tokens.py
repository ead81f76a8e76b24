"""launch.evaluate --retrieval=tokens: models mixed with the token memory of the database."""

import json
import pathlib
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.evaluation.splits import open_split
from data_pipelines.retriever import publishing, revisions
from data_pipelines.token_memory.workdir_memory import FOLDER, prepare_and_open
from launch import evaluate, report
from launch.runs import trained_run
from retro_jax.evaluate.conditions import MIXED_WITH_TOKENS
from retro_jax.evaluate.token_mixture import num_classes
from retro_jax.model.flops import forward_flops
from tests.launch.trained import call


@pytest.fixture(scope="module")
def places(trained: list[str], prepared_workdir: pathlib.Path, tmp_path_factory) -> list[str]:
    """Flags of copies of W and of the data, which the token memory is built in."""
    folder = tmp_path_factory.mktemp("tokens")
    ignored = shutil.ignore_patterns("evaluation")
    shutil.copytree(trained[0].partition("=")[2], folder / "work", ignore=ignored)
    shutil.copytree(prepared_workdir, folder / "data")
    return [f"--workdir={folder / 'work'}", f"--data={folder / 'data'}"]


KNN = ("--knn", "--knn_neighbours=8", "--knn_tokens=4000")


@pytest.fixture(scope="module")
def mixed(places: list[str]) -> dict:
    """The test split under on, tokens and kNN-LM, each alone and together."""
    assert call(evaluate.main, *places, "--retrieval=on,tokens", *KNN) == 0
    return _results(places)


def _results(places: list[str]) -> dict:
    folder = pathlib.Path(places[0].partition("=")[2]) / "evaluation"
    return json.loads((folder / "test.json").read_text())


def test_mixtures_gain_on_text_that_the_database_has(mixed: dict, places: list[str]):
    models = {"on", "baseline", "knn", "on+knn"}
    names = {name: model for name, model in MIXED_WITH_TOKENS.items() if model != "context"}
    assert set(mixed) == {*models, *names}
    for name, model in names.items():
        alone, together = mixed[model]["all"], mixed[name]["all"]
        assert together["tokens"] == alone["tokens"]
        assert together["nats"] < alone["nats"]  # a model of six steps knows next to nothing
        facts = mixed[name]["tokens"]
        assert len(facts["weights"]) == num_classes()
        assert sum(row["tokens"] for row in facts["by_length"]) == alone["tokens"]
    assert mixed["tokens"]["all"]["differences"]["on"]["high"] < 0


def test_knn_on_retro_has_activations_with_neighbours(mixed: dict, places: list[str]):
    """Other keys than the baseline's, of the same tokens; with k in its settings and its identity."""
    folder = pathlib.Path(places[0].partition("=")[2]) / "evaluation"
    on, baseline = mixed["on+knn"], mixed["knn"]
    assert on["settings"]["neighbours"] == mixed["on"]["settings"]["neighbours"]
    assert baseline["settings"]["neighbours"] == 0
    assert on["knn"]["datastore_tokens"] == baseline["knn"]["datastore_tokens"]
    assert "datastore_neighbours" in on["manifests"]
    stores = sorted(folder.glob("knn-keys-*.npy"), key=lambda path: len(path.name))
    keys = [np.load(path) for path in stores]
    assert len(keys) == 2 and keys[0].shape == keys[1].shape
    assert not np.array_equal(*keys)
    alone = [mixed[name]["all"]["nats"] for name in ("on", "baseline")]
    assert [mixed[n]["all"]["nats"] for n in ("on+knn", "knn")] <= alone


def test_every_condition_says_what_it_costs(mixed: dict, places: list[str]):
    """Operations of the model's own count; bytes kept are those of the files."""
    work, data = (pathlib.Path(flag.partition("=")[2]) for flag in places)
    run = trained_run.open_run(work / "retro")
    length = mixed["on"]["settings"]["window_chunks"] * 64
    cost = {name: result["cost"] for name, result in mixed.items()}
    for name, k in (("on", 2), ("tokens", 2), ("on+knn", 2), ("baseline", 0), ("knn", 0)):
        assert cost[name]["operations"] == forward_flops(run.model, length, k).total
    assert cost["baseline"]["bytes_read"] == cost["baseline"]["lookup_operations"] == 0
    keys, dimension = 0, run.model.d_model
    for shard in Manifest.read(data / FOLDER).shards:
        keys += shard.size
    assert cost["baseline+tokens"]["memory_bytes"] == keys
    assert cost["baseline+tokens"]["lookup_operations"] == 0
    count = mixed["knn"]["knn"]["datastore_tokens"]  # so few that every key is compared
    assert cost["knn"]["lookup_operations"] == 2 * dimension * count
    assert cost["knn"]["bytes_kept"] == 2 * dimension + 2
    both = cost["on+knn+tokens"]
    for figure in ("lookup_operations", "bytes_read", "memory_bytes"):
        parts = [cost[name][figure] for name in ("on", "knn", "baseline+tokens")]
        assert both[figure] == pytest.approx(sum(parts))
    embedded = cost["on"]["lookup_operations"] * 64  # MiniLM over a chunk, for the most part
    assert 0.8e9 < embedded < 2.5e9
    chart = ElementTree.parse(work / "evaluation" / "test-cost.svg")
    circles = [x for x in chart.iter() if x.tag.endswith("circle")]
    assert len(circles) == 3 * len(mixed)  # in both panels and in the legend
    assert "prefers-color-scheme: dark" in (work / "evaluation" / "test-cost.svg").read_text()
    assert "What a token costs" in (work / "evaluation" / "test.md").read_text()


def test_the_mixture_of_a_token_is_that_of_its_parts(mixed: dict, places: list[str]):
    """One token's loss from the model's, the memory's own look-up and the weights that are stated."""
    work, data = (pathlib.Path(flag.partition("=")[2]) for flag in places)
    nll = {n: np.load(work / "evaluation" / mixed[n]["nll"]) for n in ("on", "tokens")}
    split = open_split(data, "test", neighbours=0)
    memory = prepare_and_open(revisions.open_database(data))
    chunk = split.database.chunks(split.ids[:1])[0]
    for place in (1, 5, 20):
        match = memory.match(chunk[:place])
        share = match.share(int(chunk[place]))
        model, mixture = (np.exp(-nll[n][0, place].astype(float)) for n in ("on", "tokens"))
        if share == model:
            continue
        weight = (mixture - model) / (share - model)  # of p = (1 - w) model + w share
        weights = np.array(mixed["tokens"]["tokens"]["weights"])
        assert np.abs(weights - weight).min() < 1e-3


def test_it_is_read_again_and_shown(mixed: dict, places: list[str], monkeypatch, capsys):
    monkeypatch.setattr(
        "data_pipelines.evaluation.stored_votes.votes_on", lambda *_, **__: pytest.fail("again")
    )
    assert call(evaluate.main, *places, "--retrieval=on,tokens", *KNN) == 0
    assert "RETRO[ON] + tokens" in capsys.readouterr().out
    assert call(report.main, *places) == 0
    work = pathlib.Path(places[0].partition("=")[2])
    assert "Cost against bits" in (work / report.FILE).read_text(encoding="utf-8")


def test_credit_names_documents_that_launch_prepare_can_remove(
    mixed: dict, places: list[str], capsys
):
    work, data = (pathlib.Path(flag.partition("=")[2]) for flag in places)
    assert call(evaluate.main, *places, "--retrieval=on,off,tokens", "--credit=0.5") == 0
    assert f"launch.prepare --remove=@{work}/evaluation/test-remove.txt" in capsys.readouterr().out
    database = revisions.open_database(data)
    names = (work / "evaluation" / "test-remove.txt").read_text().splitlines()
    assert len(names) == round(database.num_documents / 2)
    pairs = [(name.partition("/")[0], name.partition("/")[2]) for name in names]
    assert len(revisions.numbers_of(database, pairs)) == len(names)
    lines = (work / "evaluation" / "test-credit.csv").read_text().splitlines()[1:]
    assert len(lines) == database.num_documents
    on, tokens = (_results(places)[name]["all"]["nats"] for name in ("on", "tokens"))
    votes = sum(float(line.rpartition(",")[2]) for line in lines)
    assert votes > (on - tokens) / np.log(2)  # wrong votes are nobody's cost


def test_a_removed_document_does_not_vote(mixed: dict, places: list[str], tmp_path):
    data = tmp_path / "data"
    shutil.copytree(places[1].partition("=")[2], data)
    count = revisions.open_database(data).num_documents
    publishing.publish(data, 1, list(range(0, count, 2)))
    database = revisions.open_database(data)
    memory = prepare_and_open(database)
    assert not (data / "revisions" / "00001" / FOLDER).exists()  # it added nothing
    split = open_split(data, "test", neighbours=0)
    for chunk in split.database.chunks(split.ids[:20]):
        assert not database.is_removed(memory.match(chunk[:6], most_votes=0).documents).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--split=train", "--retrieval=on,tokens"],
            "of the training split itself, whose own docu",
        ),
        (["--retrieval=random", "--credit=0.5"], "--credit: expected --retrieval=on,off"),
        (["--retrieval=off", "--credit=0.5"], "--credit: expected --retrieval=on,off"),
        (["--retrieval=on", "--knn", "--num_neighbours=5"], "looks up the training split, but"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_scoring(
    places: list[str], flags, message, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("scored"))
    assert call(evaluate.main, *places, *flags) == 1
    assert message in capsys.readouterr().err
