"""The settings of an evaluation: windows by stride or overlap, and every flag in --help."""

import re

import pytest
from absl import flags

from launch import evaluate
from launch.common import app
from launch.evaluation.settings import EvaluationSettings

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
