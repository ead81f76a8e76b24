"""The structure that WORKSPACE.md promises: which way imports point, and what each folder may hold."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("retro_jax", "data_pipelines", "launch")
# What data_pipelines may import of retro_jax.
GROUND = ("batch", "config", "errors", "storage", "distributed")
LAUNCH_LINES = 5000
# Files of launch/ itself that are no commands.
NO_COMMANDS = {"__init__"}
# Packages that one folder alone may import.
KEPT = {"gin": "launch", "tensorflow": "data_pipelines", "scann": "data_pipelines"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(name: str, *, deferred: bool = True) -> set[str]:
    """Modules that a module imports; not those inside functions unless `deferred`."""
    tree = modules()[name]
    nodes = ast.walk(tree) if deferred else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return found


def test_imports_point_one_way():
    """launch -> data_pipelines -> the ground floor of retro_jax, which imports neither."""
    wrong = []
    for name in modules():
        for other in imported(name):
            package, _, rest = other.partition(".")
            if package not in PACKAGES:
                continue
            if PACKAGES.index(package) > PACKAGES.index(name.split(".")[0]) or (
                name.startswith("data_pipelines")
                and package == "retro_jax"
                and rest.split(".")[0] not in GROUND
                and not rest.startswith("report.")
            ):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles():
    """Modules can be sorted so that each imports only earlier ones."""
    left = {
        name: {other for other in imported(name) if other in modules() and other != name}
        for name in modules()
    }
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


def test_no_private_name_crosses_modules():
    """`from x import _y` and `x._y` of another module."""
    wrong = []
    for name, tree in modules().items():
        aliases = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                for alias in node.names:
                    if alias.name.startswith("_"):
                        wrong.append(f"{name} imports {node.module}.{alias.name}")
                    if f"{node.module}.{alias.name}" in modules():
                        aliases.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in aliases
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
            ):
                wrong.append(f"{name} reads {node.value.id}.{node.attr}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(KEPT))
def test_some_packages_are_imported_in_one_folder_only(package: str):
    users = {name for name in modules() for other in imported(name) if _top(other) == package}
    assert users and all(_top(name) == KEPT[package] for name in users)


def test_flags_are_defined_in_launch_alone():
    users = {name for name in modules() if any(_top(other) == "absl" for other in imported(name))}
    assert all(_top(name) == "launch" for name in users), sorted(users)


def test_launch_holds_commands():
    """Every file directly in launch/ is a command, and all of launch/ stays small."""
    without = []
    for path in (ROOT / "launch").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if path.stem not in NO_COMMANDS and "main" not in functions:
            without.append(path.name)
    assert not without
    lines = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "launch").rglob("*.py")
    )
    assert lines < LAUNCH_LINES


def _top(name: str) -> str:
    """The package that a module is of."""
    return name.partition(".")[0]
