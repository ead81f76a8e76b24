"""Figures of several seeds: their means and spread, and intervals that contain both kinds of chance."""

import dataclasses

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.evaluate.overlap import overlap_curve
from retro_jax.evaluate.seeds import ablation_figures, seed_figures, spread
from retro_jax.report.seed_tables import ablation_table, seed_table
from retro_jax.storage import files
from tests.evaluate.test_scored_text import scored_text


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


def test_conditions_that_every_seed_has_are_compared():
    """A condition that one seed lacks is left out; the others are paired seed by seed."""
    scored = []
    for seed in range(2):
        one, _ = scored_text(seed)
        on = one.overlap.bits["on"]
        bits = one.overlap.bits | {"oracle": 0.9 * on, "random": 1.2 * on}
        nats = one.nats | {"oracle": 0.9 * one.nats["on"]}
        nats |= {"random": one.nats["on"]} if seed else {}
        overlap = dataclasses.replace(one.overlap, bits=bits)
        scored.append(dataclasses.replace(one, nats=nats, overlap=overlap))
    row = seed_figures(scored)[-1]
    assert list(row["bits_per_byte"]) == ["off", "on", "oracle"]
    assert list(row["differences"]) == ["on-off", "oracle-on"]
    given = row["bits_per_byte"]["on"]["seeds"]
    assert row["differences"]["oracle-on"]["seeds"] == pytest.approx([-0.1 * x for x in given])
    assert seed_table([row]).header[-2:] == ["oracle - RETRO[ON]", "of each seed"]


def test_a_corpus_without_a_chunk_under_a_limit_has_no_figures_there():
    """All of its chunks are near-copies."""
    scored = []
    for each in (scored_text(seed)[0] for seed in range(2)):
        inside = np.zeros_like(each.overlap.bytes, bool)
        inside[each.corpora == "b", :-1] = True
        sizes = np.where(inside, 0, each.overlap.bytes)
        bits = {name: np.where(inside, 0.0, of) for name, of in each.overlap.bits.items()}
        overlap = dataclasses.replace(each.overlap, bytes=sizes, bits=bits)
        scored.append(dataclasses.replace(each, overlap=overlap))
    rows = seed_figures(scored)
    files.to_json(rows)
    by_place = {(row["corpus"], row["at_most"]): row for row in rows}
    assert by_place["b", 0.5]["differences"]["on-off"]["seeds"] == [None, None]
    assert by_place["", 0.5]["bits_per_byte"]["on"]["value"] > 0
    shown = {tuple(line[:2]): line for line in seed_table(rows).rows}
    assert shown["b", "<= 50%"][3:] == ["none", "none", "none", "none none"]
    assert "none" not in str(shown["a", "<= 50%"])


def test_results_of_other_texts_and_without_overlap_are_refused():
    one, other = scored_text()[0], scored_text(neighbours=False)[0]
    with pytest.raises(UserError, match="expected a neighbour table"):
        seed_figures([one, other])
    sizes = dataclasses.replace(one.overlap, bytes=one.overlap.bytes + 1)
    with pytest.raises(UserError, match="expected one split and table"):
        seed_figures([one, dataclasses.replace(one, overlap=sizes)])


def test_an_ablation_is_beside_the_model_of_its_seed():
    """Equal models differ by nothing, whatever their seeds; a worse one by what it is worse."""
    whole = [scored_text(seed)[0] for seed in range(3)]
    bits = [each.overlap.bits["on"] for each in whole]
    worse = [
        dataclasses.replace(one, overlap=dataclasses.replace(one.overlap, bits={"on": 1.1 * on}))
        for one, on in zip(whole, bits, strict=True)
    ]
    same = ablation_figures(whole, whole)["differences"]["ablated-whole"]
    assert same["seeds"] == [0.0] * 3 and same["low"] == same["high"] == 0
    figures = ablation_figures(worse, whole)
    ablated, of_whole = (figures["bits_per_byte"][name] for name in ("ablated", "whole"))
    assert of_whole["value"] == pytest.approx(
        seed_figures(whole)[-1]["bits_per_byte"]["on"]["value"]
    )
    assert ablated["seeds"] == pytest.approx([1.1 * value for value in of_whole["seeds"]])
    difference = figures["differences"]["ablated-whole"]
    assert difference["value"] == pytest.approx(0.1 * of_whole["value"])
    assert difference["low"] > 0
    table = ablation_table({"chunk_only": figures})
    row = table.rows[0]
    assert row[0] == "chunk only" and row[-2:] == ["+0.128", "yes"]
    assert row[1] == f"{ablated['value']:.4f} ± {spread(ablated):.4f}"
    assert len(row) == len(table.header) and "the mean of 3 seeds" in table.caption
    sizes = dataclasses.replace(whole[0].overlap, bytes=whole[0].overlap.bytes + 1)
    with pytest.raises(UserError, match="expected one split and table"):
        ablation_figures([dataclasses.replace(whole[0], overlap=sizes)], whole[:1])
    with pytest.raises(UserError, match="expected a neighbour table"):
        ablation_figures([scored_text(neighbours=False)[0]], whole[:1])


@pytest.mark.parametrize(
    ("name", "interval", "shown"),
    [
        ("chunk_only", (0.1, 0.05, 0.15), ["+0.128", "yes"]),
        ("chunk_only", (-0.1, -0.15, -0.05), ["+0.128", "no"]),
        # the paper's sharing is the worse one
        ("own_embeddings", (-0.1, -0.15, -0.05), ["-0.001", "yes"]),
        ("one_neighbour", (0.1, -0.05, 0.15), ["+0.036", "not clear"]),
        ("one_neighbour", (0.1, 0.1, 0.1), ["+0.036", "not clear"]),  # of one document
        ("norm_conditioning", (0.1, 0.05, 0.15), ["not in the paper", ""]),
    ],
)
def test_a_sign_is_that_of_the_papers_ablation(name, interval, shown):
    difference = dict(zip(("value", "low", "high"), interval, strict=True)) | {"seeds": [0.1]}
    figure = {"value": 1.0, "seeds": [1.0]}
    found = {"bits_per_byte": {"ablated": figure}, "differences": {"ablated-whole": difference}}
    table = ablation_table({name: found})
    row = table.rows[0]
    assert row[1] == "1.0000" and row[-2:] == shown
    assert len(row) == len(table.header) and "another seed may differ by more" in table.caption
    assert row[2] == f"{interval[0]:+.4f} [{interval[1]:+.4f}, {interval[2]:+.4f}]"
