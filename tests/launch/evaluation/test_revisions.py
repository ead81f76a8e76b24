"""launch.evaluate --revisions: one model, and a document that comes into the database and goes again."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines.evaluation.splits import open_split
from data_pipelines.retriever import publishing, revisions
from launch import evaluate, report
from retro_jax.storage import files
from tests.conftest_prepared import run_prepare
from tests.launch.trained import call

TEXT = "".join(f"Lantern {i} hangs above harbour gate {i * 7 % 13}.\n" for i in range(60))


@pytest.fixture(scope="module")
def places(trained: list[str], prepared_workdir: pathlib.Path, tmp_path_factory) -> list[str]:
    """Flags of copies of W and of the data: revision 1 adds a document, 2 removes it, 3 all others."""
    folder = tmp_path_factory.mktemp("revisions")
    ignored = shutil.ignore_patterns("evaluation")
    shutil.copytree(trained[0].partition("=")[2], folder / "work", ignore=ignored)
    data = folder / "data"
    shutil.copytree(prepared_workdir, data)
    (folder / "new").mkdir()
    (folder / "new" / "lantern.txt").write_text(TEXT)
    settings = folder / "more.gin"
    settings.write_text(
        f"""
new/CorpusConfig.name = 'new'
new/CorpusConfig.kind = 'text'
new/CorpusConfig.path = '{folder / "new"}'
new/CorpusConfig.split = 'train'
DocumentsConfig.corpora = (@new/CorpusConfig(),)
"""
    )
    assert run_prepare(data, settings, "--append") == 0
    count = revisions.open_database(data).num_documents
    publishing.publish(data, 2, [count - 1])
    publishing.publish(data, 3, list(range(count - 1)))
    (folder / "mine.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return [
        f"--workdir={folder / 'work'}",
        f"--data={data}",
        "--slices=mine",
        f"--slice_paths=mine={folder / 'mine.jsonl'}",
        "--retrieval=on,off,tokens",
    ]


@pytest.fixture(scope="module")
def found(places: list[str]) -> dict:
    """The document's own text at each revision; the tables of 2 and 3 are made on the way."""
    assert call(evaluate.main, *places, "--revisions=0,1,2,3") == 0
    folder = pathlib.Path(places[0].partition("=")[2]) / "evaluation"
    return json.loads((folder / "mine-revisions.json").read_text())


def _bits(found: dict, name: str) -> list[float]:
    return [row["bits_per_byte"][name]["value"] for row in found["rows"]]


def test_a_document_that_is_added_is_read_at_once_and_forgotten_when_removed(found: dict):
    assert [row["revision"] for row in found["rows"]] == [0, 1, 2, 3]
    counts = [each["documents"] for each in found["databases"]]
    assert counts == [counts[0], counts[0] + 1, counts[0], 0]
    off, on, tokens = (_bits(found, name) for name in ("off", "on", "tokens"))
    assert len(set(off)) == len(set(_bits(found, "baseline"))) == 1
    assert tokens[1] < 0.7 * tokens[0]  # the memory knows the document word for word
    assert tokens[2] == pytest.approx(tokens[0], rel=1e-6)
    assert on[1] != on[0] and on[2] == on[0]  # the same neighbours as before
    assert on[3] == pytest.approx(off[3], rel=1e-6) and tokens[3] == pytest.approx(on[3], rel=1e-6)
    change = found["rows"][1]["change"]["tokens"]
    assert change["value"] == pytest.approx(tokens[1] - tokens[0])


def test_no_trace_names_a_removed_document(found: dict, places: list[str]):
    work, data = (pathlib.Path(flag.partition("=")[2]) for flag in places[:2])
    removed = revisions.open_database(data, 2).removed
    traces = {}
    for revision in (1, 2):
        split = open_split(data, "mine", neighbours=2, revision=revision)
        owners = split.retrieval.documents(split.table.ids(split.ids))
        traces[revision] = np.isin(removed, owners)
    assert traces[1].all() and not traces[2].any()
    paths = (work / "evaluation").glob("mine-votes-*.npy")
    named = [bool(np.isin(removed, files.read_arrays(path, 5)[4]).any()) for path in paths]
    assert sorted(named) == [False, False, False, True]  # by the votes of revision 1 alone


def test_revisions_are_shown_in_every_form(found: dict, places: list[str], capsys):
    folder = pathlib.Path(places[0].partition("=")[2])
    title = "Bits per byte by revision of the database"
    assert title in (folder / "evaluation" / "mine.md").read_text()
    assert call(report.main, *places[:2], "--split=mine") == 0
    assert title in (folder / report.FILE).read_text(encoding="utf-8")


def test_the_report_of_an_earlier_revision_is_without_parts_by_chunk(
    found: dict, places: list[str], capsys
):
    """The data has the tables of the newest revision: the page's chunks would be of other neighbours."""
    folder = pathlib.Path(places[0].partition("=")[2])
    for revisions_of, shown in (("1", False), ("0,1,2,3", True)):
        assert call(evaluate.main, *places, f"--revisions={revisions_of}") == 0
        capsys.readouterr()
        assert call(report.main, *places[:2], "--split=mine") == 0
        assert ("no parts by chunk: " in capsys.readouterr().out) != shown
        page = (folder / report.FILE).read_text(encoding="utf-8")
        assert ("Largest gain" in page) == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--revisions=1,9"], "revision 9: {data} has the revisions 0 to 3"),
        (["--revisions=-1"], "--revisions=-1: expected whole numbers from 0"),
        (["--revisions=0", "--overlap=0,0.5"], "--overlap with --revisions: expected one share"),
    ],
)
def test_bad_revisions_are_one_line(places: list[str], capsys, flags, message):
    assert call(evaluate.main, *places, *flags) != 0
    assert message.format(data=places[1].partition("=")[2]) in capsys.readouterr().err
