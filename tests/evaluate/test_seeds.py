"""Figures of several seeds: their means and spread, and intervals that contain both kinds of chance."""

import dataclasses

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.evaluate.overlap import overlap_curve
from retro_jax.evaluate.seeds import seed_figures, spread
from retro_jax.report.evaluation_tables import seed_table
from tests.evaluate.test_scored_text import _scored as scored_text


def test_equal_seeds_have_the_intervals_of_one():
    scored, _ = scored_text()
    rows = seed_figures([scored] * 3)
    points = {
        (point.corpus, point.at_most): point
        for point in overlap_curve(scored.overlap, [("on", "off")])
    }
    assert [(row["corpus"], row["at_most"]) for row in rows] == [
        *(("a", 0.5), ("b", 0.5), ("", 0.5)),
        *(("a", 1.0), ("b", 1.0), ("", 1.0)),
    ]
    for row in rows:
        point = points[row["corpus"], row["at_most"]]
        assert row["chunks"] == point.chunks
        for name, figure in row["bits_per_byte"].items():
            assert spread(figure) == pytest.approx(0)
            wanted = dataclasses.asdict(point.bits_per_byte[name])
            assert {end: figure[end] for end in wanted} == pytest.approx(wanted)
        (difference,) = row["differences"].values()
        wanted = dataclasses.asdict(point.differences["on", "off"])
        assert {end: difference[end] for end in wanted} == pytest.approx(wanted)


def test_seeds_that_differ_widen_the_interval_and_are_shown():
    scored = [scored_text(seed)[0] for seed in range(4)]
    row = seed_figures(scored)[-1]
    figure = row["bits_per_byte"]["on"]
    alone = [seed_figures([each])[-1]["bits_per_byte"]["on"] for each in scored]
    assert figure["seeds"] == pytest.approx([each["value"] for each in alone])
    assert figure["value"] == pytest.approx(np.mean(figure["seeds"]))
    assert spread(figure) == pytest.approx(np.std(figure["seeds"], ddof=1))
    half = (figure["high"] - figure["low"]) / 2
    assert half > 1.5 * spread(figure) / np.sqrt(len(scored))
    table = seed_table([row])
    assert table.title == "4 seeds"
    assert f"{figure['value']:.4f} ± {spread(figure):.4f}" in table.rows[0]


def test_results_of_other_texts_and_without_overlap_are_refused():
    one, other = scored_text()[0], scored_text(neighbours=False)[0]
    with pytest.raises(UserError, match="expected a neighbour table"):
        seed_figures([one, other])
    sizes = dataclasses.replace(one.overlap, bytes=one.overlap.bytes + 1)
    with pytest.raises(UserError, match="expected one split and table"):
        seed_figures([one, dataclasses.replace(one, overlap=sizes)])
