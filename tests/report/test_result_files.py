"""Figures in files beside results: shown with the results that they are of, and with no others."""

import copy
import json

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.report.evaluation_tables import compared, losses_of
from retro_jax.report.result_files import (
    read_comparisons,
    read_figures,
    read_losses,
    read_results,
    windows_file,
)
from retro_jax.storage import files

MODEL = {"run": "retro", "step": 6, "checkpoint": "c"}


def _results(digest: str, bits: float = 2.0) -> dict:
    scored = {"tokens": 9, "nats": 7 * bits, "bits_per_byte": bits, "word_perplexity": 3.0}
    scored |= {"documents": 2, "bytes": 10}
    settings = {"window_chunks": 4}
    return {
        name: {
            "nll": f"test-{name}-{digest}.npy",
            "model": MODEL,
            "all": scored,
            "settings": settings,
        }
        for name in ("on", "off")
    }


def _revisions(results: dict) -> dict:
    rows = [
        {
            "revision": r,
            "bits_per_byte": {n: {"value": x["all"]["bits_per_byte"]} for n, x in s.items()},
        }
        for r, s in enumerate((_results("0", 1.5), results))
    ]
    models = {name: each["model"] for name, each in results.items()}
    return {"models": models, "nll": losses_of(results), "rows": rows}


def _by_overlap(results: dict) -> dict:
    at_last = _revisions(results)
    figures = at_last["rows"][-1]["bits_per_byte"]
    none = {name: {"value": None} for name in figures}
    rows = [("", 1.0, figures), ("", 0.5, none), ("a", 1.0, none)]
    return at_last | {
        "rows": [dict(zip(("corpus", "at_most", "bits_per_byte"), row)) for row in rows]
    }


def test_losses_are_those_that_a_result_was_made_with(tmp_path):
    losses = np.arange(6.0).reshape(2, 3)
    files.write_array(tmp_path / "test-on-1.npy", losses)
    known = {"nll_sha256": files.measure(tmp_path / "test-on-1.npy")[1]}
    earlier_version = _results("1")["on"]
    for result in (earlier_version, earlier_version | known):
        np.testing.assert_array_equal(read_losses(tmp_path, result), losses)
    with pytest.raises(UserError, match=r"^\S*test-off-1.npy is missing"):
        read_losses(tmp_path, _results("1")["off"])
    losses[1, 2] = 0.5
    files.write_array(tmp_path / "test-on-1.npy", losses)
    with pytest.raises(UserError, match=r"test-on-1.npy is not what test-on-1.json was made with"):
        read_losses(tmp_path, _results("1")["on"] | known)


def test_results_without_their_fields_are_refused(tmp_path):
    path = tmp_path / "test.json"
    with pytest.raises(UserError, match=r"test.json is missing: expected the result of"):
        read_results(tmp_path, "test")
    results = {name: each | {"corpora": {}} for name, each in _results("1").items()}
    path.write_text(json.dumps(results))
    assert read_results(tmp_path, "test") == results
    broken = {name: {k: v for k, v in each.items() if k != "nll"} for name, each in results.items()}
    for text in ({}, broken, {"on": 3}):
        path.write_text(json.dumps(text))
        with pytest.raises(UserError, match=r"test.json has no results by condition"):
            read_results(tmp_path, "test")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"test.json has no field 'models'"):
        read_figures(path, results)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "make", [lambda r: compared({0.0: _results("1", 1.0), 0.5: r}), _revisions, _by_overlap]
)
def test_figures_of_other_results_are_left_out(tmp_path, caplog, make, old):
    figures = make(_results("1"))
    if old:  # of a version that did not name the losses
        del figures["nll"]
    path = windows_file(tmp_path, "test")
    assert read_figures(path, _results("1")) is None  # there is no file
    path.write_text(json.dumps(figures))
    assert read_figures(path, _results("1")) == figures
    assert not caplog.messages
    others = [_results("2", 2.1), {"on": _results("1")["on"]}]
    if not old:
        others.append(_results("2"))  # by its digest alone
    for other in others:
        assert read_figures(path, other) is None
    assert caplog.messages == [f"{path} is of other results, and left out"] * len(others)


@pytest.mark.parametrize("old", [False, True])
def test_comparisons_of_other_results_are_left_out(tmp_path, old):
    result = _results("1")["on"]
    comparison = {
        "other": "V",
        "conditions": ["on", "off"],
        "models": [MODEL, MODEL],
        "nll": [result["nll"], "test-off-x.npy"],
        "documents": 2,
        "bytes": 10,
        "bits_per_byte": [2.0, 2.5],
    }
    if old:
        del comparison["nll"]
    (tmp_path / "test-on-against-V-off.json").write_text(json.dumps(comparison))
    assert read_comparisons(tmp_path, "test", _results("1")) == [comparison]
    fewer = copy.deepcopy(_results("2"))
    fewer["on"]["all"]["documents"] = 1
    for other in (_results("2", 2.1), fewer, {"off": _results("1")["off"]}):
        assert read_comparisons(tmp_path, "test", other) == []
