"""Texts that conditions read beside the one that is scored, refused before anything is scored."""

import pytest

from data_pipelines.evaluation.other_texts import check_other_texts
from data_pipelines.evaluation.splits import open_split
from data_pipelines.retriever import publishing
from retro_jax.errors import UserError
from tests.data_pipelines.synthetic import write_database


@pytest.fixture(name="workdir")
def _workdir(tmp_path):
    """W without tables, and with an empty validation split."""
    for name, sizes in (("train", [2, 3]), ("validation", []), ("test", [1])):
        write_database(tmp_path / "chunks" / name, sizes)
    return tmp_path


@pytest.mark.parametrize("name", ["tokens", "baseline+tokens", "knn", "on+knn", "on+knn+tokens"])
def test_mixtures_without_a_validation_split_are_refused(workdir, name):
    split = open_split(workdir, "test", neighbours=0)
    check_other_texts(workdir, split, {"on": 2, "off": 0, "k_4": 4, "baseline": 0})
    what = "--knn" if name.endswith("knn") else "--retrieval=tokens"
    message = (
        f"{what} is tuned on the validation split, but .*/validation holds no document: expected"
    )
    with pytest.raises(UserError, match=message):
        check_other_texts(workdir, split, {"off": 0, name: 0})


def test_a_datastore_of_an_emptied_database_is_refused(workdir):
    split = open_split(workdir, "test", neighbours=0)
    tuned = open_split(workdir, "test", neighbours=0)
    (workdir / "chunks" / "validation").rename(workdir / "chunks" / "none")
    (workdir / "chunks" / "test").rename(workdir / "chunks" / "validation")
    check_other_texts(workdir, split, {"knn": 0})
    publishing.publish(workdir, 1, [0, 1])
    message = (
        "--knn looks up the training split, but .*/train holds no document that was not removed"
    )
    with pytest.raises(UserError, match=message):
        check_other_texts(workdir, split, {"knn": 0})
    check_other_texts(workdir, split, {"knn": 0}, revision=0)
    check_other_texts(workdir, tuned, {"tokens": 0})


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("baseline+tokens", "would vote"),
        ("knn", "are the datastore"),
        ("on+knn", "are the datastore"),
    ],
)
def test_the_database_cannot_be_scored_with_its_own_text(workdir, name, does):
    split = open_split(workdir, "train", neighbours=0)
    check_other_texts(workdir, split, {"on": 2, "off": 0, "baseline": 0})
    with pytest.raises(
        UserError, match=f"of the training split itself, whose own documents {does}:"
    ):
        check_other_texts(workdir, split, {"off": 0, name: 0})


def test_a_table_with_fewer_neighbours_is_refused(workdir):
    split = open_split(workdir, "test", neighbours=0)
    with pytest.raises(UserError, match="--retrieval=tokens is tuned on the validation split, but"):
        check_other_texts(workdir, split, {"tokens": 3})
