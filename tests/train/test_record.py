"""What a run records about itself, and what is refused."""

import dataclasses
import json

import pytest

from retro_jax.config import PRESETS, DecoderForm
from retro_jax.errors import UserError
from retro_jax.train import record

_SETTINGS = "A.steps = 100\nA.log_every = 5\nB.width = 8\n"
_PARENTS = {"tokenizer": "a" * 64, "chunks/train": "b" * 64}


_DEFAULTS = {"BatchConfig.neighbour_part": "'both'"}


def _claim(directory, settings=_SETTINGS, parents=_PARENTS, free=()):
    record.claim(directory, settings, parents=parents, free=free, defaults=_DEFAULTS)


def test_everything_is_recorded_and_nothing_else(tmp_path):
    run = tmp_path / "W" / "retro"
    _claim(run)
    assert sorted(p.name for p in run.iterdir()) == ["config.gin", "parents.json", "versions.json"]
    assert (run / "config.gin").read_text() == _SETTINGS
    (start,) = json.loads((run / "versions.json").read_text())["starts"]
    assert start["packages"]["jax"]
    assert start["hardware"]["platform"] == "cpu"
    assert set(start["git"]) == {"revision", "dirty"}
    assert len(start["git"]["revision"]) == 40


def test_the_same_run_again_changes_nothing(tmp_path):
    _claim(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    _claim(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_other_settings_are_refused_old_to_new(tmp_path):
    _claim(tmp_path)
    other = "A.steps = 200\nA.log_every = 5\nC.depth = 2\n"
    with pytest.raises(UserError) as error:
        _claim(tmp_path, other)
    expected = "A.steps 100 -> 200; B.width 8 -> (absent); C.depth (absent) -> 2; expected the same"
    assert expected in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / "config.gin").read_text() == _SETTINGS


def test_a_setting_that_did_not_exist_yet_had_its_default(tmp_path):
    _claim(tmp_path)
    newer = f"{_SETTINGS}BatchConfig.neighbour_part = 'both'\n"
    _claim(tmp_path, newer)
    assert (tmp_path / "config.gin").read_text() == newer
    _claim(other := tmp_path / "other")
    with pytest.raises(UserError, match=r"neighbour_part \(absent\) -> 'chunk'"):
        _claim(other, newer.replace("both", "chunk"))


def test_free_settings_may_change_and_are_recorded(tmp_path):
    _claim(tmp_path)
    other = "A.steps = 100\nA.log_every = 7\nB.width = 9\n"
    with pytest.raises(UserError, match=r"settings: B\.width 8 -> 9; expected"):
        _claim(tmp_path, other, free=["A.log_every"])
    _claim(tmp_path, other, free=["A.log_every", "B"])
    assert (tmp_path / "config.gin").read_text() == other


def test_other_data_is_refused(tmp_path):
    _claim(tmp_path)
    with pytest.raises(UserError, match="other data: chunks/train bbbbbbbbbbbb -> cccccccccccc;"):
        _claim(tmp_path, parents={**_PARENTS, "chunks/train": "c" * 64})


def test_a_directory_without_results_can_be_claimed_anew(tmp_path):
    _claim(tmp_path)
    other = _SETTINGS.replace("8", "9")
    record.claim(tmp_path, other, parents={}, begun=False)
    assert (tmp_path / "config.gin").read_text() == other
    assert json.loads((tmp_path / "parents.json").read_text()) == {}


def test_another_version_is_appended(tmp_path, monkeypatch):
    _claim(tmp_path)
    monkeypatch.setattr(record, "git_revision", lambda: None)
    _claim(tmp_path)
    starts = json.loads((tmp_path / "versions.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["git"]
    assert starts[1]["git"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    _claim(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match=r"config\.gin cannot be written: No space left"):
        _claim(tmp_path, _SETTINGS.replace("5", "6"), free=["A.log_every"])
    assert (tmp_path / "config.gin").read_text() == _SETTINGS
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.gin",
        "parents.json",
        "versions.json",
    ]


@dataclasses.dataclass(frozen=True)
class _Config:
    name: str
    rate: float = 1e-8
    layers: tuple[int, ...] = (2,)
    mixture: dict | None = None


def test_settings_of_dataclasses_are_lines_that_can_be_read_again():
    config = _Config("it's", mixture={"b": 1.0, "a": 2})
    text = record.settings_text([config])
    assert text.splitlines() == [
        "_Config.layers = (2,)",
        "_Config.mixture = {'a': 2, 'b': 1.0}",
        '_Config.name = "it\'s"',
        "_Config.rate = 1e-08",
    ]
    assert record.parse_settings(text)["_Config.rate"] == "1e-08"
    defaults = {"_Config.rate": "1e-08", "_Config.layers": "(2,)", "_Config.mixture": "None"}
    assert record.default_settings([config]) == defaults


def test_parents_are_those_of_a_run_that_has_begun(tmp_path):
    _claim(tmp_path)
    assert record.recorded_parents(tmp_path) is None
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert record.recorded_parents(tmp_path) == _PARENTS


def test_changed_settings_are_those_of_other_values(tmp_path):
    plain = PRESETS["172m"]
    formed = dataclasses.replace(plain, form=DecoderForm(norm="layer"), norm_epsilon=1e-3)
    (tmp_path / "config.gin").write_text(record.settings_text([plain]))
    names = ("RetroConfig.", "DecoderForm.norm")
    assert record.changed_settings(tmp_path, [plain], names) == {}
    assert record.changed_settings(tmp_path, [formed], names) == {
        "DecoderForm.norm": "'layer'",
        "RetroConfig.form": "@DecoderForm()",
        "RetroConfig.norm_epsilon": "0.001",
    }
    (tmp_path / "config.gin").write_text(record.settings_text([formed]))
    found = record.changed_settings(tmp_path, [plain], ("DecoderForm.norm", "RetroConfig.form"))
    assert found == {"DecoderForm.norm": None, "RetroConfig.form": None}
