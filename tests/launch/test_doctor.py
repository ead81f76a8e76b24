"""launch/doctor.py: what is printed, and the exit status."""

import pytest

from launch import doctor
from launch.common import app
from retro_jax import installation
from retro_jax.installation import Finding, Limits


@pytest.fixture(name="call")
def _call(monkeypatch):
    """Runs the command with faked devices and limits; returns the exit status."""
    enough = Limits(4096, 2**40, 2**40, True, 2**40, 8)
    monkeypatch.setattr(installation, "devices", lambda: [Finding("ok", "cpu", "2 x cpu")])
    monkeypatch.setattr(Limits, "read", lambda workdir: enough)

    def call(*flags: str) -> int:
        try:
            return app.execute(doctor.main, ["doctor", *flags])
        except SystemExit as end:
            return end.code

    return call


def test_a_line_for_everything(call, capsys, tmp_path):
    assert call(f"--workdir={tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"Versions", "Packages", "Devices", "Limits"} <= set(lines)
    assert any(line.split()[:2] == ["ok", "jax"] for line in lines)
    assert "  ok     cpu  " in "\n".join(lines)
    assert lines[-1].startswith("nothing needed is missing; ")


def test_a_low_limit_ends_with_status_1(call, capsys, monkeypatch):
    low = Limits(100, None, 2**40, True, 2**40, 8)
    monkeypatch.setattr(Limits, "read", lambda workdir: low)
    assert call() == 1
    out = capsys.readouterr().out
    assert "  fails  open files" in out and "  note   shared memory" in out
    assert "needed and missing: open files; " in out


def test_a_missing_package_ends_with_status_1_where_it_is_needed(call, capsys, monkeypatch):
    required = ["jax", 'no-such-package>=2; extra == "data"']
    monkeypatch.setattr(installation, "requirements", lambda: required)
    assert call() == 0
    assert "note   no-such-package" in capsys.readouterr().out
    assert call("--extras=data") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("needed and missing: no-such-")


def test_an_extra_that_there_is_not_is_refused(call, capsys):
    assert call("--extras=dta") == 2
    assert capsys.readouterr().err.startswith("error: --extras=dta: expected some of data, ")
