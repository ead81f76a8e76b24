"""The wheel: built without network, it has everything, and works in a folder outside the repository."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("retro_jax", "data_pipelines", "launch")
SOURCES = (*PACKAGES, "experiments", "setup.py", "pyproject.toml", "README.md", "LICENSE")
_BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"


@pytest.fixture(name="built", scope="module")
def _built(tmp_path_factory) -> pathlib.Path:
    """A folder with a wheel and a source distribution, made by the build backend itself."""
    folder = tmp_path_factory.mktemp("packaging")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copyfile(ROOT / name, folder / name)
    run = _python(["-c", _BUILD], cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "dist"


@pytest.fixture(name="installed", scope="module")
def _installed(built: pathlib.Path, tmp_path_factory) -> pathlib.Path:
    """The wheel as an installation unpacks it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def _python(arguments: list[str], *, cwd: pathlib.Path, **variables: str):
    """Runs Python elsewhere; `variables` are added to the environment."""
    environment = {**os.environ, **variables}
    for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY"):
        if name not in variables:
            environment.pop(name, None)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_has_every_module_and_every_experiment(installed: pathlib.Path):
    expected = {path.relative_to(ROOT) for top in PACKAGES for path in (ROOT / top).rglob("*.py")}
    expected |= {pathlib.Path(top, "py.typed") for top in PACKAGES}
    gin = {path.relative_to(ROOT) for path in (ROOT / "experiments").rglob("*.gin")}
    assert len(gin) > 10
    expected |= {"launch" / path for path in gin}
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path for path in found if ".dist-info" not in str(path)} == expected


def test_its_metadata_is_whole(installed: pathlib.Path):
    (folder,) = installed.glob("*.dist-info")
    metadata = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    text = metadata.get_payload()
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert text.startswith("# retro-jax")
    assert not re.search(r"\]\((?!https?://|#)", text)  # an index has no files beside the page
    (licence,) = folder.rglob("LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "https://arxiv.org/abs/2112.04426" in " ".join(metadata.get_all("Project-URL"))
    classifiers = "\n".join(metadata.get_all("Classifier"))
    versions = re.findall(
        r"^Programming Language :: Python :: (3\.\d+)$", classifiers, re.MULTILINE
    )
    assert versions == ["3.11", "3.12", "3.13"]
    assert f"VERSIONS := {' '.join(versions)}\n" in (ROOT / "Makefile").read_text("utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert workflow["jobs"]["run"]["strategy"]["matrix"]["python"] == versions
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert metadata["Version"] == re.findall(r"^## (\d\S+) - ", changes, re.MULTILINE)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == metadata["Version"]
    assert citation["license"] == metadata["License"]
    entries = (folder / "entry_points.txt").read_text(encoding="utf-8")
    assert "retro = launch.retro:main" in entries


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_has_a_lower_bound_that_the_constraints_meet(
    installed: pathlib.Path, python: str
):
    (folder,) = installed.glob("*.dist-info")
    metadata = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    needed = _applying(metadata.get_all("Requires-Dist"), python)
    pinned = _applying((line for line in lines if line and not line.startswith("#")), python)
    assert len(needed) > 10
    for each in needed:
        assert each.specifier, f"{each.name} has no lower bound"
        (pin,) = [pin for pin in pinned if _same(pin.name, each.name)]
        (exact,) = pin.specifier
        assert each.specifier.contains(exact.version), f"{each} and {pin}"


def _applying(lines: Iterable[str], python: str) -> list[Requirement]:
    """The requirements without extras that a Python has."""
    environment = {"python_version": python, "extra": ""}
    every = map(Requirement, lines)
    return [each for each in every if each.marker is None or each.marker.evaluate(environment)]


def _same(one: str, other: str) -> bool:
    """Whether two names are of one package."""
    first, second = (re.sub(r"[-_.]+", "-", name).lower() for name in (one, other))
    return first == second


def test_the_source_distribution_has_what_the_wheel_is_made_of(built: pathlib.Path):
    folder = built.parent / "unpacked"
    shutil.unpack_archive(next(built.glob("*.tar.gz")), folder, filter="data")
    (source,) = folder.iterdir()
    for name in ("README.md", "LICENSE", "setup.py", "experiments/quickstart.gin"):
        assert (source / name).is_file(), name
    run = _python(["-c", _BUILD.split("; b.build_sdist")[0]], cwd=source)
    assert run.returncode == 0, run.stderr
    wheels = [next(each.glob("*.whl")) for each in (built, source / "dist")]
    names = [set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels]
    assert names[0] == names[1]


def test_links_are_absolute_where_the_repository_is_known():
    code = "import setup; print(setup.long_description()); print(setup.urls()['Source'])"
    code = f"import setuptools; setuptools.setup = lambda **_: None; {code}"
    variables = {"GITHUB_SERVER_URL": "https://example.org", "GITHUB_REPOSITORY": "o/r"}
    run = _python(["-c", code], cwd=ROOT, **variables)
    assert run.returncode == 0, run.stderr
    assert "](https://example.org/o/r/blob/main/docs/tutorial.md)" in run.stdout
    assert "](https://example.org/o/r/raw/main/docs/images/report.png)" in run.stdout
    assert not re.search(r"\]\((?!https?://|#)", run.stdout)
    assert run.stdout.splitlines()[-1] == "https://example.org/o/r"


def test_the_version_is_that_of_the_tag(tmp_path: pathlib.Path):
    """At a tag its own; later the next one's, with the number of commits since."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    (tmp_path / ".gitignore").write_text("*.egg-info\n*.dist-info\n")
    for command in ("init -q", "add .", "commit -qm one", "tag v7.8.9"):
        subprocess.run([*git, *command.split()], cwd=tmp_path, check=True)
    assert _version_of(tmp_path) == "7.8.9"
    subprocess.run([*git, *["commit", "-qm", "two", "--allow-empty"]], cwd=tmp_path, check=True)
    assert re.fullmatch(r"7\.8\.10\.dev1\+g[0-9a-f]+", _version_of(tmp_path))


def _version_of(folder: pathlib.Path) -> str:
    """The version in the metadata that a folder's build would have."""
    code = "from setuptools import build_meta as b; print(b.prepare_metadata_for_build_wheel('.'))"
    run = _python(["-c", code], cwd=folder)
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.dist-info/METADATA")
    version = email.message_from_string(path.read_text(encoding="utf-8"))["Version"]
    shutil.rmtree(path.parent)
    return str(version)


def test_it_works_in_an_empty_folder(installed: pathlib.Path, tmp_path: pathlib.Path):
    path = str(installed)
    settings = "--gin_file=experiments/quickstart.gin"
    arguments = ["-m", "launch.retro", "prepare", settings, "--workdir=W", "--print_config"]
    run = _python(arguments, cwd=tmp_path, PYTHONPATH=path)
    assert run.returncode == 0, run.stderr
    assert "TokenizerConfig.vocab_size = 4096" in run.stdout
    code = "from launch.common.experiments import FOLDER; print(FOLDER)"
    run = _python(["-c", code], cwd=tmp_path, PYTHONPATH=path)
    assert run.stdout == f"{installed / 'launch' / 'experiments'}\n"
    assert not list(tmp_path.iterdir())
