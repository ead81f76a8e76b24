"""The settings of an evaluation: windows by stride or overlap, and every flag in --help."""

import re

import pytest
from absl import flags

from launch import evaluate
from launch.common import app
from launch.evaluation.settings import EvaluationSettings
from launch.evaluation.slices import wanted_slices
from tests.launch.trained import call

FLAGS = """
    averaged batch_size bert_folder coordinator_address data database_shares knn knn_exact knn_neighbours
    knn_tokens max_documents ngram_limits num_neighbours num_processes overlap peer_timeout process_id
    retrieval slice_paths slices split stride_chunks sweep window_chunks workdir
"""


@pytest.mark.parametrize(
    ("settings", "chunks", "stride"),
    [
        ({}, 32, 16),
        ({"window_chunks": 8}, 8, 4),
        ({"window_chunks": 1}, 1, 1),
        ({"stride_chunks": 5}, 32, 5),
        ({"overlap": 0.875}, 32, 4),
        ({"overlap": 0.0, "window_chunks": 3}, 3, 3),
    ],
)
def test_windows_advance_by_half_unless_told(settings: dict, chunks: int, stride: int):
    windows = EvaluationSettings(**settings, batch_size=5).windows(32)
    assert (windows.chunks, windows.stride, windows.batch_size) == (chunks, stride, 5)


@pytest.mark.parametrize("settings", [{"overlap": 0.9}, {"overlap": 1.0}, {"stride_chunks": 33}])
def test_windows_that_leave_chunks_out_are_refused(settings: dict):
    with pytest.raises(flags.Error, match="expected"):
        EvaluationSettings(**settings).windows(32)


def test_help_lists_the_flags_of_every_part():
    listed = re.findall(r"^  --(?:\[no\])?(\w+)", app.usage(evaluate.main), re.MULTILINE)
    assert set(FLAGS.split()) <= set(listed)


@pytest.mark.parametrize(
    ("values", "paths", "message"),
    [
        (["test"], ["test=x"], "--slices=test: expected another name than a split's"),
        (["own", "train"], [], "--slices=train: expected another name"),
        (
            ["pile", "pile:github"],
            [],
            "--slices=pile and a subset of it: expected one or the other",
        ),
        (["pile:github", "pile"], [], "--slices=pile and a subset of it"),
        (["pile:"], [], "--slices=pile:: expected a name, or pile: and a subset of it"),
        (["own"], ["own=1.jsonl", "own=2.jsonl"], "own=2.jsonl: own is 1.jsonl, expected one path"),
    ],
)
def test_slices_that_would_be_read_as_others_are_refused(values, paths, message):
    with pytest.raises(flags.Error, match=message):
        wanted_slices(values, paths, None, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split=test", "--slices=own"], "--split=test with --slices: expected one of them"),
        (["--knn_tokens=64"], "--knn_tokens without --knn: expected both"),
        (["--knn_neighbours=4", "--noknn"], "--knn_neighbours without --knn: expected both"),
        (["--knn_exact"], "--knn_exact without --knn: expected both"),
        (["--skip_bad_documents"], "--skip_bad_documents without --slices: expected"),
    ],
)
def test_flags_that_would_do_nothing_are_refused_before_anything_is_opened(
    arguments, message, tmp_path, capsys
):
    assert call(evaluate.main, f"--workdir={tmp_path / 'none'}", *arguments) == 2
    assert message in capsys.readouterr().err


def test_subsets_of_a_slice_are_prepared_together():
    values = ["pile:github", "own", "pile:arxiv", "own"]
    found = wanted_slices(values, ["own=1.jsonl", "own=1.jsonl"], 3, False)
    assert [(each.key, each.path) for each in found] == [
        ("pile-arxiv-github-first3", None),
        ("own-first3", "1.jsonl"),
    ]
