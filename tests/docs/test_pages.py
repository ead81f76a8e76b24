"""The pages are true: links lead somewhere, and modules, files, settings, flags and messages exist."""

import ast
import dataclasses
import importlib.util
import pathlib
import re

import pytest

from launch.common.configurables import TABLE, configurable

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
WRITTEN = [name for name in TEXTS if "generated/" not in name]
SOURCES = ("retro_jax", "data_pipelines", "launch")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_MODULE = re.compile(r"\b(?:launch|benchmarks|tests\.docs)\.[a-z_]+\b(?!\.)")
_FILE = re.compile(
    r"\b(?:retro_jax|data_pipelines|launch|benchmarks|tests|experiments)/[a-z0-9_/.]*\.(?:py|gin)\b"
)
_FIELD = re.compile(rf"\b({'|'.join(TABLE)})\.([a-z]\w*)")


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 80


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name: str):
    for target in _LINK.findall(TEXTS[name]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(found.read_text("utf-8")), f"{name}: {target}"


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub and MkDocs name them."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(text))
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", TEXTS)
def test_modules_files_and_settings_exist(name: str):
    for module in set(_MODULE.findall(TEXTS[name])):
        assert importlib.util.find_spec(module) is not None, f"{name}: {module}"
    for path in set(_FILE.findall(TEXTS[name])):
        assert (ROOT / path).is_file(), f"{name}: {path}"
    for cls, field in set(_FIELD.findall(TEXTS[name])):
        fields = {each.name for each in dataclasses.fields(configurable(cls))}
        # A wrong name is shown on purpose, with what is said about it.
        wrong = name == "docs/troubleshooting.md" and f"{cls}.{field}" == "TrainConfig.step"
        assert field in fields or wrong, f"{name}: {cls}.{field}"


@pytest.mark.parametrize("name", WRITTEN)
def test_tables_that_people_read_have_at_most_eight_columns(name: str):
    for row in re.findall(r"^\|(?:---\|)+$", TEXTS[name], re.MULTILINE):
        assert row.count("---") <= 8, name


def test_messages_in_troubleshooting_are_those_of_the_code():
    known = messages()
    rows = re.findall(r"^\| `([^`]+)` \|", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    quoted = [row for row in rows if " " in row]
    assert len(quoted) > 40
    for message in quoted:
        assert any(message in text for text in known), f"no message in the code has: {message}"


def messages() -> list[str]:
    """Every string in the code, with "..." in place of what f-strings or logging put in."""
    trees = [
        ast.parse(path.read_text("utf-8"))
        for top in SOURCES
        for path in ROOT.glob(f"{top}/**/*.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    plain = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    joined = [n.values for n in nodes if isinstance(n, ast.JoinedStr)]
    filled = (
        "".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in values)
        for values in joined
    )
    return [*(re.sub(r"%[ds]", "...", text) for text in plain), *filled]
