"""Credit by document: what is divided, what is nobody's, and which documents go first."""

import numpy as np

from data_pipelines.evaluation.credit import (
    Credit,
    least_useful,
    neighbour_credit,
    removal_list,
    vote_credit,
)
from data_pipelines.workdir.update import named_documents


def test_a_gain_is_divided_among_the_documents_that_were_read():
    gains = np.array([6.0, -2.0, 5.0, 1.0])
    documents = np.array([[0, 1, 0], [1, -1, -1], [-1, -1, -1], [3, 3, 3]])
    credit = neighbour_credit(gains, documents, 5)
    np.testing.assert_allclose(credit, [4.0, 2.0 - 2.0, 0.0, 1.0, 0.0])
    assert credit.sum() == gains[[0, 1, 3]].sum()  # without what nothing was read for


def test_a_vote_has_its_token_s_gain():
    credit = vote_credit(np.array([1.0, 2.0, -0.5, 4.0]), np.array([2, 0, -1, 2]), 3)
    np.testing.assert_allclose(credit, [2.0, 0.0, 5.0])
    np.testing.assert_allclose(Credit(np.ones(3), credit).total, [3.0, 1.0, 6.0])


def test_the_least_useful_go_and_removed_ones_are_not_named_again():
    credit = np.array([5.0, 0.0, 0.0, -1.0, 0.0, 9.0])
    sizes = np.array([1, 2, 7, 1, 0, 1])  # document 4 is gone
    assert least_useful(credit, sizes, 0.6).tolist() == [1, 2, 3]
    assert least_useful(credit, sizes, 0.4).tolist() == [2, 3]  # of equal credit the larger
    assert least_useful(credit, sizes, 0).tolist() == []
    assert least_useful(credit, sizes, 1).tolist() == [0, 1, 2, 3, 5]


def test_a_list_names_what_its_lines_can_name(tmp_path):
    lines, listed = removal_list(["c/a", "c/b\r", "c/two\nlines", "c/d\r\r"])
    assert listed.tolist() == [True, True, False, True]
    (tmp_path / "ids").write_bytes("".join(lines).encode())
    names = named_documents([f"@{tmp_path / 'ids'}"])
    assert names == [("c", "a"), ("c", "b\r"), ("c", "d\r\r")]
