"""docs/notebook.ipynb runs from its first cell to its last, and its stored outputs are its own."""

import re

import pytest

from tests.docs import notebook


@pytest.fixture(name="executed", scope="module")
def _executed(tmp_path_factory):
    """The notebook, executed in an empty folder."""
    return notebook.executed(tmp_path_factory.mktemp("notebook"), notebook.stored())


def test_what_is_stored_is_what_it_prints_and_draws(executed):
    stored = notebook.stored()
    counts = [c.execution_count for c in stored.cells if c.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)], "run python -m tests.docs.notebook"
    assert notebook.shapes(executed) == notebook.shapes(stored), "run python -m tests.docs.notebook"


def test_retrieval_helps_in_it(executed):
    """The sentence of the notebook: pages share entries, so looking them up is worth much."""
    printed = "".join(
        output.text
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    on, off = map(float, re.findall(r"retrieval o[nf]+: (\S+) bits per byte", printed))
    assert on < 0.8 * off
